"""MergeSFL's control: speeds, regulated batches, label divergence, the genetic search, and the
whole plan.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedspine.control.batch_sizes import regulate, rows_that_fit, scaled_up
from fedspine.control.batch_timing import PART, SHORTER, early, fitted, levelled
from fedspine.control.genetic_selection import (
    Search,
    any_workers,
    fitness,
    founders,
    seconds_lost,
    select,
)
from fedspine.control.labels import distribution, divergence, merged, reference
from fedspine.control.split_plan import (
    Candidates,
    Goal,
    SplitControl,
    SplitLimits,
    plan_split,
    tuned,
)
from fedspine.control.worker_state import WorkerState, costs, observed, priorities, took_part
from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack

ROUNDING = 1e-9


def fleet(workers, *, seed=0, classes=10, delta=0.1, most=200):
    """Candidates of unequal speed, labels and turns."""
    rng = np.random.default_rng(seed)
    return Candidates(
        cost=rng.uniform(1e-3, 3e-2, workers),
        labels=rng.dirichlet(np.full(classes, delta), workers),
        most=rng.integers(1, most, workers),
        rounds=rng.integers(0, 6, workers),
    )


@st.composite
def problems(draw):
    """Fleets and limits of every kind that the types allow, tight ones among them."""
    workers = fleet(
        draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 1000)),
        classes=draw(st.integers(1, 6)),
        delta=draw(st.sampled_from([0.01, 0.1, 1.0, 100.0])),
        most=draw(st.sampled_from([2, 20, 200])),
    )
    fewest = draw(st.integers(1, 40))
    limits = SplitLimits(
        largest_batch=draw(st.integers(1, 80)),
        fewest=fewest,
        most=fewest + draw(st.integers(0, 20)),
        feature_bytes=100.0,
        budget_bytes=draw(st.floats(100.0, 60_000.0)),
        divergence=draw(st.sampled_from([0.0, 0.02, 0.05, 10.0])),
    )
    return workers, limits


def search_of(workers, limits):
    """What `plan_split` searches in."""
    most = np.minimum(workers.most, min(limits.largest_batch, limits.budget_rows))
    batches = regulate(workers.cost, limits.largest_batch, most)
    return Search(
        batches, workers.labels, workers.rounds, limits.budget_rows, limits.fewest, limits.most
    )


# speeds


def test_the_first_measurement_starts_the_averages_and_the_next_ones_move_them():
    first = observed(None, compute_seconds=0.5, transfer_seconds=0.1)
    second = observed(first, compute_seconds=1.0, transfer_seconds=0.2, keep=0.8)
    assert (first.compute_seconds, first.transfer_seconds, first.rounds) == (0.5, 0.1, 0)
    assert second.compute_seconds == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)
    assert second.cost_seconds == pytest.approx(0.6 + 0.8 * 0.1 + 0.2 * 0.2)


def test_a_workers_state_is_a_message_and_counts_completed_rounds():
    state = took_part(took_part(observed(None, compute_seconds=0.5)))
    again = unpack(pack(state))
    assert (again.compute_seconds, again.transfer_seconds, again.rounds) == (0.5, 0.0, 2)
    assert observed(again, compute_seconds=0.1).rounds == 2


@pytest.mark.parametrize(
    "times", [(-1.0, 2.0), (np.nan, 0.0), (np.inf, 0.0), (0.0, 0.0), (1.0, -0.1)]
)
def test_times_that_cannot_be_are_refused(times):
    with pytest.raises(ValueError, match="finite seconds per row"):
        observed(None, compute_seconds=times[0], transfer_seconds=times[1])


def test_workers_never_measured_count_as_the_usual_ones():
    states = [WorkerState(compute_seconds=c) for c in (1.0, 2.0, 9.0)]
    assert costs([states[0], None, states[1], states[2]]).tolist() == [1.0, 2.0, 2.0, 9.0]
    assert costs([None, None]).tolist() == [1.0, 1.0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.data())
def test_priority_falls_as_rounds_grow(rounds, data):
    place = data.draw(st.integers(0, len(rounds) - 1))
    more = np.array(rounds)
    more[place] += 1
    before, after = priorities(np.array(rounds)), priorities(more)
    # against the others: the sum over all grows by one turn, which raises everybody's alike
    assert after[place] / after.sum() < before[place] / before.sum() or len(rounds) == 1
    order = np.argsort(rounds, kind="stable")
    assert (np.diff(before[order]) <= 0).all()


# regulated batches


@given(problems())
def test_nobody_keeps_the_fastest_waiting(problem):
    workers, limits = problem
    unbounded = np.full(len(workers.cost), limits.largest_batch)
    batches = regulate(workers.cost, limits.largest_batch, unbounded)
    fastest = workers.cost.argmin()
    assert batches[fastest] == limits.largest_batch
    assert batches.min() >= 1
    in_time = batches * workers.cost <= limits.largest_batch * workers.cost[fastest] * (
        1 + ROUNDING
    )
    assert (in_time | (batches == 1)).all()
    one_more = (batches + 1) * workers.cost > limits.largest_batch * workers.cost[fastest] * (
        1 - ROUNDING
    )
    assert one_more.all()  # and none could take a row more
    capped = regulate(workers.cost, limits.largest_batch, workers.most)
    assert (capped == np.minimum(batches, workers.most)).all()


@given(st.floats(1e-6, 1e6), st.integers(1, 200), st.integers(1, 10))
def test_equal_workers_get_equal_batches_at_any_speed(cost, largest, workers):
    batches = regulate(np.full(workers, cost), largest, np.full(workers, 10**6))
    assert (batches == largest).all()


@given(
    st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 400)
)
def test_scaling_up_takes_the_longest_iteration_within_both_caps(cost, largest, more):
    cost, fastest = np.array(cost), 1e-3
    everything = np.full(len(cost), 10**6)
    start = regulate(cost, largest, everything, fastest)
    budget = int(start.sum()) + more
    grown = scaled_up(cost, largest, everything, budget, fastest)
    assert (grown >= start).all() and grown.sum() <= budget
    assert grown.max() <= largest
    longest = largest * cost.min()  # the fastest one is at its largest batch
    ends = [
        (rows, each) for rows in range(1, largest + 1) for each in cost if rows * each <= longest
    ]
    trials = [regulate(cost, rows, everything, each) for rows, each in ends]
    assert grown.sum() >= max((trial.sum() for trial in trials if trial.sum() <= budget), default=0)
    updated_workers = grown > 1  # a single row may take longer than all of another worker's
    assert (
        (grown + 1) * cost > (grown * cost)[updated_workers].max(initial=0) * (1 - ROUNDING)
    ).all()  # none has time for one more


def test_a_worker_at_its_own_cap_holds_nobody_back():
    grown = scaled_up(np.array([1.0, 2.0]), 64, np.array([64, 5]), budget_rows=30, fastest=0.1)
    assert grown.tolist() == [25, 5]


def test_where_slow_workers_grow_past_the_largest_batch_of_the_fast_ones_all_would_wait():
    grown = scaled_up(np.array([1.0, 4.0]), 8, np.array([100, 100]), budget_rows=1000, fastest=0.5)
    assert grown.tolist() == [8, 2]


@given(st.integers(0, 5000), st.integers(0, 300), st.integers(0, 50), st.integers(0, 100))
def test_rows_that_fit_are_the_most_that_fit(memory, fixed, each, at_most):
    rows = rows_that_fit(lambda rows: fixed + each * rows, memory, at_most)
    fitting = [n for n in range(1, at_most + 1) if fixed + each * n <= memory]
    assert rows == max(fitting, default=0)


# batches regulated again within a round


@given(st.integers(0, 1000), st.integers(1, 20), st.floats(0.0, 0.02))
def test_what_exchanges_cost_is_found_from_loads_that_vary(seed, devices, fixed):
    rng = np.random.default_rng(seed)
    each = rng.uniform(1e-3, 3e-2, devices)
    loads = [rng.integers(1, 40, 5).astype(float) + np.arange(5) for _ in range(devices)]
    exact, found = fitted(
        loads, [fixed + load * own for load, own in zip(loads, each, strict=True)], usual=fixed
    )
    shortest = min(float((fixed + load * own).min()) for load, own in zip(loads, each, strict=True))
    if fixed <= PART * shortest:
        assert exact == pytest.approx(fixed, rel=1e-6, abs=1e-12)
        assert found == pytest.approx(each, rel=1e-6)
    assert 0 <= exact <= PART * shortest and found.min() > 0


def test_where_loads_do_not_vary_the_fixed_part_is_the_one_known_before():
    loads = [np.array([4.0, 4.0]), np.array([2.0, 2.0])]
    fixed, each = fitted(loads, [np.array([3.0, 3.0]), np.array([2.0, 2.0])], usual=1.0)
    assert fixed == pytest.approx(1.0)
    assert each == pytest.approx([0.5, 0.5])


@given(problems(), st.floats(0.0, 0.1))
def test_levelled_batches_keep_the_limits_and_nearly_the_longest_iteration(problem, fixed):
    workers, limits = problem
    budget = max(limits.budget_rows, len(workers.cost))
    batches = levelled(workers.cost, fixed, limits.largest_batch, workers.most, budget)
    most = np.minimum(workers.most, limits.largest_batch)
    assert batches.min() >= 1 and (batches <= most).all() and batches.sum() <= budget
    longest = scaled_up(workers.cost, limits.largest_batch, workers.most, budget, 1e-9)
    free = batches < most  # one at its own cap is done before
    if free.all():
        reached = (longest * workers.cost)[longest > 1].max(initial=0)
        assert fixed + (batches * workers.cost).max() >= SHORTER * (fixed + reached) * (
            1 - ROUNDING
        )
    updated_workers = batches > 1  # one row may take longer than the iteration
    ends = (batches * workers.cost)[updated_workers].max(initial=0)
    assert ((batches + 1) * workers.cost > ends * (1 - ROUNDING))[
        free
    ].all()  # none has time for one more


def test_levelling_trades_a_little_length_for_waiting():
    # 8 rows of 1 s are 8 s, of which 2 of 3.5 s leave one idle; 7 rows and 2 are both done after 7
    # s
    assert regulate(np.array([1.0, 3.5]), 8, np.array([8, 8])).tolist() == [8, 2]
    assert levelled(np.array([1.0, 3.5]), 0.0, 8, np.array([8, 8]), 100).tolist() == [7, 2]
    # but no more than a quarter of it: both would be done after 5 s, where 8 s are allowed
    assert levelled(np.array([1.0, 5.0]), 0.0, 8, np.array([8, 8]), 100).tolist() == [6, 1]


def test_a_worker_whose_time_does_not_depend_on_its_rows_gets_a_number_of_them():
    assert levelled(np.array([1.0, 0.0]), 600.0, 8, np.array([8, 8]), 100).tolist() == [1, 8]
    assert levelled(np.array([0.0, 0.0]), 1.0, 8, np.array([8, 6]), 100).tolist() == [8, 6]


def test_where_one_row_takes_longest_the_others_use_the_time():
    assert levelled(np.array([1.0, 20.0]), 0.0, 8, np.array([8, 8]), 100).tolist() == [8, 1]
    assert levelled(np.array([1.0, 2.0, 20.0]), 0.0, 8, np.array([8, 8, 8]), 100).tolist() == [
        8,
        8,
        1,
    ]


@given(
    ends=arrays(float, st.integers(1, 30), elements=st.floats(0.01, 100.0)),
    step=st.floats(0.01, 10.0),
    least=st.integers(1, 30),
)
def test_workers_leave_so_early_that_all_are_done_at_the_same_time(ends, step, least):
    before = early(ends, step, least)
    last = before == 0
    assert last.sum() >= min(least, len(ends))
    end = ends[last].max()
    done = ends - before * step
    assert (done <= end + step * ROUNDING).all()
    # none goes a whole step too early
    assert (done[~last] > end - step * (1 + ROUNDING)).all()
    # never worse than all at once
    assert end + np.mean(end - done) <= ends.max() + np.mean(ends.max() - ends) + ROUNDING


def test_nobody_leaves_early_where_a_step_is_longer_than_what_links_differ_by():
    assert early(np.array([1.0, 1.3, 1.1]), 10.0, 2).tolist() == [0, 0, 0]
    assert early(np.array([1.0]), 0.1, 2).tolist() == [0]


# labels


def test_divergence_by_hand():
    labels = np.array([[1.0, 0.0], [0.0, 1.0]])
    mixed = merged(np.array([3, 1]), labels)
    assert mixed.tolist() == [0.75, 0.25]
    by_hand = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert float(divergence(mixed, reference(labels))) == pytest.approx(by_hand)


def test_a_class_that_nobody_holds_adds_nothing_and_one_beyond_the_reference_is_infinite():
    assert float(divergence(np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.5, 0.0]))) == 0
    assert float(divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0]))) == np.inf


def test_label_shares_count_rows():
    assert distribution(np.array([0, 2, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]
    for wrong in ([], [4], [-1]):
        with pytest.raises(ValueError, match="labels from 0 to 3"):
            distribution(np.array(wrong, int), 4)


@given(problems())
def test_divergence_is_none_where_all_hold_the_same(problem):
    workers, limits = problem
    same = replace(workers, labels=np.repeat(workers.labels[:1], len(workers.cost), axis=0))
    plan = plan_split(same, limits, np.random.default_rng(0))
    assert plan.divergence < ROUNDING


# the genetic search


@given(problems(), st.integers(0, 5))
def test_the_search_is_never_worse_than_its_founders_and_keeps_the_limits(problem, seed):
    workers, limits = problem
    search = search_of(workers, limits)
    first = founders(search, np.random.default_rng(seed), 20)
    chosen = select(search, np.random.default_rng(seed))  # draws the same founders
    members = np.zeros((1, len(workers.cost)), bool)
    members[0, chosen] = True
    assert fitness(search, members)[0] <= fitness(search, first).min() + ROUNDING
    for group in (*first, members[0]):
        assert search.batches[group].sum() <= search.budget_rows
        assert search.reachable <= group.sum() <= limits.most
    # fewer than asked for only where even the smallest do not fit
    if search.reachable < min(limits.fewest, len(workers.cost)):
        assert np.sort(search.batches)[: search.reachable + 1].sum() > search.budget_rows


def test_a_budget_for_few_of_the_chosen_keeps_those_whose_turn_it_is():
    search = Search(
        np.full(4, 10), np.eye(4), np.array([3, 0, 9, 1]), budget_rows=20, fewest=2, most=4
    )
    for members in founders(replace(search, fewest=4), np.random.default_rng(0), 20):
        assert members.sum() == 2  # only two of ten rows fit into twenty
    everyone = replace(search, budget_rows=40, fewest=4)
    assert select(everyone, np.random.default_rng(0)).tolist() == [0, 1, 2, 3]


def test_rarely_used_workers_found_more_individuals():
    rounds = np.array([0] * 10 + [9] * 10)  # ten times the weight of each worker in the first half
    search = Search(
        np.ones(20, int), np.full((20, 1), 1.0), rounds, budget_rows=20, fewest=1, most=4
    )
    members = founders(search, np.random.default_rng(0), 2000)
    rare, usual = members[:, :10].mean(), members[:, 10:].mean()
    assert rare > 4 * usual


@pytest.mark.parametrize("delta", [1.0, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_search_beats_random_selection_of_equal_size(seed, delta):
    workers = fleet(80, seed=seed, delta=delta)
    search = search_of(workers, SplitLimits())
    chosen = select(search, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    members = np.zeros((200, 80), bool)
    for row in members:
        row[rng.permutation(80)[: len(chosen)]] = True
    mine = members[0] & False
    mine[chosen] = True
    # better than the best of 200 draws: by chance once in 200
    assert fitness(search, mine[None])[0] < fitness(search, members).min()


def test_seconds_lost_by_hand():
    """Three members wait after both kinds of exchange: 3 and 0 s, 0 and 4 s, 2 and 4 s, of 4 + 6 in
    all.
    """
    seconds = np.array([[1.0, 4.0, 2.0, 9.0], [6.0, 2.0, 2.0, 9.0]])
    search = Search(np.ones(4, int), np.ones((4, 1)), np.zeros(4, int), 4, 1, 4, seconds=seconds)
    members = np.array([[True, True, True, False], [False, False, True, False]])
    lost = [4 + 6 + (3 + 0 + 2 + 0 + 4 + 4) / 3, 2 + 2]
    assert seconds_lost(search, members) == pytest.approx(lost)
    assert seconds_lost(replace(search, seconds=None), members).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_of_choices_alike_in_labels_it_takes_one_that_loses_little_time(seed):
    workers = fleet(80, seed=seed)
    search = search_of(workers, SplitLimits())
    seconds = np.stack([workers.cost * 10, search.batches * workers.cost])
    weighed = replace(search, seconds=seconds, enough=0.05)
    both = np.zeros((2, 80), bool)
    for row, each in zip(both, (search, weighed), strict=True):
        row[select(each, np.random.default_rng(seed))] = True
    assert fitness(search, both).max() <= SplitLimits().divergence
    lost = seconds_lost(weighed, both)
    assert lost[1] < lost[0]


def test_slow_links_are_left_out_where_labels_do_not_need_them():
    """Half of the fleet takes ten times as long for the weights, and every worker has the same
    labels.
    """
    slow = np.arange(40) % 2
    seconds = np.stack([1.0 + 9.0 * slow, np.ones(40)])
    search = Search(
        np.ones(40, int), np.ones((40, 1)), np.zeros(40, int), 40, 5, 20, seconds=seconds
    )
    for seed in range(5):
        chosen = select(search, np.random.default_rng(seed), generations=80)
        assert not slow[chosen].any()


def test_the_same_generator_gives_the_same_plan_and_another_one_another():
    workers = fleet(80)
    plans = [plan_split(workers, SplitLimits(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert plans[0].chosen.tolist() == plans[1].chosen.tolist()
    assert plans[0].batches.tolist() == plans[1].batches.tolist()
    assert plans[0].chosen.tolist() != plans[2].chosen.tolist()


def test_random_selection_keeps_the_limits_too():
    search = search_of(fleet(30), SplitLimits(fewest=3, most=8, budget_bytes=200.0))
    sizes = set()
    for seed in range(50):
        chosen = any_workers(search, np.random.default_rng(seed))
        assert search.batches[chosen].sum() <= search.budget_rows
        sizes.add(len(chosen))
    assert min(sizes) >= 3 and max(sizes) <= 8 and len(sizes) > 1


# the whole plan


@given(problems(), st.sampled_from(["genetic", "random"]), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_every_plan_meets_its_limits(problem, selection, regulated, tune):
    workers, limits = problem
    control = SplitControl(select=selection, regulate=regulated, tune=tune)
    plan = plan_split(workers, limits, np.random.default_rng(0), control)
    assert plan.rows * limits.feature_bytes <= limits.budget_bytes
    assert 1 <= len(plan.chosen) <= min(limits.most, len(workers.cost))
    assert len(set(plan.chosen.tolist())) == len(plan.chosen) == len(plan.batches)
    assert plan.batches.min() >= 1
    assert (plan.batches <= np.minimum(workers.most[plan.chosen], limits.largest_batch)).all()
    mixed = merged(plan.batches, workers.labels[plan.chosen])
    assert plan.divergence == pytest.approx(float(divergence(mixed, reference(workers.labels))))
    assert 0 <= plan.waiting < 1


@given(st.integers(1, 12), st.integers(1, 64), st.integers(0, 50))
def test_equal_devices_with_equal_labels_get_equal_batches(workers, largest, seed):
    alike = Candidates(
        cost=np.full(workers, 0.3),
        labels=np.full((workers, 4), 0.25),
        most=np.full(workers, 1000),
        rounds=np.zeros(workers, int),
    )
    limits = SplitLimits(
        largest_batch=largest, fewest=workers, most=workers, budget_bytes=float(workers * largest)
    )
    plan = plan_split(alike, limits, np.random.default_rng(seed))
    assert plan.chosen.tolist() == list(range(workers))
    assert plan.batches.tolist() == [largest] * workers
    assert plan.waiting == 0


def test_tuning_brings_the_labels_within_the_limit_at_the_price_of_waiting():
    # ten workers, all in every round, as in the authors' code: the speeds alone decide the labels
    # until they are tuned
    workers = fleet(10, seed=3, delta=0.1)
    workers = replace(workers, most=np.full(10, 200))
    limits = SplitLimits(fewest=10, most=10, divergence=0.02)
    free = plan_split(workers, limits, np.random.default_rng(0), SplitControl(tune=False))
    held = plan_split(workers, limits, np.random.default_rng(0))
    assert free.divergence > limits.divergence >= held.divergence
    assert held.waiting > free.waiting
    loose = plan_split(workers, replace(limits, divergence=10.0), np.random.default_rng(0))
    assert loose.batches.tolist() == free.batches.tolist()  # nothing to tune


def test_tuning_takes_rows_away_where_more_of_others_would_make_all_wait():
    """Two devices hold one class, a third the other one: fewer rows of the two make one wait, more
    of the third both.
    """
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    goal = Goal(
        np.ones(3), labels, np.array([0.5, 0.5]), np.full(3, 64), SplitLimits(divergence=0.01)
    )
    start = np.array([8, 8, 8])
    batches = tuned(goal, start)
    assert goal.divergence(start) > 0.05 and goal.divergence(batches) <= 0.01
    assert batches[2] == 8 and batches.max() == 8


def test_regulated_batches_cut_the_waiting_of_equal_ones():
    workers = replace(fleet(80, delta=1.0), most=np.full(80, 200))
    limits = SplitLimits(divergence=0.05)
    regulated = plan_split(workers, limits, np.random.default_rng(0))
    equal = plan_split(workers, limits, np.random.default_rng(0), SplitControl(regulate=False))
    assert len(set(equal.batches.tolist())) == 1
    # costs are spread evenly from 1 to 30: the mean waits half of the slowest one's time
    assert equal.waiting > 0.4
    # batches are whole rows, so half a row of 15.5 on average is unused of the fastest's 200: 0.04
    assert regulated.waiting < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"largest_batch": 0}, "largest batch is 0"),
        ({"fewest": 0}, "between 0 and 20"),
        ({"fewest": 9, "most": 8}, "between 9 and 8"),
        (
            {"feature_bytes": 1000.0, "budget_bytes": 999.0},
            "999 bytes an iteration, but one row's features take 1000",
        ),
        ({"feature_bytes": 0.0}, "raise the budget"),
        ({"divergence": -0.1}, "cannot be negative"),
        ({"divergence": float("nan")}, "cannot be negative"),
    ],
)
def test_limits_that_no_plan_can_meet_are_refused(change, words):
    with pytest.raises(BadInput, match=words):
        SplitLimits(**change)


def test_candidates_that_do_not_fit_together_are_refused():
    good = fleet(3)
    for change in (
        {"cost": good.cost[:2]},
        {"cost": good.cost * 0},
        {"most": good.most * 0},
        {"labels": good.labels * 2},
        {"labels": good.labels[:, 0]},
    ):
        with pytest.raises(ValueError, match="expected"):
            replace(good, **change)
