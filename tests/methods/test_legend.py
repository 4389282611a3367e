"""LEGEND: depth that makes training cheaper, blocks averaged over those who trained them, and times
that come as foreseen.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, toy_task

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import NoMemory
from fedspine.core.message import pack
from fedspine.lm.cost import Extent, adapter_width, training_flops, training_memory_bytes
from fedspine.lm.load import load
from fedspine.lm.lora import a_name, b_name, on_blocks
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny
from fedspine.lm.tuning import tuning_at
from fedspine.methods.fedlora import FedLora
from fedspine.methods.legend import DepthOrder, Legend, tune_top

LAYERS = 4
TOY = replace(Legend.toy(), rank=4, rank_difference=1.0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The toy task on a tiny BERT of four blocks."""
    folder = write_tiny(tmp_path_factory.mktemp("deep") / "bert", "bert", layers=LAYERS)
    base, tokenizer = load(str(folder), kind="classification", classes=3)
    return toy_task(base, tokenizer, rounds=8)


@pytest.fixture
def bench(deep, tmp_path):
    built = []

    def make(name="lab", **settings):
        built.append(Lab(deep, tmp_path / name, **settings))
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


def order_of(task, method, depth):
    state = method.start(task, np.random.default_rng(0))
    return method._order(replace(state, turns=0.0), depth)


def test_at_full_depth_and_one_rank_it_is_fedlora(bench, deep):
    shared = {name: getattr(TOY, name) for name in ("rank", "steps", "batch", "learning_rate")}
    shared |= {"head_lr_multiplier": 1.0}
    ours = bench("ours").run(
        Legend(depth_rule="fixed", rank_difference=0.0, least_depth=1, **shared), rounds=2
    )
    theirs = bench("theirs").run(FedLora(**shared), rounds=2)
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


@pytest.mark.parametrize("skip_inactive", [True, False])
def test_only_the_upper_blocks_are_trained_and_sent(deep, skip_inactive):
    order = order_of(deep, replace(TOY, skip_inactive=skip_inactive), depth=2)
    upper = {name for site in deep.base.layout.sites if site.layer >= 2 for name in names(site)}
    every = {name for site in deep.base.layout.sites for name in names(site)}
    assert set(order.adapter) == (upper if skip_inactive else every)
    result = tune_top(device_of(deep), order)
    assert set(result.adapter) == upper
    changed = [name for name in upper if not torch.equal(result.adapter[name], order.adapter[name])]
    assert set(changed) == upper


def names(site):
    return a_name(site.path), b_name(site.path)


@pytest.mark.parametrize("skip_inactive", [True, False])
def test_nothing_is_propagated_back_below_the_lowest_trained_block(
    deep, skip_inactive, monkeypatch
):
    """Neither a gradient of a frozen adapter nor one of the hidden states under it exists."""
    reached = []
    from fedspine.lm import lora

    backward = lora._Adapted.backward

    def counted(ctx, grad):
        reached.append(ctx.needs_input_grad[0])
        return backward(ctx, grad)

    monkeypatch.setattr(lora._Adapted, "backward", staticmethod(counted))
    steps = 2
    order = order_of(deep, replace(TOY, skip_inactive=skip_inactive, steps=steps), depth=1)
    tune_top(device_of(deep), order)
    sites = sum(site.layer == LAYERS - 1 for site in deep.base.layout.sites)
    assert len(reached) == steps * sites
    # what enters the block needs no gradient: of its layers, query, key and value read just that
    assert reached.count(False) == steps * 3


def test_adapters_that_are_not_trained_take_part_in_the_exact_option(deep):
    order = order_of(deep, replace(TOY, skip_inactive=False), depth=1)
    moved = {
        name: torch.ones_like(tensor) if name.endswith("lora_B") else tensor
        for name, tensor in order.adapter.items()
    }
    below = on_blocks(deep.base.layout, order.adapter, LAYERS - 1)
    exact = tune_top(device_of(deep), replace(order, adapter=moved | below))
    without = tune_top(device_of(deep), replace(order, adapter=below))
    assert exact.loss != without.loss


def test_blocks_that_nobody_trained_stay(bench):
    method = replace(TOY, depth_rule="fixed", depth=1)
    lab = bench()
    before = method.start(lab.task, np.random.default_rng([0, 1]))
    after = lab.run(method, rounds=2)
    for site in lab.task.base.layout.sites:
        same = [torch.equal(before.adapter[name], after.adapter[name]) for name in names(site)]
        assert same == [site.layer < LAYERS - 1] * 2


def test_a_block_is_the_mean_over_those_who_trained_it(bench):
    spies = []
    lab = bench()
    method = replace(TOY, probe_batches=0)
    state = lab.run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    results = [value for _, value in spies[0].results]
    assert len({len(value.adapter) for value in results}) > 1  # depths differ
    for site in lab.task.base.layout.sites:
        for name in names(site):
            trained = [value for value in results if name in value.adapter]
            rows = sum(value.examples for value in trained)
            mean = sum(value.examples * value.adapter[name].float() for value in trained) / rows
            torch.testing.assert_close(state.adapter[name], mean)


def paced(fleet):
    """A fleet whose exchanges last as long as their operations and bytes say, the slower a device's
    place, the longer.
    """
    places = {device.id: 1 + place for place, device in enumerate(fleet.devices)}

    def timed(reply):
        cost = reply.cost
        computing = places[reply.device] * cost.flops / 1e6
        seconds = computing + (cost.bytes_up + cost.bytes_down) / 1e4
        return replace(reply, cost=replace(cost, seconds=seconds, compute_seconds=computing))

    return Spy(fleet, reply=timed)


@pytest.fixture(scope="module")
def paced_run(deep, tmp_path_factory):
    """The fleet of a run in such a fleet, and its last state."""
    lab = Lab(deep, tmp_path_factory.mktemp("paced"))
    yield lab, lab.run(TOY, around=paced)
    lab.close()


def test_rounds_last_as_foreseen(paced_run):
    lab, _ = paced_run
    notes = [row["values"] | row for row in lab.rows("note") if row["round"] >= 5]
    later = [row for row in notes if "expected_seconds" in row]
    assert len(later) == 3 * len(lab.ids)
    off = [abs(row["expected_seconds"] / row["seconds"] - 1) for row in later]
    assert np.median(off) < 0.1  # what the method aims at: within 10 % of the round's time
    rounds = [row for row in notes if "expected_round_seconds" in row]
    longest = [max(r["seconds"] for r in later if r["round"] == each["round"]) for each in rounds]
    assert len(rounds) == 3
    assert [each["expected_round_seconds"] for each in rounds] == pytest.approx(longest, rel=0.1)


def test_slow_devices_train_fewer_blocks(paced_run):
    lab, state = paced_run
    by_place = [state.depths[id] for id in lab.ids]
    assert by_place == sorted(by_place, reverse=True)
    assert by_place[0] == LAYERS > by_place[-1]


def test_cost_is_of_what_is_trained(deep):
    """Operations and memory by the formulas of `lm/cost.py`, with each block's own rank."""
    layout, order = deep.base.layout, order_of(deep, TOY, depth=2)
    ranks = TOY._ranks(LAYERS)
    assert len(set(ranks)) > 1
    less = device_of(deep)
    tune_top(less, order)
    upper = {site.layer: 0 for site in layout.sites if site.layer >= 2}
    for site in layout.sites:
        if site.layer >= 2:
            upper[site.layer] += site.rows + site.columns
    assert adapter_width(layout, full(layout), 2) == sum(upper.values())
    # the extent from what one rank for all would be charged: the adapter's operations differ alone
    one = training_flops(layout, full(layout), 1, Extent(1, 0), 2)
    none = training_flops(layout, full(layout), 0, Extent(1, 0), 2)
    assert one - none == 6 * sum(upper.values())
    assert training_flops(layout, full(layout), ranks, Extent(1, 0), 2) - none == 6 * sum(
        ranks[layer] * width for layer, width in upper.items()
    )
    whole = device_of(deep)
    tune_top(whole, order_of(deep, TOY, depth=LAYERS))
    assert less.flops < whole.flops
    assert less.peak_memory_bytes < whole.peak_memory_bytes


def test_memory_bounds_the_depth(deep, bench):
    layout = deep.base.layout
    needed = [
        training_memory_bytes(
            layout,
            full(layout),
            rank=TOY._ranks(LAYERS),
            embeddings=deep.base.embeddings,
            batch=TOY.batch,
            tokens=deep.max_tokens,
            first=LAYERS - depth,
        )
        for depth in range(1, LAYERS + 1)
    ]

    class Small(Spy):
        @property
        def devices(self):
            first, second, *others = self._fleet.devices
            return (
                replace(first, memory_bytes=int(needed[1] / 0.8) + 1),
                replace(second, memory_bytes=int(needed[0] / 0.8) - 8),
                *others,
            )

    lab = bench()
    state = lab.run(TOY, rounds=3, around=Small)
    first, second, *_ = lab.ids
    assert state.depths[first] <= 2
    assert second not in state.depths
    notes = [row["values"] for row in lab.rows("note")]
    assert {row["left_out"] for row in notes if row.get("device") == second} == {
        "no depth fits its memory"
    }

    class None_(Small):
        @property
        def devices(self):
            return tuple(replace(each, memory_bytes=1) for each in self._fleet.devices)

    with pytest.raises(NoMemory, match="even one block"):
        bench("none").run(TOY, rounds=1, around=None_)


def test_own_ranks_save_traffic_of_slow_links(bench):
    spies = []
    common, own = (
        bench(mode).run(
            replace(TOY, rank_mode=mode, rank=8),
            rounds=3,
            around=lambda fleet: spies.append(Spy(fleet)) or spies[-1],
        )
        for mode in ("global", "per_device")
    )
    assert bits(common) != bits(own)
    most = Legend._ranks(replace(TOY, rank=8), LAYERS)
    for _, order in spies[-1].orders:
        assert isinstance(order, DepthOrder)
        for name, tensor in order.adapter.items():
            rank = tensor.shape[0 if name.endswith("lora_A") else 1]
            assert 1 <= rank <= most[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_difference": 4.0}, "at least 1, lower it to 2, or raise method.rank"),
        ({"depth": 1}, 'method.depth_rule is "barrier-floor".* set method.depth_rule to "fixed"'),
        ({"least_depth": 5}, "1 to 4 blocks"),
        ({"depth": 9}, "0 to 4 blocks"),
        ({"rank": 0}, "method.rank"),
        ({"rank": 10**6}, "method.rank"),
        ({"coverage": 1.5}, "method.coverage"),
        ({"rank_worth": 1.5, "rank_mode": "per_device"}, "method.rank_worth"),
        ({"rank_worth": 0.3}, "leave it out, or set method.rank_mode to per_device"),
        ({"probe_batches": -1}, "cannot be negative"),
    ],
)
def test_what_cannot_work_is_refused(deep, change, said):
    with pytest.raises(BadInput, match=said) as error:
        replace(TOY, **change).check(deep)
    assert "\n" not in str(error.value)


def test_probes_move_no_weight(bench):
    """Devices are distinguished before the first round; what they trained then is thrown away."""
    spies = []
    lab = bench()
    lab.run(TOY, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    steps = [order.tuning.steps for _, order in spies[0].orders]
    devices = len(lab.ids)
    assert steps == [2] * 2 * devices + [TOY.steps] * devices
    start = TOY.start(lab.task, np.random.default_rng([0, 1]))
    for _, order in spies[0].orders:
        for name, tensor in order.adapter.items():
            assert torch.equal(tensor, start.adapter[name].half())


def test_an_order_of_less_depth_is_smaller(deep):
    sizes = [pack(order_of(deep, TOY, depth)).bytes for depth in range(1, LAYERS + 1)]
    assert sizes == sorted(sizes)
    assert tuning_at(TOY, 0, 8).steps == TOY.steps
