"""What every message is checked for, and what a message without a check of its own gets."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedspine.core.checks import Asked, Terms, check_state, need, why_unusable
from fedspine.core.device import on_device
from fedspine.core.fleet import Cost, Diverged, Profile, Reply, capped, none_left, weights_of
from fedspine.core.message import Tensors, message
from fedspine.core.method import usable
from fedspine.core.schema import result_kind
from fedspine.fleets.checked import Checked

TERMS = Terms(base=None, classes=3, longest=16)
COST = Cost(bytes_down=1, bytes_up=1, flops=1.0, peak_memory_bytes=1, seconds=1.0)


@message
class Inner:
    values: torch.Tensor
    share: float

    def check(self, asked):
        need(self.share <= 1, f"share is {self.share}")


@message
class Plain:
    """A result as another package writes it: no check of its own."""

    adapter: Tensors
    mean: np.ndarray
    inside: tuple[Inner, ...]
    note: str | None
    loss: float
    examples: int


@message
class Hooked:
    """One that wants something else of the order's field."""

    adapter: Tensors
    examples: int

    def check(self, asked):
        need(len(self.adapter) == 1, "one tensor was expected")


@on_device
def plainly(device, order: Plain) -> Plain:
    return order


@on_device
def hooked(device, order: Plain) -> Hooked:
    return Hooked(adapter={}, examples=0)


@on_device
def anyhow(device, order):
    return order


def plain(**changes):
    given = {
        "adapter": {"a": torch.ones(2, 3).half(), "b": torch.zeros(4)},
        "mean": np.ones(3),
        "inside": (Inner(values=torch.ones(2), share=0.5),),
        "note": None,
        "loss": 1.0,
        "examples": 10,
    }
    return Plain(**given | changes)


ORDER = plain()
ASKED = Asked(TERMS, rows=10, order=ORDER)
A, B = ORDER.adapter.values()
WRONG = {
    "loss nan": ({"loss": math.nan}, "loss is nan"),
    "loss inf": ({"loss": math.inf}, "loss is inf"),
    "loss large": ({"loss": 1e308}, "loss is 1e+308, which counts as not finite"),
    "loss of many bits": ({"loss": 10**400}, "loss is a number of 1329 bits"),
    "loss true": ({"loss": True}, "expected Plain, got Plain with other fields or types"),
    "loss none": ({"loss": None}, "other fields or types"),
    "examples": ({"examples": 11}, "examples is 11, the device declared 10"),
    "no tensors": ({"adapter": {}}, "adapter has 0 tensors of other names; 2 were expected"),
    "other names": ({"adapter": {"a": A, "c": B}}, "adapter has 2 tensors of other names"),
    "other shape": ({"adapter": {"a": A[:1], "b": B}}, "(1, 3) where (2, 3) was expected"),
    "other type": ({"adapter": {"a": A.float(), "b": B}}, "float32 where torch.float16"),
    "one nan": ({"adapter": {"a": A * math.nan, "b": B}}, "an entry of adapter is not finite"),
    "too large": ({"adapter": {"a": A, "b": B + 1e6}}, "entry of adapter is 1e+06, which"),
    "other array": ({"mean": np.ones(2)}, "mean has a tensor of (2,) where (3,) was expected"),
    "nan inside": (
        {"inside": (Inner(values=torch.tensor([1, math.nan]), share=0.5),)},
        "an entry of inside.values is not finite",
    ),
    "its own check": ({"inside": (Inner(values=torch.ones(2), share=1.5),)}, "share is 1.5"),
}


def test_a_result_like_its_order_can_be_used():
    assert why_unusable(plain(), Plain, ASKED) is None
    assert why_unusable(plain(loss=-3.0, note="x", inside=()), Plain, ASKED) is None


@pytest.mark.parametrize("what", WRONG)
def test_a_result_without_a_check_is_like_its_order_in_fields_of_the_same_name(what):
    changes, words = WRONG[what]
    assert words in why_unusable(plain(**changes), Plain, ASKED)


def test_a_check_of_ones_own_takes_the_place_of_the_orders_shapes_and_no_more():
    def why(**changes):
        result = Hooked(**{"adapter": {"z": torch.ones(1)}, "examples": 3} | changes)
        return why_unusable(result, Hooked, ASKED)

    assert why() is None
    assert why(adapter={}) == "one tensor was expected"
    assert why(adapter={"z": torch.tensor([math.nan])}) == "an entry of adapter is not finite"
    assert why(adapter=1) == "its check failed with TypeError" or "fields or types" in why(
        adapter=1
    )


def test_names_that_a_device_made_up_are_not_repeated():
    evil = "\x1b[2J" * 50
    assert evil not in why_unusable(plain(adapter={evil: A * math.nan, "b": B}), Plain, ASKED)


def test_a_state_with_a_weight_that_is_not_finite_is_none():
    check_state({"a": (plain(), 3, math.nan)})  # numbers are the method's own
    with pytest.raises(Diverged, match="not finite"):
        check_state({"a": (plain(adapter={"a": A * math.inf}),)})


# --- around a fleet ---


class ScriptedFleet:
    """A fleet of devices that send given replies, or none."""

    def __init__(self, **values):
        self.values, self.notes, self.base = values, [], None
        self.devices = tuple(
            Profile(id=id, site=id, examples=10, memory_bytes=1) for id in sorted(values)
        )

    def ask(self, work, orders, *, within=math.inf):
        return [
            Reply(id, self.values[id], COST, orders[id])
            for id in orders
            if self.values[id] is not None
        ]

    def note(self, **values):
        self.notes.append(values)


def asked(scripted, work=plainly, **more):
    fleet = Checked(scripted, TERMS, **more)
    return fleet, fleet.ask(work, {device.id: ORDER for device in fleet.devices})


def test_what_cannot_be_used_is_noted_and_absent():
    scripted = ScriptedFleet(a=plain(), b=plain(loss=math.nan), c=None, d=plain(examples=10**9))
    fleet, replies = asked(scripted)
    assert [(reply.device, reply.order is ORDER) for reply in replies] == [("a", True)]
    assert fleet.unusable == {
        "b": "loss is nan",
        "d": "examples is 1000000000, the device declared 10",
    }
    assert [note["left_out"] for note in scripted.notes] == [
        f"cannot be used: {why}" for why in fleet.unusable.values()
    ]
    scripted.values["b"] = plain()
    assert [r.device for r in fleet.ask(plainly, {"b": ORDER})] == ["b"]
    assert set(fleet.unusable) == {"d"}  # of the last order alone


def test_fewer_usable_replies_than_the_quorum_stop_the_run():
    with pytest.raises(Exception, match="1 of 3 devices .* the quorum is 2"):
        asked(ScriptedFleet(a=plain(), b=Inner, c=plain(loss=math.nan)), quorum=2)
    _, replies = asked(ScriptedFleet(a=Inner, b=Inner), quorum=2)  # the method says why
    assert replies == []


def test_work_without_annotations_is_checked_for_its_numbers():
    assert [r.device for r in asked(ScriptedFleet(a=plain(), b=Inner), anyhow)[1]] == ["a"]


def test_a_type_that_only_type_checkers_know_is_not_compared():
    def odd(device, order) -> "Missing":  # noqa: F821
        return order

    assert result_kind(odd) is not None and why_unusable(3.0, result_kind(odd), ASKED) is None


# --- weights ---


def fleet_of(share=1.0, **rows):
    return SimpleNamespace(
        devices=[
            Profile(id=id, site=id, examples=n, memory_bytes=1, largest_share=share)
            for id, n in rows.items()
        ],
        unusable={},
    )


def test_weights_are_declared_rows_whatever_a_reply_says():
    fleet = fleet_of(a=10, b=30)
    replies = usable(
        [Reply("a", plain(examples=99), COST, ORDER), Reply("b", plain(), COST, ORDER)], fleet
    )
    assert [reply.weight for reply in replies] == [10, 30]
    # of a device of another cohort the fleet has said it beforehand
    late = usable([Reply("late", plain(), COST, ORDER, weight=7)], fleet)
    assert late[0].weight == 7


def test_one_site_of_several_counts_for_no_more_than_its_share():
    fleet = fleet_of(0.5, a=10, b=20, c=10**9)
    assert weights_of(fleet, "abc") == {"a": 10, "b": 20, "c": 30}
    assert weights_of(fleet, "ac") == {"a": 10, "c": 10**9}  # which of two is right is not known
    assert weights_of(fleet_of(a=10, b=20, c=10**9), "abc")["c"] == 10**9


@given(st.lists(st.integers(1, 2**31), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_no_share_is_above_the_largest_where_that_can_be(rows, share):
    weights = {str(i): n for i, n in enumerate(rows)}
    cut = capped(weights, share)
    assert cut.keys() == weights.keys()
    if len(rows) < 3:
        assert cut == weights
        return
    most = max(cut.values()) / sum(cut.values())
    # a sum of nine and a quotient, each rounded by 2^-53 at most
    assert most <= max(share, 1 / len(rows)) * (1 + 20 * 2**-53)
    if share >= max(rows) / sum(rows):
        assert cut == weights


def test_a_reply_that_is_not_finite_among_others_tells_of_divergence():
    assert type(none_left(2, ["loss is nan", "rank is 3, but 1 was expected"])) is Diverged
    assert type(none_left(2, ["rank is 3, but 1 was expected"])) is not Diverged


def test_one_order_may_be_checked_without_another():
    late = replace(ASKED, order=None)
    assert why_unusable(plain(adapter={}), Plain, late) is None
    assert why_unusable(plain(loss=math.nan), Plain, late) == "loss is nan"
