"""`fedspine plan`: what it says equals what a simulated run is charged."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import carried_out, environment, in_process, records_of, tiny_job, write_csv
from tiny_models import tiny
from toy import KINDS as TOY_KINDS
from toy import Lab, reached, toy_rows

from fedspine.core.task import Task
from fedspine.fleets import hardware
from fedspine.lm.encode import encode
from fedspine.lm.lora import fresh_a
from fedspine.lm.tuning import HeadTraining
from fedspine.lm.weightless import Weightless
from fedspine.methods import all_methods
from fedspine.runs.assemble import begun, turns_of
from fedspine.runs.config import Recipe
from fedspine.runs.plan import plan

ABLE = [name for name, cls in all_methods().items() if issubclass(cls, HeadTraining)]
TOKENS, CLASSES = 8, 3
# the JSON of a result holds losses, whose digits vary; its header fills multiples of 8 bytes
DIGITS = 8
SLOWEST = 1e6 / 8  # bytes a second of the slowest link
ROUND_TRIP = (0.003,) * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and tokenizer of a tiny model of each kind of task, and its folder."""
    folder = tmp_path_factory.mktemp("plan")
    return {
        kind: (*tiny(folder, architecture, kind), str(folder / f"tiny-{architecture}"))
        for kind, architecture in (("classification", "bert"), ("causal-lm", "llama"))
    }


def recipe_of(name, model, kind="classification", rounds=4, **method):
    return Recipe(
        method=dataclasses.replace(all_methods()[name].toy(), steps=3, batch=4, **method),
        model=model,
        kind=kind,
        max_tokens=TOKENS,
        devices=len(TOY_KINDS),
        per_round=len(TOY_KINDS),
        mix={"tx2": 2, "nx": 2, "agx": 1},
        rounds=rounds,
    )


def charged(recipe, base, tokenizer, folder, rounds=1):
    """The exchanges of the first rounds of a simulated fleet, on rows that are all cut to
    `TOKENS`.
    """
    kind = recipe.task.kind
    train, test = (encode(tokenizer, toy_rows(60, seed), kind, TOKENS) for seed in (0, 1))
    task = Task(
        kind=kind,
        base=base,
        train=train,
        test=test,
        label_names=() if kind == "causal-lm" else ("red", "green", "blue"),
        max_tokens=TOKENS,
        rounds=recipe.run.rounds,
        turns=turns_of(recipe),
    )
    assert kind == "causal-lm" or set(train.lengths) == {TOKENS}
    lab = Lab(task, folder, seed=recipe.run.seed, round_trip_seconds=ROUND_TRIP)
    try:
        lab.run(recipe.method, rounds=rounds, state=begun(recipe, task))
        return lab.rows("exchange")
    finally:
        lab.close()


CASES = [(name, "classification") for name in ABLE] + [
    (name, "causal-lm") for name in ("fedlora", "legend")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_planned_first_round_is_what_devices_are_charged(name, kind, models, tmp_path):
    base, tokenizer, folder = models[kind]
    recipe = recipe_of(name, folder, kind)
    planned = [dataclasses.asdict(one) for one in plan(recipe, classes=CLASSES).round.exchanges]
    real = charged(recipe, base, tokenizer, tmp_path)
    assert len(planned) == len(real) >= len(TOY_KINDS)
    for mine, theirs in zip(planned, real, strict=True):
        up, seconds = mine.pop("bytes_up"), mine.pop("seconds")
        assert mine == {key: theirs[key] for key in mine}
        assert abs(up - theirs["bytes_up"]) <= DIGITS
        assert seconds == pytest.approx(theirs["seconds"], abs=DIGITS / SLOWEST)


def test_what_is_planned_of_pruned_devices_is_what_they_are_charged(models, tmp_path):
    base, tokenizer, folder = models["classification"]
    recipe = recipe_of("magnitude", folder)
    kinds = {kind.kind: kind.pruned for kind in plan(recipe, classes=CLASSES).kinds}
    last = charged(recipe, base, tokenizer, tmp_path, rounds=recipe.run.rounds)[-len(TOY_KINDS) :]
    for one in last:
        pruned = kinds[one["kind"]]
        assert pruned.sparsity == pytest.approx(reached(base.layout, 0.5))
        assert pruned.peak_memory_bytes == one["peak_memory_bytes"]
        assert pruned.flops == (one["flops"],) * 2
        # digits of learning rates in the order and of the loss before in the result, 20 each
        assert pruned.bytes_down[0] == pytest.approx(one["bytes_down"], abs=60)
        assert pruned.bytes_up[0] == pytest.approx(one["bytes_up"], abs=20 + DIGITS)


def test_the_total_of_a_run_is_that_of_the_simulated_clock(models, tmp_path, monkeypatch, capsys):
    data = write_csv(tmp_path / "rows.csv", rows=30)
    job = tiny_job(models["classification"][2], data, method__name="fedlora", task__max_tokens=6)
    job = job[: job.index("method.ranks=[2, 4]") - 1] + job[job.index("method.ranks=[2, 4]") + 1 :]
    carried_out("run", *job, "--out", tmp_path / "run")
    status, out, _ = in_process(monkeypatch, capsys, "plan", *job, "--json")
    assert status == 0
    found, rows = json.loads(out), records_of(tmp_path / "run")
    rounds = [row for row in rows if row["row"] == "round"]
    exchanges = [row for row in rows if row["row"] == "exchange"]
    assert found["round"]["seconds"] == pytest.approx(rounds[0]["now"], abs=DIGITS / SLOWEST)
    # digits of learning rates, in 20 characters each, vary from round to round
    slack = 2 * 20 * len(exchanges)
    assert found["run"]["seconds"] == pytest.approx(rounds[-1]["now"], abs=slack / SLOWEST)
    for way in ("bytes_down", "bytes_up"):
        assert found["run"][way] == pytest.approx(sum(row[way] for row in exchanges), abs=slack)


def test_a_kind_without_room_is_reported_with_the_most_that_fits(models, monkeypatch):
    folder = models["classification"][2]
    small = dataclasses.replace(hardware.KINDS["tx2"], memory_bytes=100_000)
    monkeypatch.setitem(hardware.KINDS, "tx2", small)
    kinds = {kind.kind: kind for kind in plan(recipe_of("legend", folder), classes=CLASSES).kinds}
    tx2, nx = kinds["tx2"], kinds["nx"]
    assert tx2.training is None and tx2.left_out == "no depth fits its memory"
    assert not tx2.dense_fits and tx2.largest.depth == tx2.largest.batch == 0
    assert nx.training.fits and nx.left_out is None and nx.largest.depth == 2


def test_the_most_that_fits_is_just_below_what_does_not(models, monkeypatch):
    folder = models["classification"][2]
    size = plan(recipe_of("fedlora", folder), classes=CLASSES).kinds[0].dense_memory_bytes
    for spare, batch in ((1, 4), (-1, 3)):
        kind = dataclasses.replace(hardware.KINDS["agx"], memory_bytes=int(size / 0.8) + spare)
        monkeypatch.setitem(hardware.KINDS, "agx", kind)
        (agx,) = plan(recipe_of("fedlora", folder), classes=CLASSES, kind="agx").kinds
        assert (agx.largest.batch, agx.dense_fits, agx.devices) == (batch, spare > 0, 5)


SEVEN_BILLION = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
PEAK = (
    "import sys; from fedspine.core.process import peak_memory_bytes; from fedspine.ui import cli\n"
    "try: cli.main()\n"
    "finally: print(peak_memory_bytes(), file=sys.stderr)"
)


def test_seven_billion_parameters_need_neither_weights_nor_memory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_BILLION))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")  # which nobody reads
    settings = {"task.model": tmp_path, "task.kind": "causal-lm", "task.data": "nowhere"}
    settings |= {"method.name": "fedlora", "method.batch": 1, "method.rank": 32}
    job = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", PEAK, "plan", *job, "--device-kind", "agx", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    found = json.loads(done.stdout)
    assert found["parameters"] == 6_738_415_616  # of Llama 2 7B, as published
    assert found["kinds"][0]["training"]["rank"] == [32, 32]
    assert int(done.stderr.splitlines()[-1]) < 1_500_000_000  # bytes


BAD = {
    "a split method": (["method.name=mergesfl"], "cannot be planned.*methods that can be.*fedlora"),
    "a net": (["task.model=cnn-s", "method.name=fedavg"], "cannot be planned"),
    "privacy": (
        ["method.name=fedlora", "privacy.epsilon=1", "privacy.delta=1e-5"],
        r"\[privacy\] cannot be planned",
    ),
    "a model that is not there": (["task.model=./nowhere"], "nowhere is not a folder"),
    "an architecture without a unit map": (["task.model={gpt2}"], "'gpt2' has no unit map"),
    "a damaged configuration": (["task.model={damaged}"], "cannot be loaded"),
    "texts that are too long": (["task.max_tokens=100000"], "reads at most"),
    "a rank that is too large": (["method.ranks=[100000]"], "method.ranks has rank 100000"),
    "an encoder that is to write": (["task.kind=causal-lm"], "is an encoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, models, tmp_path, monkeypatch, capsys):
    for name, text in (("gpt2", '{"model_type": "gpt2"}'), ("damaged", '{"model_')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    settings, expected = BAD[case]
    places = {name: tmp_path / name for name in ("gpt2", "damaged")}
    settings = [f"task.model={models['classification'][2]}", *settings]
    job = [part for one in settings for part in ("--set", one.format(**places))]
    status, out, err = in_process(monkeypatch, capsys, "plan", *job)
    assert (status, out, len(err)) == (2, "", 1)
    assert re.search(expected, err[0])


def test_an_unknown_kind_of_device_is_named_with_the_nearest(monkeypatch, capsys):
    status, _, err = in_process(monkeypatch, capsys, "plan", "--device-kind", "tx3")
    assert (status, len(err)) == (2, 1)
    assert "did you mean 'tx2'?" in err[0]


def test_data_that_is_not_here_leaves_the_classes_to_a_guess(models, monkeypatch, capsys):
    settings = (f"task.model={models['classification'][2]}", "task.data=none.csv")
    settings += ("method.name=fedlora",)
    job = [part for one in settings for part in ("--set", one)]
    status, out, _ = in_process(monkeypatch, capsys, "plan", *job)
    assert status == 0
    assert "2 classes are assumed" in out and "unpruned, rank 8" in out
    status, out, _ = in_process(monkeypatch, capsys, "plan", *job, "--classes", "2", "--json")
    assert not any("classes are assumed" in line for line in json.loads(out)["remarks"])


def test_a_run_that_ends_by_its_clock_has_no_total(models):
    recipe = recipe_of("fedlora", models["classification"][2])
    assert plan(recipe, classes=CLASSES).run.seconds > 0
    ended = plan(recipe.choosing({"run": {"seconds": 5.0}}), classes=CLASSES)
    assert ended.run.seconds is None
    assert any("run.seconds" in remark for remark in ended.remarks)


def test_numbers_of_tensors_without_numbers_are_refused():
    with Weightless():
        made = fresh_a(np.random.default_rng(0), 2, 3)
        assert made.is_meta and torch.ones(2, dtype=torch.bool).device.type == "cpu"
        assert made.to(dtype=torch.float16).dtype is torch.float16 and made.to("cpu") is made
        for read in (made.tolist, made.numpy, made.data_ptr, lambda: float(made.sum())):
            with pytest.raises(NotImplementedError):
                read()
