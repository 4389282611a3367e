"""The parts of a split round: each method that has them does with them what the others do."""

import dataclasses

import pytest
from toy import Spy, bits

from fedspine.control.split_parts import (
    Equal,
    Everyone,
    Genetic,
    LeastWaiting,
    RandomDevices,
    Regulated,
    WithinRound,
)
from fedspine.core.logit_adjustment import LabelSkew, Unadjusted
from fedspine.core.message import pack, unpack
from fedspine.core.parts import table_of
from fedspine.methods.adasfl import AdaSfl, AdaSflState
from fedspine.methods.mergesfl_plus import MergeSflPlus
from fedspine.methods.splitfed_v1 import SplitFedV1
from fedspine.methods.splitfed_v2 import SplitFedV2
from fedspine.methods.splitlora import SplitLora
from fedspine.split.averaging import LastRound, RoundsMean, running_mean
from fedspine.split.baseline import SplitState
from fedspine.split.composed import ComposedState
from fedspine.split.cut import split_model_of
from fedspine.split.joining import AtOnce, Late

UNEQUAL = ("tx2", "tx2", "tx2", "nx", "nx", "nx", "agx", "agx")
COMMON = {"cut": 1, "rank": 4, "steps": 3, "batch": 16, "learning_rate": 2e-2}
RIVALS = (SplitFedV1, SplitFedV2, SplitLora, AdaSfl)
OFF = {
    "selection": Everyone(),
    "batches": Equal(),
    "joining": AtOnce(),
    "logit_adjustment": Unadjusted(),
    "averaging": LastRound(),
    "client_lr_multiplier": 1.0,
}
ON = {
    "selection": LeastWaiting(fewest=4, most=6),
    "batches": WithinRound(),
    "joining": Late(),
    "logit_adjustment": LabelSkew(),
    "averaging": RoundsMean(),
    "client_lr_multiplier": 0.4,
}


def run(bench, method, rounds=2):
    """The state after some rounds, and a spy for each of them."""
    spies = []
    state = bench.run(
        method, rounds=rounds, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1]
    )
    return state, spies


def orders_of(spy, name):
    return {id: order for id, order in spy.orders if type(order).__name__ == name}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"selection": RandomDevices(fewest=2, most=3), "logit_adjustment": LabelSkew()},
        {"selection": Genetic(fewest=2, most=3), "batches": Regulated(), "averaging": RoundsMean()},
        ON,
    ],
    ids=["off", "random", "paper", "on"],
)
@pytest.mark.slow
def test_adasfl_with_parts_is_mergesfl_plus_with_them_and_copies(lab, parts):
    """Both ask the same of the same devices and make the same model, to the bit."""
    composed = COMMON | OFF | parts
    if parts is ON:
        composed |= {"steps": 8, "rank": 32}  # so that devices join late
    rival = AdaSfl(fewest=1.0, most=1.0, **composed)
    ours = MergeSflPlus(merging="copies", client_weights="uniform", **composed)
    (one, spies), (other, others) = run(lab("rival"), rival), run(lab("ours"), ours)
    assert bits(one.model) == bits(other.model)
    assert bits(rival.deploy(one)) == bits(ours.deploy(other))
    for spy, other in zip(spies, others, strict=True):
        assert [(id, pack(order).sha256) for id, order in spy.orders] == [
            (id, pack(order).sha256) for id, order in other.orders
        ]


@pytest.mark.parametrize("cls", RIVALS, ids=lambda cls: cls.name)
def test_without_parts_no_state_knows_of_them(cls, lab):
    state, spies = run(lab(), cls(**COMMON), rounds=1)
    assert type(state) is (AdaSflState if cls is AdaSfl else SplitState)
    assert not orders_of(spies[0], "LabelQuery")
    quiet = OFF.keys() - ({"batches"} if cls is AdaSfl else set())
    assert not quiet & table_of(cls()).keys()  # so that older recipes say the same


@pytest.mark.parametrize("cls", [SplitFedV2, SplitLora], ids=lambda cls: cls.name)
@pytest.mark.slow
def test_all_parts_together_in_a_rival(cls, lab):
    method = cls(**COMMON | ON | {"steps": 8, "rank": 32})
    bench = lab(kinds=UNEQUAL)
    method.check(bench.task)
    state, spies = run(bench, method)
    assert type(state) is ComposedState
    assert bits(unpack(pack(state))) == bits(state)
    assert len(orders_of(spies[0], "LabelQuery")) == len(UNEQUAL)
    assert not orders_of(spies[1], "LabelQuery")
    for spy in spies:
        assert 4 <= len(orders_of(spy, "Begin")) <= 6
        assert orders_of(spy, "Resized")
    assert state.fixed_seconds > 0
    assert bits(method.deploy(state)) == bits(state.mean) != bits(state.model)


@pytest.mark.slow
def test_the_mean_over_rounds_is_deployed_and_training_goes_on_from_the_last(lab):
    bench, method = lab("mean"), SplitFedV2(**COMMON, averaging=RoundsMean())
    first = bench.run(method, rounds=1)
    second = bench.run(method, rounds=2, state=first)
    split_model = split_model_of(bench.task.base, 1, rank=4)
    assert bits(method.deploy(first)) == bits(first.model)
    mean = running_mean(split_model, first.model, second.model, 2)
    assert bits(method.deploy(second)) == bits(mean)
    assert bits(second.model) == bits(lab("last").run(SplitFedV2(**COMMON), rounds=2).model)


@pytest.mark.slow
def test_late_joining_alone_needs_nothing_else(lab):
    """Devices whose first features come late are merged later, and the batches stay as they are."""
    method = SplitFedV2(**COMMON | {"steps": 8, "rank": 32}, joining=Late())
    bench = lab("late", kinds=UNEQUAL)
    _, (spy,) = run(bench, method, rounds=1)
    begun = orders_of(spy, "Begin")
    assert {order.batch for order in begun.values()} == {16}
    exchanges = [row["device"] for row in bench.rows("exchange")]
    counts = {exchanges.count(id) for id in begun}
    assert max(counts) == 9  # begin, seven steps, and the end
    assert min(counts) < 9
    together = lab("together", kinds=UNEQUAL)
    run(together, dataclasses.replace(method, joining=AtOnce()), rounds=1)
    assert bench.fleet.now < together.fleet.now


def test_regulated_batches_follow_the_speed_in_a_rival(lab):
    bench = lab(kinds=UNEQUAL)
    method = SplitFedV2(**COMMON, batches=Regulated(tune=False))
    state, (first, second) = run(bench, method)
    assert not orders_of(first, "LabelQuery")  # batches that are not tuned need no labels
    rows = {id: order.batch for id, order in orders_of(second, "Begin").items()}
    seconds = {id: worker.cost_seconds for id, worker in state.workers.items()}
    assert {order.batch for order in orders_of(first, "Begin").values()} == {16}
    assert rows[max(seconds, key=seconds.get)] < rows[min(seconds, key=seconds.get)] == 16


def test_devices_whose_labels_are_not_known_take_no_part(lab):
    """A label distribution that is lost leaves its device out, since its logits cannot be
    adjusted.
    """
    bench, spies = lab(), []
    gone = bench.ids[1]

    def losing(fleet):
        keep = lambda reply: (  # noqa: E731
            None
            if reply.device == gone and type(reply.value).__name__ == "LabelDistribution"
            else reply
        )
        return spies.append(Spy(fleet, reply=keep)) or spies[-1]

    bench.run(SplitFedV2(**COMMON, logit_adjustment=LabelSkew()), rounds=1, around=losing)
    assert orders_of(spies[0], "Begin").keys() == set(bench.ids) - {gone}
