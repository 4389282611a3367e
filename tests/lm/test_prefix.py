"""Activations below the lowest adapter: kept or not, the same bytes; read instead of computed, the
same training.
"""

import dataclasses
import errno

import numpy as np
import pytest
import torch
from tolerances import TINY
from toy import bits, toy_task

from fedspine.core.device import Device
from fedspine.lm import prefix as module
from fedspine.lm.base import Base, Model
from fedspine.lm.load import load
from fedspine.lm.lora import fresh
from fedspine.lm.prefix import Prefixes, activations, first_block, storable
from fedspine.lm.score import score
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning
from fedspine.methods.fedlora import FedLora

ARCHITECTURES = ("bert", "roberta", "distilbert", "llama", "mistral", "qwen2", "qwen3")
TUNING = Tuning(steps=40, batch=16, learning_rate=1e-2)  # every row is trained on more than once
NEVER = dataclasses.replace(TUNING, turns=0.0)


def top_model(base, depth=1):
    """A model with an adapter on the last `depth` blocks."""
    rng = np.random.default_rng(0)
    sites = [site for site in base.layout.sites if site.layer >= base.layout.layers - depth]
    return Model(
        structure=full(base.layout),
        adapter=fresh(sites, 3, rng),
        head=base.initial_head(rng),
        scale=2.0,
    )


def device_on(task, prefixes=None):
    return Device(
        id="d",
        data=task.train,
        base=task.base,
        memory={},
        rng=np.random.default_rng(0),
        prefixes=prefixes,
    )


@pytest.fixture
def passes(monkeypatch):
    """Counts how often activations are computed."""
    counted = []
    below = Base.below
    monkeypatch.setattr(Base, "below", lambda *arguments: (counted.append(1), below(*arguments))[1])
    return counted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_above_kept_activations_is_training(tiny_folder, architecture):
    base, tokenizer = load(str(tiny_folder(architecture)), kind="classification", classes=3)
    task = toy_task(base, tokenizer, rounds=1)
    model = top_model(base)
    assert first_block(base.layout, model) == base.layout.layers - 1

    def both(**changed):
        tuning = dataclasses.replace(TUNING, **changed)
        return (
            tune(device_on(task), model, t)
            for t in (tuning, dataclasses.replace(tuning, turns=0.0))
        )

    # at next to no rate the weights stay, so the losses are those of the same weights
    kept, plain = both(steps=20, learning_rate=1e-9)
    assert kept.loss == pytest.approx(plain.loss, rel=TINY)
    # AdamW turns rounding into steps of its rate, so of training the direction is compared
    kept, plain = both(steps=5)
    apart = moved = 0.0
    for name, tensor in kept.model.adapter.items():
        apart += float((tensor - plain.model.adapter[name]).square().sum())
        moved += float((tensor - model.adapter[name]).square().sum())
    assert apart < 0.01**2 * moved


def test_kept_in_a_file_or_computed_anew_the_bits_are_the_same(task, tmp_path, passes):
    model, prefixes = top_model(task.base), Prefixes(tmp_path / "cache")
    first = tune(device_on(task, prefixes), model, TUNING)
    computed = len(passes)
    again = tune(device_on(task, prefixes), model, TUNING)
    assert computed > 0 and len(passes) == computed
    anew = tune(device_on(task), model, TUNING)
    assert bits(first.model) == bits(again.model) == bits(anew.model)


def test_nothing_is_kept_where_rows_are_seldom_used_or_every_block_is_trained(
    task, tmp_path, passes
):
    prefixes = Prefixes(tmp_path / "cache")
    tune(device_on(task, prefixes), top_model(task.base), NEVER)
    tune(device_on(task, prefixes), top_model(task.base, depth=task.base.layout.layers), TUNING)
    assert not passes and not (tmp_path / "cache").exists()


def test_another_structure_below_is_computed_for_itself(task, tmp_path):
    prefixes = Prefixes(tmp_path / "cache")
    model = top_model(task.base)
    tune(device_on(task, prefixes), model, TUNING)
    structure = dataclasses.replace(model.structure, heads=model.structure.heads.clone())
    structure.heads[0, 0] = False
    tune(device_on(task, prefixes), dataclasses.replace(model, structure=structure), TUNING)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_full_disk_costs_time_only(task, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = tune(device_on(task), top_model(task.base), TUNING)
    monkeypatch.setattr(np, "save", full_disk)
    found = tune(device_on(task, Prefixes(tmp_path / "cache")), top_model(task.base), TUNING)
    assert bits(found.model) == bits(expected.model)
    assert not list((tmp_path / "cache").iterdir())


def test_a_nearly_full_disk_is_left_to_others(task, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESERVE", 1 << 60)
    tune(device_on(task, Prefixes(tmp_path / "cache")), top_model(task.base), TUNING)
    assert not list((tmp_path / "cache").iterdir())


def test_nothing_is_kept_of_data_too_large_for_the_disk(task, monkeypatch):
    assert storable(task.base, task.train)
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert not storable(task.base, task.train)


@pytest.mark.parametrize("cut", [0, 200])
def test_a_damaged_file_is_computed_anew(task, tmp_path, cut):
    prefixes = Prefixes(tmp_path / "cache")
    expected = tune(device_on(task, prefixes), top_model(task.base), TUNING)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    assert bits(tune(device_on(task, prefixes), top_model(task.base), TUNING).model) == bits(
        expected.model
    )


def test_the_folder_stays_within_its_bound(tmp_path):
    prefixes = Prefixes(tmp_path, most_bytes=3000)
    for i in range(9):
        prefixes.get(f"d{i}", lambda: torch.zeros(25, 10))
    prefixes.get("large", lambda: torch.zeros(10_000))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000
    assert names == ["d7.npy", "d8.npy"]


def test_bf16_is_kept_as_it_is(tmp_path):
    prefixes = Prefixes(tmp_path)
    made = torch.randn(7, 5).bfloat16()
    prefixes.get("d", lambda: made)
    assert torch.equal(prefixes.get("d", lambda: made.float()), made)


def test_activations_are_what_enters_the_block(task):
    model = top_model(task.base)
    kept = activations(task.base, model, task.train, 1)
    rows = np.array([3, 8, 40])
    module = task.base.fit(model)
    seen = []
    hook = module.bert.encoder.layer[1].register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    module(**{name: value for name, value in task.train.batch(rows).items() if name != "labels"})
    hook.remove()
    for row, hidden in zip(rows, seen[0], strict=True):
        start, end = task.train.offsets[row : row + 2]
        torch.testing.assert_close(kept[start:end], hidden[: end - start], rtol=TINY, atol=TINY)


def test_depth_adapts_the_last_blocks_only(lab):
    rig = lab()
    method = dataclasses.replace(FedLora.toy(), depth=1)
    state = rig.run(method, rounds=2)
    last = rig.task.base.layout.layers - 1
    assert state.adapter and all(f".{last}." in name for name in state.adapter)
    whole = lab("whole").run(FedLora.toy(), rounds=2)
    assert len(whole.adapter) == (last + 1) * len(state.adapter)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_models_on_one_frozen_prefix_are_scored_with_one_pass_through_it(
    tiny_folder, tmp_path, passes, architecture, depth
):
    """The same scores to the last bit, and the blocks below the adapters computed for the first
    model only.
    """
    base, tokenizer = load(str(tiny_folder(architecture)), kind="classification", classes=3)
    data = toy_task(base, tokenizer, rounds=1).test
    models = [top_model(base, depth), top_model(base, depth)]
    models[1] = dataclasses.replace(
        models[1], head={name: 1.5 * tensor for name, tensor in models[1].head.items()}
    )
    prefixes = Prefixes(tmp_path)
    together = [score(base, model, data, prefixes=prefixes, rows="test") for model in models]
    assert len(passes) == -(-len(data) // module.BATCH)
    assert together == [score(base, model, data) for model in models]
    assert together[0] != together[1]


def test_a_model_with_adapters_on_all_blocks_is_scored_without_a_prefix(tiny_folder, tmp_path):
    base, tokenizer = load(str(tiny_folder("bert")), kind="classification", classes=3)
    data = toy_task(base, tokenizer, rounds=1).test
    score(base, top_model(base, 2), data, prefixes=Prefixes(tmp_path), rows="test")
    assert not list(tmp_path.iterdir())
