"""LEGEND's depth and FedSpine's pruning in one run: depth decides which blocks train, pruning what
all blocks keep.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, reached, toy_task

from fedspine.control.depth import Lcd
from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.errors import BadInput
from fedspine.core.message import pack
from fedspine.lm.distillation import DenseTeacher
from fedspine.lm.importance_sources import Activation, Gradient, Magnitude
from fedspine.lm.load import load
from fedspine.lm.lora import a_name, b_name, on_blocks
from fedspine.lm.structure import sparsity
from fedspine.lm.tiny import write_tiny
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.pruning.device import DepthSpineOrder, SpineResult
from fedspine.runs.config import Recipe

LAYERS = 3
TOY = replace(
    FedSpinePlus.toy(), steps=2, batch=8, head_start="random", importance=Activation(), ranks=(4,)
)
TOP = replace(TOY, depths=Lcd(rule="fixed", fixed=1))
SPREAD = replace(TOY, depths=Lcd(least=1))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The toy task on a tiny BERT of three blocks."""
    folder = write_tiny(tmp_path_factory.mktemp("deep") / "bert", "bert", layers=LAYERS)
    return toy_task(*load(str(folder), kind="classification", classes=3), rounds=4)


@pytest.fixture
def bench(deep, tmp_path):
    built = []

    def make(name="lab", **settings):
        built.append(Lab(deep, tmp_path / name, **{"kinds": ("tx2", "agx")} | settings))
        return built[-1]

    yield make
    for each in built:
        each.close()


def names(site):
    return a_name(site.path), b_name(site.path)


def test_at_full_depth_it_is_fedspine_plus(bench):
    plain = bench("plain").run(TOY, rounds=3)
    deep = bench("deep").run(replace(TOY, depths=Lcd(rule="fixed")), rounds=3)
    assert any(sparsity(plain.layout, each) > 0 for each in plain.structures.values())
    for name in ("adapter", "head", "structures", "scores"):
        assert bits(getattr(plain, name)) == bits(getattr(deep, name)), name


def test_the_upper_block_trains_and_all_blocks_are_pruned(bench, deep):
    spies, lab, whole = [], bench("top"), bench("whole")
    start = TOP.start(deep, np.random.default_rng([0, 1]))
    state = lab.run(TOP, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    whole.run(TOY)
    top = on_blocks(deep.base.layout, start.adapter, LAYERS - 1).keys()
    for site in deep.base.layout.sites:
        for name in names(site):
            same = torch.equal(state.adapter[name], start.adapter[name])
            assert same == (site.layer < LAYERS - 1), name
    assert all(value.adapter.keys() == top for spy in spies for _, value in spy.results)
    for structure in state.structures.values():
        assert sparsity(state.layout, structure) == pytest.approx(reached(state.layout, 0.5))
        dropped = (~structure.heads).sum(1) + (~structure.channels).sum(1)
        assert bool((dropped > 0).all())  # in every block, also in those that nobody trained
    ours, theirs = ({key: sum(row[key] for row in each.rows("exchange"))
                     for key in ("flops", "bytes_up", "bytes_down")}
                    for each in (lab, whole))  # fmt: skip
    # half of the adapter stays away; the head and the names, which remain, are less than a third
    assert ours["flops"] < theirs["flops"] and ours["bytes_up"] < 0.7 * theirs["bytes_up"]
    peak = [max(row["peak_memory_bytes"] for row in each.rows("exchange")) for each in (lab, whole)]
    assert peak[0] < peak[1]


def test_a_block_is_the_mean_over_those_who_trained_it(bench, deep):
    """In the first round depths are spread, and nothing is pruned yet."""
    spies, lab = [], bench(kinds=("tx2", "nx", "agx"))
    state = lab.run(SPREAD, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    assert sorted(order.lowest for _, order in spies[0].orders) == [0, 1, 2]
    assert state.depths == {id: LAYERS - order.lowest for id, order in spies[0].orders}
    results = [value for _, value in spies[0].results]
    for site in deep.base.layout.sites:
        for name in names(site):
            trained = [value for value in results if name in value.adapter]
            assert len(trained) == site.layer + 1
            rows = sum(value.examples for value in trained)
            mean = sum(value.examples * value.adapter[name].float() for value in trained) / rows
            torch.testing.assert_close(state.adapter[name], mean)


def test_resumed_equals_uninterrupted_and_depths_follow_times(bench):
    whole = bits(bench("whole").run(SPREAD, rounds=3))
    first = bench("killed")
    first.save(first.run(SPREAD, rounds=1))
    first.close()
    second = bench("killed")
    state = second.run(SPREAD, rounds=3)
    assert bits(state) == whole
    assert state.times.keys() == state.depths.keys() == set(second.ids)


def test_orders_and_results_of_another_depth_are_refused(bench, deep):
    spies, lab = [], bench()
    lab.run(TOP, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    (_, order), (_, result) = spies[0].orders[0], spies[0].results[0]
    asked = Asked(Terms.of(deep), rows=result.examples)
    assert why_unusable(order, DepthSpineOrder, asked) is None
    assert why_unusable(replace(order, lowest=LAYERS), DepthSpineOrder, asked)
    by_gradients = replace(order, scoring=Gradient().order)
    assert "gradients" in why_unusable(by_gradients, DepthSpineOrder, asked)
    answered = replace(asked, order=order)
    assert why_unusable(result, SpineResult, answered) is None
    assert why_unusable(replace(result, adapter=order.adapter), SpineResult, answered)
    other = replace(answered, order=replace(order, lowest=0))
    assert why_unusable(result, SpineResult, other)
    assert pack(result).bytes < pack(replace(result, adapter=order.adapter)).bytes


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"importance": FedSpinePlus().importance}, "importance is blend, which does not go"),
        (
            {"aggregation": "delta-product"},
            "aggregation is delta-product, .* choose one of zeropad",
        ),
        ({"teacher": DenseTeacher()}, "teacher is dense"),
        ({"structure": "uniform", "sparsity": 0.4}, "structure is uniform"),
        ({"depths": Lcd(least=4)}, "method.depths.least is 4, but 1 to 3"),
        ({"depths": Lcd(fixed=-1)}, "method.depths.fixed is -1"),
        ({"depths": Lcd(fixed=2)}, 'method.depths.rule is "barrier-floor"'),
        ({"depths": Lcd(coverage=2.0)}, "method.depths.coverage is 2.0"),
    ],
)
def test_what_cannot_go_together_is_refused(deep, settings, complaint):
    with pytest.raises(BadInput, match=complaint) as error:
        replace(SPREAD, **settings).check(deep)
    assert "\n" not in str(error.value)


def test_a_recipe_states_depths_only_where_they_are_set():
    assert "depths" not in Recipe(method=FedSpinePlus()).table()["method"]
    method = FedSpinePlus(depths=Lcd(least=1), importance=Magnitude())
    table = Recipe(method=method).table()["method"]
    assert table["depths"] == {"name": "lcd", "rule": "barrier-floor", "fixed": 0, "least": 1,
                               "coverage": 0.1, "discount": 0.8}  # fmt: skip
    assert Recipe(method=table).method == method
