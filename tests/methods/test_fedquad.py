"""FedQuad: quantised activations buy depth where memory is short."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, toy_task

from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import NoMemory
from fedspine.execution.together import _kind
from fedspine.lm.cost import QUANTISING, Extent, quantising_flops
from fedspine.lm.load import load
from fedspine.lm.request import Request
from fedspine.lm.score import score
from fedspine.lm.stored import Quantised
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny
from fedspine.methods.fedquad import FedQuad, QuadOrder, tune_quantised
from fedspine.methods.legend import Legend

LAYERS = 3
TOY = replace(FedQuad.toy(), steps=2, batch=8)


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


def device_of(task):
    return Device(
        id="d",
        data=task.train.take(np.arange(40)),
        base=task.base,
        rng=np.random.default_rng(0),
        memory={},
    )


def order_of(task, depth, quantised, **more):
    return replace(TOY, **more)._order(TOY.start(task, np.random.default_rng(0)), depth, quantised)


def test_without_quantising_it_is_legend_at_one_rank(bench):
    shared = {name: getattr(TOY, name) for name in ("rank", "steps", "batch", "learning_rate")}
    shared |= {"head_lr_multiplier": 1.0, "least_depth": 1}
    ours = bench("ours").run(FedQuad(**shared), rounds=3)
    theirs = bench("theirs").run(Legend(rank_difference=0.0, probe_batches=0, **shared), rounds=3)
    assert ours.depths == theirs.depths
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


def test_all_blocks_at_four_bits_learn_and_repeat(lab, task):
    """The bound is that of test_every_method.py: four standard errors above a third."""
    method = replace(FedQuad.toy(), quantise="all")
    bench = lab(kinds=("tx2", "agx"))
    state = bench.run(method)
    assert score(task.base, method.deploy(state), task.test).accuracy > 1 / 3 + 4 * 0.05
    first, again = (lab(name, kinds=("agx",)).run(method, rounds=1) for name in ("a", "b"))
    assert bits(first) == bits(again)


def test_quantising_buys_depth(bench, deep):
    """Memory for two blocks, or for three of which one or more are quantised."""
    state = TOY.start(deep, np.random.default_rng([0, 1]))
    sizes = (state.layout, state.embeddings, state.max_tokens)
    needed = {(k, q): TOY._training_bytes(*sizes, k, q) for k in range(1, 4) for q in range(k + 1)}
    assert needed[2, 0] < needed[3, 1] < needed[3, 0]
    assert needed[3, 3] <= needed[3, 2] < needed[3, 1]

    def limited(room):
        class Small(Spy):
            @property
            def devices(self):
                memory = int(room / 0.8) + 1
                return tuple(replace(each, memory_bytes=memory) for each in self._fleet.devices)

        return Small

    lab = bench()
    for room, expected in (
        (needed[3, 0], (0, 0, 0)),
        (needed[3, 1], (0, 0, 1)),
        (needed[3, 2], (0, 0 if needed[2, 0] <= needed[3, 2] else 1, 2)),
        (needed[1, 0], (0,) if needed[2, 2] > needed[1, 0] else None),
    ):
        hosted = TOY._quantised_by_depth(state, limited(room)(lab.fleet))
        assert set(hosted.values()) == {expected}
        never = replace(TOY, quantise="never")._quantised_by_depth(state, limited(room)(lab.fleet))
        assert {len(each) for each in never.values()} == {
            sum(needed[k, 0] <= room for k in (1, 2, 3))
        }

    spies = []
    around = lambda fleet: spies.append(limited(needed[3, 1])(fleet)) or spies[-1]  # noqa: E731
    after = lab.run(replace(TOY, least_depth=3), rounds=1, around=around)
    assert set(after.depths.values()) == {3}
    assert [order.quantised for _, order in spies[0].orders] == [1, 1]
    for row in lab.rows("exchange"):  # what is charged is what was planned with
        assert row["peak_memory_bytes"] <= needed[3, 1]
    with pytest.raises(NoMemory, match="even one block"):
        bench("none").run(TOY, rounds=1, around=limited(1))


def test_cost_is_of_what_is_kept(deep):
    spent = {}
    for quantised in (0, 2):
        device = device_of(deep)
        result = tune_quantised(device, order_of(deep, 2, quantised))
        spent[quantised] = (device, result)
    plain, less = spent[0][0], spent[2][0]
    assert less.peak_memory_bytes < plain.peak_memory_bytes
    layout = deep.base.layout
    one = quantising_flops(layout, full(layout), Extent(1, 0), 2)
    tokens, rest = divmod(less.flops - plain.flops, one)
    assert tokens >= 2 * 8 and rest < less.flops  # steps times rows, of several tokens each
    # the shortest sums that make a number which is kept, those of attention, are as long as a head
    # is wide, 8 products; training takes thrice as many operations
    assert less.flops - plain.flops < QUANTISING / (3 * 2 * 8) * plain.flops
    results = [spent[quantised][1] for quantised in (0, 2)]
    assert results[0].adapter.keys() == results[1].adapter.keys()
    assert not all(
        torch.equal(tensor, results[1].adapter[name]) for name, tensor in results[0].adapter.items()
    )


def test_devices_that_quantise_are_trained_one_by_one(deep):
    """Groups of numbers would be others beside other devices' rows."""
    order = order_of(deep, 2, 2)
    model = TOY.deploy(TOY.start(deep, np.random.default_rng(0)))
    how = Quantised((1, 2), 4)
    one, other = (Request(device_of(deep), model, order.tuning, quantised=how) for _ in range(2))
    assert _kind(one) != _kind(other)
    plain = [replace(each, quantised=None) for each in (one, other)]
    assert _kind(plain[0]) == _kind(plain[1])


def test_a_changed_base_is_part_of_what_must_be_equal(deep):
    model = TOY.deploy(TOY.start(deep, np.random.default_rng(0)))
    path = f"{deep.base.layout.sites[0].path}.weight"
    changes = [{path: torch.full((32, 32), value)} for value in (1.0, 1.0, 2.0)]
    kinds = [
        _kind(Request(device_of(deep), model, order_of(deep, 1, 0).tuning, change=change))
        for change in changes
    ]
    assert kinds[0] == kinds[1] != kinds[2]


@pytest.mark.parametrize(
    "wrong", [{"quantised": 3}, {"quantised": -1}, {"bits": 2}, {"bits": 16}, {"lowest": 3}]
)
def test_orders_that_cannot_be_are_refused(deep, wrong):
    order = order_of(deep, 2, 2)
    asked = Asked(Terms.of(deep), rows=40)
    assert why_unusable(order, QuadOrder, asked) is None
    assert why_unusable(replace(order, **wrong), QuadOrder, asked)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"least_depth": 4}, "1 to 3 blocks"),
        ({"least_depth": 0}, "1 to 3 blocks"),
        ({"rank": 64}, "method.rank"),
        ({"bits": 3}, "method.bits is 3"),
        ({"coverage": 2.0}, "method.coverage"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(deep, settings, complaint):
    with pytest.raises(BadInput, match=complaint) as error:
        replace(TOY, **settings).check(deep)
    assert "\n" not in str(error.value)
