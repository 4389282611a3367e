"""Kinds of structure: `uniform`, as many units in every layer in sizes that a stock configuration
can say, so that what the runs of all methods that prune deploy loads without our loader; and
`few_heads`, fewer heads and more channels at the same sparsity.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import carried_out, in_process, tiny_job, write_csv
from tiny_models import fp32_apart, labels_for, logits
from toy import Lab, Spy, reached, toy_task
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine.core.checks import Asked, Terms, Unusable
from fedspine.core.errors import BadInput
from fedspine.exports.card import read_card
from fedspine.exports.hf import export
from fedspine.lm.distillation import DenseTeacher
from fedspine.lm.importance import Scores
from fedspine.lm.load import load
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import check_target, cut_adapter, full, is_even, shrink, sparsity
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.methods.loraprune import LoraPrune
from fedspine.methods.magnitude import MagnitudePruning
from fedspine.methods.prune_after import PruneAfter
from fedspine.pruning.device import (
    FewHeadsOrder,
    SpineOrder,
    TaughtFewHeadsOrder,
    TaughtUniformOrder,
    UniformOrder,
)

METHODS = (FedSpine, FedSpinePlus, LoraPrune, MagnitudePruning, PruneAfter)


def layout(architecture, *, layers, heads, channels, width, query_heads, head_dim):
    sizes = {"layers": layers, "heads": heads, "channels": channels, "width": width}
    return PrunableLayout(
        architecture=architecture,
        prefix="model",
        query_heads=query_heads,
        head_dim=head_dim,
        **sizes,
    )


BERT = layout("bert", layers=3, heads=12, channels=1536, width=384, query_heads=12, head_dim=32)
LLAMA = layout("llama", layers=5, heads=8, channels=172, width=64, query_heads=8, head_dim=8)
GROUPED = layout("llama", layers=4, heads=3, channels=1536, width=576, query_heads=9, head_dim=64)
QWEN = layout("qwen3", layers=4, heads=8, channels=384, width=128, query_heads=16, head_dim=16)


def scores_of(layout, rng):
    sizes = ((layout.layers, layout.heads), (layout.layers, layout.channels))
    return tuple(torch.from_numpy(rng.random(size).astype(np.float32)) for size in sizes)


def kept_of(structure):
    return int(structure.heads[0].sum()), int(structure.channels[0].sum())


any_path = given(
    st.sampled_from([BERT, LLAMA, GROUPED, QWEN]), st.floats(0.05, 0.6), st.integers(0, 2**32 - 1)
)


def path_to(layout, target, seed, kind):
    """The structures of a random path to a target, and the last scores; what is gone stays gone,
    and the end is at the target.
    """
    rng = np.random.default_rng(seed)
    structures = [full(layout)]
    for step in [*np.sort(rng.random(4)) * target, target]:
        scores, asked = scores_of(layout, rng), {"sparsity": float(step), "target": target}
        structures.append(shrink(layout, structures[-1], scores, kind=kind, **asked))
    for earlier, later in itertools.pairwise(structures):
        assert not bool((later.heads & ~earlier.heads).any())
        assert not bool((later.channels & ~earlier.channels).any())
    # a quarter of a percent, or half a channel where that is more
    half = layout.shape.channel_parameters / layout.shape.parameters / 2
    assert abs(sparsity(layout, structures[-1]) - target) <= max(0.0025, half) + 1e-9
    return structures, scores


@settings(max_examples=40)
@any_path
def test_any_uniform_path_is_even_and_ends_at_the_target(layout, target, seed):
    structures, _ = path_to(layout, target, seed, "uniform")
    for each in structures:
        assert is_even(each)
        assert layout.heads - kept_of(each)[0] in layout.heads_dropped


def test_heads_that_a_configuration_can_say():
    assert BERT.heads_dropped == (0,)  # whose heads are the width over their number
    assert LLAMA.heads_dropped == (0, 4, 6, 7)  # 8, 4, 2 and 1 heads divide the width of 64
    assert GROUPED.heads_dropped == (0, 1, 2)  # 9, 6 and 3 query heads divide 576
    assert QWEN.heads_dropped == tuple(range(8))


def test_layers_choose_for_themselves():
    scores = scores_of(LLAMA, np.random.default_rng(0))
    end = shrink(LLAMA, full(LLAMA), scores, sparsity=0.5, target=0.5, kind="uniform")
    assert kept_of(end)[0] == 4  # half of them, and no layer is protected
    for layer in range(LLAMA.layers):
        lowest = scores[0][layer].argsort()[:4]
        assert not end.heads[layer][lowest].any()


@settings(max_examples=40)
@any_path
def test_few_heads_end_at_the_same_sparsity_with_no_more_heads(layout, target, seed):
    structures, scores = path_to(layout, target, seed, "few_heads")
    free = shrink(layout, full(layout), scores, sparsity=target, target=target)
    few, usual = (kept_of(each)[0] for each in (structures[-1], free))
    assert min(usual, 2) <= few <= usual
    if layout.layers * layout.heads >= 12 and target > 0.3 and usual > 2:
        assert few < usual


@pytest.mark.parametrize(
    ("target", "heads", "channels"), [(0.3, 6, 1232), (0.5, 3, 960), (0.75, 2, 448)]
)
def test_the_share_of_kept_heads_is_the_square_of_that_of_kept_weights(target, heads, channels):
    scores = scores_of(BERT, np.random.default_rng(0))
    kept = shrink(BERT, full(BERT), scores, sparsity=target, target=target, kind="few_heads")
    assert kept_of(kept) == (heads, channels)  # of 12, and of 1536; two heads at least


def test_what_no_uniform_structure_has_is_refused():
    check_target(BERT, 0.66, "uniform")
    check_target(BERT, 0.8)
    with pytest.raises(BadInput, match=r"\[0, 0.666\].*keeps 12 heads.*structure = \"free\""):
        check_target(BERT, 0.8, "uniform")
    with pytest.raises(BadInput, match="did you mean 'uniform'"):
        check_target(BERT, 0.5, "unifrom")
    check_target(BERT, 0.8, "few_heads")


@pytest.fixture(scope="module")
def tasks(tiny_folder):
    """Bases, tokenizers and tasks of tiny models, by architecture."""
    made = {}
    for name, kind in (("llama", "causal-lm"), ("bert", "classification")):
        base, tokenizer = load(str(tiny_folder(name)), kind=kind, classes=3)
        made[name] = base, tokenizer, toy_task(base, tokenizer, rounds=3, kind=kind)
    return made


def settings_of(cls, **more):
    few = {"steps": 1, "batch": 4, "sparsity": 0.4, "structure": "uniform"}
    if issubclass(cls, FedSpine):
        few |= {"ranks": (2, 4), "most_per_round": 0.5}
    return cls(**few | more)


def recorded(method, task, folder):
    """The last state of a run, its orders, and its replies with their orders."""
    orders, replies = [], []

    def order(id, order):
        orders.append(order)
        return order

    def reply(reply):
        replies.append(reply)
        return reply

    lab = Lab(task, folder)
    state = lab.run(method, around=lambda fleet: Spy(fleet, order=order, reply=reply))
    lab.close()
    return state, orders, replies


@pytest.mark.parametrize(
    ("cls", "name"), [*((cls, "llama") for cls in METHODS), (FedSpine, "bert")]
)
def test_what_a_method_deploys_loads_by_its_stock_config(tasks, tmp_path, cls, name):
    base, tokenizer, task = tasks[name]
    method = settings_of(cls)
    method.check(task)
    state, orders, replies = recorded(method, task, tmp_path / "lab")
    assert {type(order) for order in orders if isinstance(order, SpineOrder)} == {UniformOrder}
    kind = task.kind
    auto = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    for device in (None, replies[0].device):
        model = method.deploy(state, device)
        assert is_even(model.structure)
        assert sparsity(base.layout, model.structure) == pytest.approx(reached(base.layout, 0.4))
        folder = tmp_path / f"export-{device}"
        about = {"kind": kind, "max_tokens": 16, "name": "toy", "structure": "uniform"}
        export(base, model, tokenizer, folder, labels=labels_for(kind), **about)
        assert read_card(folder).stock
        found = logits(auto.from_pretrained(folder), tokenizer)
        expected = logits(base.fit(model), tokenizer)
        assert (found - expected).abs().max() <= fp32_apart(base, expected)
        heads, channels = kept_of(model.structure)
        line = f"uniform: {heads} heads and {channels} channels in every layer"
        assert line in (folder / "README.md").read_text()


@pytest.mark.parametrize("cls", METHODS)
def test_a_method_deploys_few_heads(tasks, tmp_path, cls):
    base, tokenizer, task = tasks["bert"]
    counts = {}
    for kind, order in (("free", SpineOrder), ("few_heads", FewHeadsOrder)):
        method = settings_of(cls, structure=kind, sparsity=0.3)
        method.check(task)
        state, orders, _ = recorded(method, task, tmp_path / kind)
        assert {type(each) for each in orders if isinstance(each, SpineOrder)} == {order}
        model = method.deploy(state)
        assert sparsity(base.layout, model.structure) == pytest.approx(reached(base.layout, 0.3))
        counts[kind] = model.structure.heads.sum(1).tolist(), model.structure.channels.sum(1)
    assert (counts["few_heads"][0], counts["free"][0]) == ([2, 2], [3, 3])
    assert bool((counts["few_heads"][1] > counts["free"][1]).all())
    about = {"kind": task.kind, "max_tokens": 16, "name": "toy", "structure": "few_heads"}
    export(base, model, tokenizer, tmp_path / "x", labels=labels_for(task.kind), **about)
    assert "few_heads: the share of kept heads" in (tmp_path / "x" / "README.md").read_text()
    assert read_card(tmp_path / "x").structure == "few_heads"


def test_an_uneven_structure_is_not_believed(tasks, tmp_path):
    base, _, task = tasks["llama"]
    _, _, replies = recorded(settings_of(LoraPrune), task, tmp_path / "lab")
    reply = replies[0]
    reply.value.check(Asked(Terms.of(task), rows=reply.value.examples, order=reply.order))
    kept = full(base.layout)
    kept.channels[0, 0] = False
    scores = Scores(heads=reply.value.scores.heads, channels=reply.value.scores.channels.clone())
    scores.channels[0, 0] = 0
    adapter = cut_adapter(reply.value.adapter, base.layout.sites, kept, reply.value.structure)
    uneven = replace(reply.value, structure=kept, adapter=adapter, scores=scores)
    asked = Asked(Terms.of(task), rows=reply.value.examples, order=reply.order)
    with pytest.raises(Unusable, match="uniform"):
        uneven.check(asked)


def test_a_taught_device_keeps_as_many_units_too(tasks, tmp_path):
    _, _, task = tasks["bert"]
    method = settings_of(MagnitudePruning, teacher=DenseTeacher())
    state, orders, _ = recorded(method, task, tmp_path / "lab")
    assert orders and {type(order) for order in orders} == {TaughtUniformOrder}
    assert is_even(method.deploy(state).structure)
    few = replace(method, structure="few_heads")
    _, orders, _ = recorded(few, task, tmp_path / "few")
    assert {type(order) for order in orders} == {TaughtFewHeadsOrder}


def test_a_run_says_which_structure_it_has(tmp_path, tiny_folder, monkeypatch, capsys):
    data = write_csv(tmp_path / "rows.csv")
    job = {"method__structure": "uniform", "method__sparsity": 0.4, "run__final_devices": 1}
    run = tmp_path / "run"
    carried_out("run", *tiny_job(tiny_folder("bert"), data, **job), "--out", run)
    code, shown, _ = in_process(monkeypatch, capsys, "show", run)
    assert code == 0 and "uniform" in shown and "4 of 4 heads" in shown
    found = json.loads((run / "summary.json").read_text())
    assert found["structure"] == "uniform" and found["heads_kept"] == [4, 4]
