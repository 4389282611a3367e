"""When a run will be done: predicted from its first rounds, for methods that prune and for those
that do not.
"""

import pytest

from fedspine.core.method import planned_sparsities
from fedspine.methods import all_methods
from fedspine.runs.eta import FORWARD_SHARE, Estimate, WorkPlan

ROUNDS, ROUND_SECONDS, SAMPLES = 20, 10.0, 1600
ROW_SECONDS = FORWARD_SHARE * ROUND_SECONDS / SAMPLES


def plan(sparsities, **changed):
    kept = {
        "evaluate_every": 4,
        "check_devices": 2,
        "check_rows": 256,
        "final_devices": 8,
        "final_rows": 2000,
    }
    return WorkPlan(sparsities=sparsities, **kept | changed)


def true_seconds(job, done):
    """By hand: a round and a model at sparsity s cost 1 - s, checks follow every fourth round but
    the last.
    """
    rounds = sum(ROUND_SECONDS * (1 - s) for s in job.sparsities[done:])
    rows = 0.0
    for round in (*range(4, ROUNDS, 4), ROUNDS):
        if round <= done:
            continue
        final = round == ROUNDS
        share = 1 - job.sparsities[round - 1]
        devices = job.final_devices if final else job.check_devices
        models = 1 if share == 1 else 1 + share * (1 + devices)
        rows += (job.final_rows if final else job.check_rows) * models
    return rounds + ROW_SECONDS * rows


@pytest.mark.parametrize("name", ["fedspine", "loraprune", "prune_after", "fedlora"])
def test_after_three_rounds_the_end_is_known_though_rounds_get_shorter(name) -> None:
    method = all_methods()[name]()
    job = plan(planned_sparsities(method, ROUNDS))
    estimate = Estimate(job)
    assert estimate.seconds_left(0, ROUNDS) is None
    # the first round prepares what later ones reuse, and takes three times as long
    for round, slower in enumerate((3.0, 1.0, 1.0)):
        seconds = slower * ROUND_SECONDS * (1 - job.sparsities[round])
        estimate.saw_round(round, seconds, SAMPLES)
    assert estimate.seconds_left(3, ROUNDS) == pytest.approx(true_seconds(job, 3))


def test_a_check_shows_what_scoring_costs() -> None:
    job = plan([0.5] * ROUNDS)
    estimate = Estimate(job)
    for round in range(4):
        estimate.saw_round(round, ROUND_SECONDS, SAMPLES)
    before = estimate.seconds_left(4, ROUNDS)
    check = 256 * (1 + 0.5 * 3)
    estimate.saw_check(4, 3 * ROW_SECONDS * 2 * check)
    # by hand: rounds count as before, all scoring counts six times (a whole round takes 2 *
    # ROUND_SECONDS here)
    expected_rows = 3 * check + 2000 * (1 + 0.5 * 9)
    training = 16 * ROUND_SECONDS
    assert before == pytest.approx(training + 2 * ROW_SECONDS * expected_rows)
    assert estimate.seconds_left(4, ROUNDS) == pytest.approx(
        training + 6 * ROW_SECONDS * expected_rows
    )


def test_a_run_without_checks_has_its_final_scoring_only() -> None:
    job = plan([0.0] * 2, evaluate_every=0, final_rows=100)
    estimate = Estimate(job)
    estimate.saw_round(0, ROUND_SECONDS, SAMPLES)
    assert estimate.seconds_left(2, 2) == pytest.approx(100 * ROW_SECONDS)
