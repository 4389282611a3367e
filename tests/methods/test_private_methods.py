"""Runs that promise privacy: what leaves the devices, and what is counted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from toy import Spy, Unlucky, bits

from fedspine.core.device import Call, keeps, name_of, serve
from fedspine.core.fleet import AllLost
from fedspine.core.message import pack
from fedspine.core.privacy import Privacy
from fedspine.lm.score import score
from fedspine.methods import all_methods
from fedspine.pruning.head_start import MeansOrder, class_means

METHODS = {name: cls for name, cls in all_methods().items() if cls.privacy}
SOME = 3
ROWS = Privacy(level="rows", epsilon=8.0, delta=1e-3, clip=1.0, answers=SOME)
PROMISES = {"rows": ROWS, "devices": replace(ROWS, level="devices")}
BARE = {"loss", "examples"}  # what results hold besides tensors that were clipped and noised

every = pytest.mark.parametrize("name", sorted(METHODS))
levels = pytest.mark.parametrize("level", ["rows", "devices"])


def test_methods_that_keep_privacy_are_those_of_which_no_more_leaves():
    assert set(METHODS) == {"fedlora", "ffa-lora", "linear_probe"}


@every
@levels
def test_nothing_else_leaves_a_device(name, level, lab):
    method, spies = METHODS[name].toy(), []
    assert level in method.privacy
    bench = lab(privacy=PROMISES[level])
    bench.run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    rows = {profile.id: profile.examples for profile in bench.fleet.devices}
    assert len(spies[0].results) == len(rows)
    for device, result in spies[0].results:
        sent = dict(spies[0].orders)[device]
        tensors = {key for key, value in vars(result).items() if isinstance(value, dict)}
        assert set(vars(result)) == tensors | BARE
        assert result.loss is None and result.examples == rows[device]
        for key in tensors:  # as many numbers as were sent down, all of them changed by noise
            before, after = getattr(sent, key), getattr(result, key)
            assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
            for n, tensor in after.items():
                # noise below half an fp16 spacing is lost to rounding, in a few entries
                assert float((tensor != before[n]).float().mean()) > 0.5


@every
def test_learns_on_rows_without_noise(name, lab, task):
    """Clipping and sampling alone do not keep a method from learning the toy task."""
    method = METHODS[name].toy()
    state = lab(privacy=replace(ROWS, epsilon=None)).run(method)
    assert score(task.base, method.deploy(state), task.test).mean_loss < math.log(3)


@pytest.mark.parametrize(
    ("name", "level"), [*((name, "rows") for name in sorted(METHODS)), ("fedlora", "devices")]
)
def test_resumed_and_spread_over_workers_equals_uninterrupted(name, level, lab):
    method, privacy = METHODS[name].toy(), PROMISES[level]
    whole = lab("whole", privacy=privacy)
    wanted = bits(whole.run(method, rounds=SOME))
    first = lab("killed", privacy=privacy, workers=2)
    first.save(first.run(method, rounds=1))
    first.run(method, rounds=2)  # a round that was never saved, whose spending must be forgotten
    first.close()
    second = lab("killed", privacy=privacy, workers=2)
    assert bits(second.run(method, rounds=SOME)) == wanted
    assert epsilons(second) == epsilons(whole)


def epsilons(bench):
    return {row["device"]: row["epsilon"] for row in bench.rows("exchange")}


@every
def test_what_is_spent_is_recorded_and_within_the_budget(name, lab):
    bench = lab(privacy=ROWS)
    bench.run(METHODS[name].toy(), rounds=SOME)
    by_device = {}
    for row in bench.rows("exchange"):
        by_device.setdefault(row["device"], []).append(row["epsilon"])
    for spent in by_device.values():
        assert len(spent) == SOME and spent == sorted(spent)
        assert 0 < spent[0] < spent[-1] <= 8.0
        # the noise is no more than the budget needs: multipliers are multiples of 1e-4, and epsilon
        # changes a few times as much as they do
        assert spent[-1] > 8.0 * (1 - 1e-3)


@levels
def test_a_device_whose_budget_is_spent_is_left_out(level, lab):
    """One device was asked twice as often; the round goes on with the others."""
    method, bench = METHODS["fedlora"].toy(), lab(privacy=replace(PROMISES[level], answers=2))
    state = bench.run(method, rounds=1)
    bench.fleet.begin_round(1)
    method.round(state, bench.fleet.only(["nx-02"]))
    before = bench.fleet.now
    bench.fleet.begin_round(2)
    after = method.round(state, bench.fleet)
    left_out = [row["values"] for row in bench.rows("note") if "left_out" in row["values"]]
    assert left_out == [{"device": "nx-02", "left_out": "its privacy budget is spent"}]
    assert after.round == 2 and bench.fleet.now > before
    lost = [row["device"] for row in bench.rows("exchange") if row["lost"]]
    assert lost == ["nx-02"]


def test_a_lost_reply_counts_as_spent_and_the_state_before_stays_whole(lab):
    method, bench = METHODS["fedlora"].toy(), lab(privacy=ROWS)
    state = bench.run(method, rounds=1)
    bench.save(state)
    state = bench.run(method, rounds=2, state=state, around=lambda fleet: Unlucky(fleet, ["nx-02"]))
    bench.save(state)
    bench.run(method, rounds=3, state=state)
    spent = [row["epsilon"] for row in bench.rows("exchange") if row["device"] == "nx-02"]
    assert len(spent) == 3 and spent[0] < spent[1] < spent[2]
    bench.store.go_back(1)  # which checks the digests of its files


def test_a_run_ends_where_all_budgets_are_spent(lab):
    bench = lab(privacy=replace(ROWS, answers=1))
    with pytest.raises(AllLost, match=r"none of the 5 devices asked answers .*budget is spent"):
        bench.run(METHODS["fedlora"].toy(), rounds=2)


def test_work_that_says_more_is_not_done_in_a_private_run(task):
    assert not keeps(class_means)
    call = Call(
        device="a",
        index=0,
        work=name_of(class_means),
        order=pack(MeansOrder(rows=10)).payload,
        memory=None,
        seed=(0, 0, 0),
        privacy=ROWS,
    )
    with pytest.raises(LookupError, match="cannot keep"):
        serve(call, task.base, task.train.take(np.arange(20)))
