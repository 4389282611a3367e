"""What a server makes of replies, by hand from scripted ones: whose rows count how much, against
what a change is taken.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from array_toy import array_task, bars

from fedspine.control.controllers import Fixed
from fedspine.control.plan import Plan
from fedspine.control.selection import Thinning
from fedspine.core.aggregation import Mean
from fedspine.core.fleet import Cost, Profile, Reply
from fedspine.core.server_optimiser import Server
from fedspine.lm.importance import Scores
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import Structure, cut_adapter
from fedspine.methods import all_methods
from fedspine.methods.fedavg import AverageResult
from fedspine.methods.fedlora import LoraResult
from fedspine.methods.hetlora import HetLoraOrder, HetLoraResult
from fedspine.methods.linear_probe import ProbeResult
from fedspine.methods.pyramidfl import PyramidResult
from fedspine.pruning.device import SpineResult, contribution

METHODS = all_methods()
COST = Cost(bytes_down=1, bytes_up=1, flops=1.0, peak_memory_bytes=1, seconds=1.0)
ROWS = {"one": 1, "three": 3}  # so that a mean over devices is not one over rows
# fp32 sums of a few numbers below 8: some eight roundings of 2^-24 of them
OFF = 8 * 8 * 2**-24


class ScriptedFleet:
    """A fleet whose devices send given replies, in the orders' order; then the `late` ones."""

    aggregation, server = Mean(), Server()

    def __init__(self, base, reply, names=tuple(ROWS), late=()):
        self.base, self.now, self._reply, self._late = base, 0.0, reply, list(late)
        self.devices = tuple(
            Profile(id=name, site="here", examples=ROWS[name], memory_bytes=2**40) for name in names
        )
        self.orders = {}

    unusable = ()

    def note(self, **values):
        pass

    def ask(self, work, orders):
        self.orders |= orders
        now = [Reply(id, self._reply(id, order), COST, order) for id, order in orders.items()]
        return now + self._late


def trained(method, task):
    """A state whose adapter and head are not those of a start: no factor B is zero."""
    state, rng = method.start(task, np.random.default_rng(0)), np.random.default_rng(1)
    state = getattr(state, "training", state)  # of prune_after

    def drawn(tensors):
        return {
            name: torch.from_numpy(rng.integers(-8, 9, tuple(tensor.shape)) / 8).float()
            for name, tensor in tensors.items()
        }

    head = drawn(state.head)
    if not hasattr(state, "adapter"):
        return replace(state, head=head)
    return replace(state, adapter=drawn(state.adapter), head=head)


def moved(tensors, by):
    return {name: tensor + by for name, tensor in tensors.items()}


def result_of(order, by, rows):
    """A reply in which all factors and the head are moved by a number that fp16 knows."""
    if not hasattr(order, "adapter"):
        return ProbeResult(head=moved(order.head, by), loss=1.0, examples=rows)
    both = {"adapter": moved(order.adapter, by), "head": moved(order.head, by)}
    if isinstance(order, HetLoraOrder):
        return HetLoraResult(**both, rank=order.rank, loss=1.0, examples=rows)
    if not hasattr(order, "structure"):
        return LoraResult(**both, loss=1.0, examples=rows)
    kept = order.structure
    ballot = Scores(heads=kept.heads.half(), channels=kept.channels.half())
    return SpineResult(
        **both,
        round=order.round,
        structure=order.structure,
        scores=ballot,
        loss=1.0,
        loss_before=None,
        examples=rows,
    )


BY = {"one": 0.25, "three": -0.5}
MEAN = (
    1 * 0.25 + 3 * -0.5
) / 4  # of the devices' moves, weighed by their rows; by devices it is -0.125


def reply(id, order):
    return result_of(order, BY[id], ROWS[id])


@pytest.mark.parametrize("name", ["fedlora", "loraprune", "magnitude"])
def test_factors_and_heads_are_weighed_by_rows(name, task):
    method = METHODS[name].toy()
    state = trained(method, task)
    after = method.round(state, ScriptedFleet(task.base, reply))
    for before, now in ((state.head, after.head), (state.adapter, after.adapter)):
        for key, tensor in before.items():
            assert torch.allclose(now[key], tensor + MEAN, rtol=0, atol=OFF), key


FIXED = {"sparsity": 0.0, "controller": Fixed(rank=8)}
PLAN = Plan(sparsity=0.0, rank=8, action=None, progress=0.0)


def spine():
    return replace(METHODS["fedspine"].toy(), **FIXED)


def test_changes_are_against_what_was_sent_and_weighed_by_rows(task):
    """An entry of a dense change moves by the mean over rows of B'A' - BA, with the BA that the
    device was sent.
    """
    method = spine()
    state, fleet = trained(method, task), ScriptedFleet(task.base, reply)
    after = method.round(state, fleet)
    for key, tensor in state.head.items():
        assert torch.allclose(after.head[key], tensor + MEAN, rtol=0, atol=OFF)
    for site in task.base.layout.sites:
        expected = torch.zeros(site.rows, site.columns, dtype=torch.float64)
        for id, rows in ROWS.items():
            a, b = (fleet.orders[id].adapter[n(site.path)].double() for n in (a_name, b_name))
            assert b.abs().max() > 0.1  # else what was sent would not matter
            expected += rows / 4 * ((b.half() + BY[id]).double() @ (a.half() + BY[id]).double())
            expected -= rows / 4 * (b @ a)
        moved_by = after.dense[site.path] - state.dense[site.path]
        # sums of 2 x 8 products of numbers below 4, in fp32
        assert torch.allclose(moved_by.double(), expected, rtol=0, atol=16 * 16 * 2**-24)


def test_a_contribution_is_against_the_order_cut_to_what_the_device_kept(task):
    method, layout = spine(), task.base.layout
    state = trained(method, task)
    order = method._order(state, "one", PLAN)
    heads, channels = order.structure.heads.clone(), order.structure.channels.clone()
    heads[0, 0], channels[:, :5] = False, False
    kept = Structure(heads=heads, channels=channels)
    cut = cut_adapter(order.adapter, layout.sites, kept)
    result = replace(result_of(order, 0.25, 3), structure=kept, adapter=moved(cut, 0.25))
    part = contribution(layout, Reply("one", result, COST, order, weight=3))
    assert part.weight == 3.0 and part.structure is kept
    assert max(tensor.abs().max() for name, tensor in part.sent.items() if "lora_B" in name) > 0.1
    for name, tensor in cut.items():
        assert torch.equal(part.sent[name], tensor.float())
        assert torch.equal(part.back[name], (tensor + 0.25).float())


# --- late replies ---

LATE = {
    "fedlora": {},
    "fed-hello": {"shares": (1.0,)},
    "fedquad": {"least_depth": 2},  # all blocks
    "hetlora": {"ranks": (8,), "weigh_by": "examples"},
    "legend": {"depth_rule": "fixed"},
    "linear_probe": {},
    "loraprune": {},
    "magnitude": {},
    "prune_after": {},
    "fedspine": FIXED | {"aggregation": "zeropad"},
    "fedspine-plus": FIXED | {"aggregation": "zeropad", "head_start": "random"},
}


def late_round(method, first, today, base, reply=reply):
    """The state after a round from `today` in which one device is asked, and another replies to the
    order of a round from `first`.
    """
    earlier = ScriptedFleet(base, reply)
    method.round(first, earlier)
    order = earlier.orders["three"]
    late = Reply("three", reply("three", order), COST, order, late=1, weight=ROWS["three"])
    return method.round(today, ScriptedFleet(base, reply, names=("one",), late=[late]))


@pytest.mark.parametrize("name", LATE)
def test_a_late_reply_counts_as_its_change_on_todays_weights(name, task):
    """It was trained from the weights of an earlier round, to which its device does not bring the
    server back.
    """
    method = replace(METHODS[name].toy(), **LATE[name])
    started = method.start(task, np.random.default_rng(0))
    nested = hasattr(started, "training")  # of prune_after
    first = trained(method, task)
    today = replace(first, round=1, head=moved(first.head, 2.0))
    if hasattr(first, "adapter"):
        today = replace(today, adapter=moved(first.adapter, 2.0))
    if nested:
        first, today = (replace(started, training=state) for state in (first, today))
    after = late_round(method, first, today, task.base)
    if nested:
        today, after = today.training, after.training
    # both changes on today's; what came late, as it came, would be 2 lower in three of four rows
    for key, tensor in today.head.items():
        assert torch.allclose(after.head[key], tensor + MEAN, rtol=0, atol=OFF), key
    for key, tensor in getattr(today, "adapter", {}).items():
        assert torch.allclose(after.adapter[key], tensor + MEAN, rtol=0, atol=OFF), key


def test_a_late_change_of_products_is_against_the_late_devices_own_order(task):
    """FedSpine counts changes anyway, so a late one counts as it would have in its own round."""
    method, first = spine(), trained(spine(), task)
    today = replace(first, round=1, adapter=moved(first.adapter, 0.5))
    sent = {"three": method._order(first, "three", PLAN), "one": method._order(today, "one", PLAN)}
    after = late_round(method, first, today, task.base)
    for site in task.base.layout.sites:
        expected = torch.zeros(site.rows, site.columns, dtype=torch.float64)
        for id, rows in ROWS.items():
            a, b = (sent[id].adapter[name(site.path)].double() for name in (a_name, b_name))
            expected += rows / 4 * ((b.half() + BY[id]).double() @ (a.half() + BY[id]).double())
            expected -= rows / 4 * (b @ a)
        moved_by = after.dense[site.path] - today.dense[site.path]
        # as above: sums of 2 x 8 products of numbers below 4, in fp32
        assert torch.allclose(moved_by.double(), expected, rtol=0, atol=16 * 16 * 2**-24)


@pytest.mark.parametrize("name", ["fedavg", "pyramidfl"])
def test_late_statistics_of_batch_norm_count_as_they_came(name):
    """The change of a variance, on a variance that has fallen since, could be negative."""
    net = array_task("vgg-small", make=bars, rounds=2, train=60, test=30)
    method = replace(METHODS[name].toy(), precision="fp32")
    if name == "pyramidfl":
        method = replace(method, slack=False, thinning=Thinning(least=0.0, most=0.0))
    first = method.start(net, np.random.default_rng(0))
    fallen, now = "block1.norm.running_var", "block1.norm.weight"
    then = dict(first.model.weights)
    weights = then | {fallen: then[fallen] - 0.6, now: then[now] + 2.0}
    today = replace(first, round=1, model=replace(first.model, weights=weights))

    def answer(id, order):
        end = order.weights | {
            fallen: torch.full_like(then[fallen], 0.3),
            now: order.weights[now] + BY[id],
        }
        if name == "fedavg":
            return AverageResult(weights=end, loss=1.0, examples=ROWS[id])
        update = {key: (end[key] - tensor).reshape(-1) for key, tensor in order.weights.items()}
        return PyramidResult(
            update=update, seed=0, loss=1.0, reward=1.0, norm=1.0, examples=ROWS[id]
        )

    after = late_round(method, first, today, net.base, answer).model.weights
    assert torch.allclose(after[fallen], torch.tensor(0.3), rtol=0, atol=OFF)
    assert torch.allclose(after[now], weights[now] + MEAN, rtol=0, atol=OFF)
