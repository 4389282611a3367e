"""Every method under every aggregation, with a device that sends the opposite of what it learnt."""

import math

import pytest
import torch
from attacks import flipped, on_changes
from toy import KINDS, TEST_ROWS, Spy, bits

from fedspine.core.aggregation import CHOICES, Median, MultiKrum, NormClip, TrimmedMean
from fedspine.lm.score import score
from fedspine.methods import all_methods
from fedspine.methods.fedadapter import TrialResult
from fedspine.pruning.head_start import ClassMeans

METHODS = all_methods()
ROBUST = [name for name, cls in METHODS.items() if cls.robust]
BOUNDING = [how for how in CHOICES if how != "mean"]
ROUNDS = 3  # of the task's five, enough to learn what it asks
BAD = "nx-02"  # one of five
# every method under one aggregation, in turn, and under all: one of factors, one of products, one
# of stacks and one of groups
CASES = sorted(
    {(name, BOUNDING[i % len(BOUNDING)]) for i, name in enumerate(ROBUST)}
    | {(name, how) for name in ("fedlora", "fedspine", "flora", "fedadapter") for how in BOUNDING}
)


def attacked(bench, change):
    """A wrapper of the fleet in which one device's change is another."""

    def attack(reply):
        if reply.device != BAD or isinstance(reply.value, ClassMeans | TrialResult):
            return reply
        return on_changes(reply, bench.task.base.layout, change)

    return lambda fleet: Spy(fleet, reply=attack)


def learnt(bench, method, state):
    """Whether the global model and the unpruned one know the task, by the marks of
    tests/conformance.
    """
    luck = 1 / 3 + 4 * math.sqrt(1 / 3 * 2 / 3 / TEST_ROWS)
    scores = [
        score(bench.task.base, model, bench.task.test)
        for model in (method.deploy(state), method.unpruned(state))
    ]
    return all(s.mean_loss < math.log(3) and s.accuracy > luck for s in scores)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_device_that_flips_its_change_does_not_keep_the_others_from_learning(name, how, lab):
    method = METHODS[name].toy()
    # as many in each group as the other methods have in all
    bench = lab(aggregation=CHOICES[how](), kinds=KINDS * method.groups)
    state = bench.run(method, rounds=ROUNDS, around=attacked(bench, flipped(10)))
    assert learnt(bench, method, state)
    bounded = {row["values"]["device"] for row in bench.rows("note") if "bounded" in row["values"]}
    assert (BAD in bounded) == (how in ("norm_clip", "multi_krum"))


@pytest.mark.parametrize("name", ["fedlora", "fedspine", "fedavg", "hetlora", "flora"])
def test_the_same_device_spoils_a_mean(name, lab):
    method, bench = METHODS[name].toy(), lab()
    state = bench.run(method, rounds=ROUNDS, around=attacked(bench, flipped(10)))
    assert not learnt(bench, method, state)


@pytest.mark.parametrize("how", BOUNDING)
@pytest.mark.parametrize("name", ["fedlora", "fedspine"])
def test_resumed_equals_uninterrupted(name, how, lab):
    method, how = METHODS[name].toy(), CHOICES[how]()
    first = lab("killed", aggregation=how)
    saved = first.run(method, rounds=1)
    first.save(saved)
    whole = bits(first.run(method, rounds=2, state=saved))  # which a kill now makes forgotten
    first.close()
    assert bits(lab("killed", aggregation=how).run(method, rounds=2)) == whole


@pytest.mark.parametrize(
    "name", ["hetlora", "flexlora", "fedspine", "legend", "pyramidfl", "flora"]
)
def test_bounds_that_nobody_reaches_change_no_bit(name, lab):
    method = METHODS[name].toy()
    plain, bounded = lab("plain"), lab("bounded", aggregation=NormClip(bound=100.0))
    assert bits(plain.run(method, rounds=2)) == bits(bounded.run(method, rounds=2))


@pytest.mark.parametrize(
    "how", [TrimmedMean(), Median(), MultiKrum(), NormClip()], ids=lambda how: how.name
)
def test_a_round_of_too_few_replies_changes_nothing_and_says_so(how, lab):
    method, bench = METHODS["fedlora"].toy(), lab(aggregation=how)
    first = bench.run(method, rounds=1)
    bench.fleet.begin_round(1)
    after = method.round(
        first,
        Spy(bench.fleet, reply=lambda reply: reply if reply.device == bench.ids[0] else None),
    )
    for before, now in ((first.adapter, after.adapter), (first.head, after.head)):
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert after.round == first.round + 1
    said = [
        row["values"]["not_merged"] for row in bench.rows("note") if "not_merged" in row["values"]
    ]
    assert len(said) == 1 and said[0].startswith(how.name)
