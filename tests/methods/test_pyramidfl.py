"""PyramidFL: whom it asks, who does more, what is left out of an update, and when it is FedAvg."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from array_toy import array_task
from hypothesis import given, settings
from hypothesis import strategies as some
from toy import TEST_ROWS, Lab, Spy, bits

from fedspine.control import latency_model
from fedspine.control.selection import (
    MOST_MORE,
    Seen,
    Selecting,
    Thinning,
    dropped,
    scores,
    select,
    steps_with_slack,
)
from fedspine.core.errors import BadInput
from fedspine.methods.fedavg import FedAvg
from fedspine.methods.pyramidfl import Forecast, PyramidFL, _seen, kept, whole_update
from fedspine.nets.score import score_nets

USUAL = Selecting(participants=4)
NOTHING_LEFT_OUT = Thinning(least=0.0, most=0.0)


@pytest.fixture(scope="module")
def waves_task():
    return array_task(rounds=6)


@pytest.fixture
def bench(waves_task, tmp_path):
    built = []

    def make(name="lab", **settings):
        built.append(Lab(waves_task, tmp_path / name, **settings))
        return built[-1]

    yield make
    for each in built:
        each.close()


SGD = {"optimiser": "sgd", "learning_rate": 0.3}


def on_arrays(participants=5, **changes):
    selection = Selecting(participants=participants)
    usual = {"steps": 6, "batch": 16, "selection": selection, "precision": "fp32"}
    return PyramidFL(**(usual | SGD | changes))


# --- planning ---


@settings(max_examples=60)
@given(
    devices=some.integers(1, 12),
    known=some.integers(0, 12),
    wanted=some.integers(1, 15),
    round=some.integers(1, 50),
    seed=some.integers(0, 5),
)
def test_as_many_as_wanted_take_part_and_none_twice(devices, known, wanted, round, seed):
    rng = np.random.default_rng(seed)
    examples = {f"d{i}": int(rng.integers(1, 50)) for i in range(devices)}
    seen = {
        name: Seen(reward=float(rng.random()), norm=1.0, round=int(rng.integers(1, round + 1)))
        for name in list(examples)[:known]
    }
    seconds = {name: float(rng.random()) + 0.1 for name in seen}
    chosen = select(examples, seen, seconds, round, replace(USUAL, participants=wanted), rng)
    assert len(chosen) == len(set(chosen)) == min(wanted, devices)
    assert chosen == [name for name in examples if name in chosen]
    new = [name for name in chosen if name not in seen]
    share = max(0.9 * 0.95 ** (round - 1), 0.2)
    least = min(int(np.floor(min(wanted, devices) * share + 0.5)), devices - len(seen))
    assert len(new) == max(least, min(wanted, devices) - len(seen))


def test_high_loss_wins_unless_it_is_slow():
    seen = [Seen(reward=r, norm=1.0, round=1) for r in (1.0, 5.0, 5.0)]
    usual, high, high_and_slow = scores(seen, np.array([1.0, 1.0, 4.0]), 3, USUAL)
    assert high > usual
    assert high_and_slow == pytest.approx(high / 16)  # four times the preferred time, squared
    late, early = scores(
        [Seen(reward=1.0, norm=1.0, round=r) for r in (9, 2)], np.ones(2), 10, USUAL
    )
    assert early - late == pytest.approx(
        np.sqrt(0.1 * np.log(10) / 2) - np.sqrt(0.1 * np.log(10) / 9)
    )


def test_a_claimed_reward_counts_as_no_more_than_a_guess_among_all_classes():
    result = SimpleNamespace(reward=2.0**76, norm=1.0, examples=10)
    assert _seen(SimpleNamespace(value=result), 1).reward == 160.0
    result.reward = 23.0
    assert _seen(SimpleNamespace(value=result), 1).reward == 23.0


def test_only_those_above_the_cut_off_are_drawn():
    examples = dict.fromkeys("abcd", 10)
    seen = {
        name: Seen(reward=r, norm=1.0, round=1)
        for name, r in zip("abcd", (9.0, 8.9, 8.8, 0.0), strict=True)
    }
    exploit = replace(USUAL, participants=2, explore=0.0, explore_least=0.0, clip=1.0)
    drawn = [
        tuple(
            select(
                examples, seen, dict.fromkeys("abcd", 1.0), 2, exploit, np.random.default_rng(seed)
            )
        )
        for seed in range(40)
    ]
    assert set(drawn) == {("a", "b"), ("a", "c"), ("b", "c")}


def test_slack_becomes_whole_passes_and_has_a_limit():
    assert steps_with_slack(10, slack_seconds=0.0, pass_seconds=1.0, pass_steps=3) == 10
    assert steps_with_slack(10, slack_seconds=2.9, pass_seconds=1.0, pass_steps=3) == 16
    assert steps_with_slack(10, slack_seconds=1e9, pass_seconds=1.0, pass_steps=3) == 10 * (
        1 + MOST_MORE
    )
    # nobody knows yet
    assert steps_with_slack(10, slack_seconds=9.0, pass_seconds=0.0, pass_steps=3) == 10


def test_the_smallest_update_leaves_out_most():
    assert dropped([2.0], 0.1, 0.5) == [0.1]
    assert dropped([], 0.1, 0.5) == []
    assert dropped([1.0, 9.0], 0.1, 0.5) == [0.5, 0.1]


# --- the round ---


def test_with_everything_off_it_is_fedavg(bench):
    common = {"steps": 6, "batch": 16, "precision": "fp32"} | SGD
    method = PyramidFL(
        **common,
        selection=Selecting(participants=5),
        slack=False,
        thinning=NOTHING_LEFT_OUT,
    )
    other = bench("b").run(FedAvg(**common), rounds=1).model.weights
    start = bench("c").run(FedAvg(**common), rounds=0).model.weights
    for name, tensor in bench("a").run(method, rounds=1).model.weights.items():
        # the mean of changes added to what was, instead of the mean: two roundings of numbers below
        # 2
        assert torch.allclose(tensor, other[name], rtol=0, atol=4 * 2**-23)
        assert (tensor - start[name]).abs().max() > 1e-5  # far more than a rounding


def test_learns_arrays_and_every_process_gives_the_same_bytes(bench, waves_task):
    # clipped, since steps follow times, and so large a rate diverges where they happen to be many
    state = bench().run(on_arrays(participants=3, clip=1.0))
    (learnt,) = score_nets(waves_task.base, [state.model], waves_task.test)
    assert learnt.accuracy > 1 / 3 + 4 * np.sqrt(1 / 3 * 2 / 3 / TEST_ROWS)
    assert learnt.mean_loss < np.log(3)
    two = bench("two", workers=2)
    assert bits(two.run(on_arrays(participants=3), rounds=2)) == bits(
        bench("one").run(on_arrays(participants=3), rounds=2)
    )


def test_half_as_many_bytes_in_fp16(bench, waves_task):
    costs = {}
    for precision in ("fp32", "fp16"):
        lab = bench(precision)
        method = on_arrays(precision=precision, thinning=NOTHING_LEFT_OUT)
        state = lab.run(method, rounds=1)
        numbers = sum(tensor.numel() for tensor in state.model.weights.values())
        costs[precision] = [(row["bytes_down"], row["bytes_up"]) for row in lab.rows("exchange")]
    for number, precision in ((4, "fp32"), (2, "fp16")):
        for down, up in costs[precision]:
            assert 0 < down - number * numbers < 4000 and 0 < up - number * numbers < 4000


def test_asks_as_many_as_it_says_and_everybody_in_the_end(bench):
    lab = bench()
    state = lab.run(on_arrays(participants=2, slack=False), rounds=4)
    rows = lab.rows("exchange")
    assert [sum(row["round"] == round for row in rows) for round in range(4)] == [2, 2, 2, 2]
    # the first two rounds: nobody twice
    assert {row["device"] for row in rows[:4]} == set(list(state.seen)[:4])
    assert len({row["device"] for row in rows}) == 5


def test_fast_devices_do_more_once_their_time_is_known(bench):
    lab = bench()
    lab.run(on_arrays(steps=3, thinning=NOTHING_LEFT_OUT), rounds=3)
    notes = [row for row in lab.rows("note") if "steps" in row["values"]]
    steps = {(row["round"], row["values"]["device"]): row["values"]["steps"] for row in notes}
    assert {count for (round, _), count in steps.items() if round == 0} == {3}
    seconds = {(row["round"], row["device"]): row["seconds"] for row in lab.rows("exchange")}
    slowest = max(lab.ids, key=lambda id: seconds[0, id])
    later = {key: count for key, count in steps.items() if key[0] > 0}
    assert all(later[round, slowest] == 3 for round in (1, 2))
    assert max(later.values()) > 3
    assert len(lab.rows("note")) == len(notes)


def test_a_thinned_update_weighs_less_and_is_put_back_where_it_was(bench, waves_task):
    spies = []
    lab = bench()
    state = lab.run(
        on_arrays(slack=False, thinning=Thinning(least=0.0)),
        rounds=2,
        around=lambda fleet: spies.append(Spy(fleet)) or spies[-1],
    )
    orders, results = dict(spies[1].orders), dict(spies[1].results)
    drops = {id: order.drop for id, order in orders.items()}
    assert sorted(drops.values()) == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    norms = {id: result.norm for id, result in spies[0].results}
    assert sorted(drops, key=drops.get) == sorted(norms, key=norms.get, reverse=True)
    rows = {row["device"]: row["bytes_up"] for row in lab.rows("exchange") if row["round"] == 1}
    for id, drop in drops.items():
        numbers = sum(tensor.numel() for tensor in state.model.weights.values())
        # beside the numbers, names and shapes of the tensors and which entries are dropped
        assert rows[id] == pytest.approx(4 * numbers * (1 - drop), rel=0.02)
        whole = whole_update(results[id], orders[id].weights, drop)
        for name, tensor in whole.items():
            inside = kept(results[id].seed, name, tensor, drop)
            assert (
                torch.equal(tensor[inside], results[id].update[name]) and not tensor[~inside].any()
            )


def test_a_forecast_tells_work_from_traffic():
    def timed(*points):  # seconds = 4 * work + 2 * traffic, of 3 MB, of which half is the order's
        evidence = latency_model.no_evidence()
        for work, drop in points:
            evidence = latency_model.observe(
                evidence,
                sparsity=1 - work,
                rank=1 - drop / 2,
                seconds=4 * work + 2 * (1 - drop / 2),
                compute_seconds=4 * work,
                bytes=round(3e6 * (1 - drop / 2)),
                discount=1.0,
            )
        return evidence

    times = {"known": timed((1, 0.1), (3, 0.5), (2, 0.3), (1, 0.5))}
    forecast = Forecast(times, ["known", "new"])
    # UNDECIDED of the features' squares, 20, over the least of their eigenvalues, 0.01
    for id in ("known", "new"):
        assert forecast.seconds(id, work=2.0, drop=0.0) == pytest.approx(10.0, rel=2e-3)
        assert forecast.work_seconds(id) == pytest.approx(4.0, rel=2e-3)
    assert Forecast({}, ["new"]).seconds("new", work=1.0, drop=0.0) == 0.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"participants": 0}, "method.selection.participants is 0"),
        ({"selection": Selecting(explore=1.5)}, "method.selection.explore is 1.5, but a share"),
        ({"selection": Selecting(cut_off=-0.1)}, "method.selection.cut_off is -0.1"),
        ({"selection": Selecting(penalty=-1.0)}, "method.selection.penalty is -1.0"),
        ({"thinning": Thinning(least=0.6)}, "thinning.least and most are 0.6 and 0.5"),
        ({"thinning": Thinning(most=1.0)}, "0.1 and 1.0, but they must rise"),
        ({"steps": 0}, "method.steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(waves_task, changes, said):
    with pytest.raises(BadInput, match=said):
        on_arrays(**changes).check(waves_task)
