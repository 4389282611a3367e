"""What a server makes of replies, by hand from scripted ones: whose rows count how much, against
what a change is taken.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedspine.control.controllers import Fixed
from fedspine.control.plan import Plan
from fedspine.core.fleet import Cost, Idle, Profile, Reply
from fedspine.lm.importance import Scores
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import Structure, cut_adapter
from fedspine.methods import all_methods
from fedspine.methods.fedlora import LoraResult
from fedspine.methods.fedspine_plus import PlusState
from fedspine.pruning.device import SpineResult, contribution
from fedspine.pruning.semi_async import PendingOrder

METHODS = all_methods()
COST = Cost(bytes_down=1, bytes_up=1, flops=1.0, peak_memory_bytes=1, seconds=1.0)
ROWS = {"one": 1, "three": 3}  # so that a mean over devices is not one over rows
# fp32 sums of a few numbers below 8: some eight roundings of 2^-24 of them
OFF = 8 * 8 * 2**-24


class Told:
    """A fleet whose devices reply as told, in the order of `first`, then of the orders."""

    def __init__(self, base, reply, names=tuple(ROWS), first=()):
        self.base, self.now, self._reply, self._pending = base, 0.0, reply, list(first)
        self.devices = tuple(
            Profile(id=name, site="here", examples=ROWS[name], memory_bytes=2**40) for name in names
        )
        self.orders = {}

    def note(self, **values):
        pass

    def ask(self, work, orders):
        self.orders |= orders
        return [Reply(id, self._reply(id, order), COST) for id, order in orders.items()]

    def send(self, work, orders):
        self._pending += self.ask(work, orders)

    def next(self):
        if not self._pending:
            raise Idle("no reply is under way")
        return self._pending.pop(0)


def trained(method, task):
    """A state whose adapter and head are not those of a start: no factor B is zero."""
    state, rng = method.start(task, np.random.default_rng(0)), np.random.default_rng(1)

    def drawn(tensors):
        return {
            name: torch.from_numpy(rng.integers(-8, 9, tuple(tensor.shape)) / 8).float()
            for name, tensor in tensors.items()
        }

    return replace(state, adapter=drawn(state.adapter), head=drawn(state.head))


def moved(tensors, by):
    return {name: tensor + by for name, tensor in tensors.items()}


def result_of(order, by, rows):
    """A reply in which all factors and the head are moved by a number that fp16 knows."""
    both = {"adapter": moved(order.adapter, by), "head": moved(order.head, by)}
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
    after = method.round(state, Told(task.base, reply))
    for before, now in ((state.head, after.head), (state.adapter, after.adapter)):
        for key, tensor in before.items():
            assert torch.allclose(now[key], tensor + MEAN, rtol=0, atol=OFF), key


FIXED = {"sparsity": 0.0, "controller": Fixed(rank=8)}


def spine():
    return replace(METHODS["fedspine"].toy(), **FIXED)


def test_changes_are_against_what_was_sent_and_weighed_by_rows(task):
    """An entry of a dense change moves by the mean over rows of B'A' - BA, with the BA that the
    device was sent.
    """
    method = spine()
    state, fleet = trained(method, task), Told(task.base, reply)
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
    order = method._order(state, "one", Plan(sparsity=0.0, rank=8, action=None, progress=0.0))
    heads, channels = order.structure.heads.clone(), order.structure.channels.clone()
    heads[0, 0], channels[:, :5] = False, False
    kept = Structure(heads=heads, channels=channels)
    cut = cut_adapter(order.adapter, layout.sites, kept)
    result = replace(result_of(order, 0.25, 3), structure=kept, adapter=moved(cut, 0.25))
    part = contribution(layout, order, result)
    assert part.weight == 3.0 and part.structure is kept
    assert max(tensor.abs().max() for name, tensor in part.sent.items() if "lora_B" in name) > 0.1
    for name, tensor in cut.items():
        assert torch.equal(part.sent[name], tensor.float())
        assert torch.equal(part.back[name], (tensor + 0.25).float())


def test_a_late_head_counts_as_its_change_on_todays_head(task):
    """It was trained from the head of an earlier round, to which its device does not bring the
    server back.
    """
    method = replace(METHODS["fedspine-plus"].toy(), head_start="random", quorum=0.5, **FIXED)
    first = trained(spine(), task)
    order = method._order(first, "three", Plan(sparsity=0.0, rank=8, action=None, progress=0.0))
    late = {"three": PendingOrder(order=order, rank=8)}
    today = replace(first, round=1, head=moved(first.head, 2.0))
    came = Reply("three", result_of(order, BY["three"], ROWS["three"]), COST)
    fleet = Told(task.base, reply, names=("one",), first=[came])
    after = method.round(PlusState(spine=today, pending=late), fleet)
    assert not after.pending
    for name, tensor in today.head.items():
        # both changes on today's head; the late head as it came would be 2 lower in three of four
        # rows
        assert torch.allclose(after.spine.head[name], tensor + MEAN, rtol=0, atol=OFF)
