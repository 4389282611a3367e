"""When a run will be done: predicted from its first rounds, for methods that prune and for those
that do not.
"""

import pytest

from fedspine.core.method import planned_sparsities
from fedspine.methods import all_methods
from fedspine.runs.eta import FORWARD_SHARE, PRUNABLE_SHARE, Estimate, WorkPlan

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
    """By hand: a round at sparsity s costs 1 - 0.85 s, a model 1 - s; checks follow every fourth
    round but the last.
    """
    rounds = sum(ROUND_SECONDS * (1 - 0.85 * s) for s in job.sparsities[done:])
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
        seconds = slower * ROUND_SECONDS * (1 - 0.85 * job.sparsities[round])
        estimate.saw_round(round, seconds, SAMPLES)
    assert estimate.seconds_left(3, ROUNDS) == pytest.approx(true_seconds(job, 3))


# wall seconds of the embedded job's rounds on two cores, alone on the machine, and of all that came
# after the third round, its scoring included
MEASURED = {
    "bf16": (
        121,
        """4.61 3.24 3.26 3.31 3.09 3.12 3.0 2.74 2.79 2.68 2.62 2.58 2.7 2.62 2.5 2.42 2.44 2.41
        2.45 2.6 2.39 2.39 2.41 2.46 2.43 2.38 2.39 2.43 2.42 2.37 2.3 2.37 2.35 2.3 2.25 2.32 2.35
        2.31 2.32 2.33 2.38 2.32 2.31 2.36""",
    ),
    "fp32": (
        172,
        """8.69 5.63 5.61 5.25 4.81 4.58 4.42 4.08 3.78 3.59 3.71 3.78 3.76 4.07 3.37 3.27 3.15 3.17
        3.15 3.25 3.17 3.28 3.24 3.12 3.17 3.09 3.12 3.21 3.33 3.23 3.24 3.12 3.18 3.14 3.14 3.13
        3.14 3.06 3.08 2.97 3.21 3.27 3.33 3.27""",
    ),
}


@pytest.mark.parametrize("precision", MEASURED)
def test_the_embedded_job_says_after_three_rounds_when_it_ends(precision) -> None:
    rest, listed = MEASURED[precision]
    rounds = [float(seconds) for seconds in listed.split()]
    method = all_methods()["fedspine-plus"](sparsity=0.5, until=0.3)
    job = WorkPlan(
        sparsities=planned_sparsities(method, len(rounds)),
        evaluate_every=8,
        check_devices=2,
        check_rows=256,
        final_devices=4,
        final_rows=2135,
        prunable_share=PRUNABLE_SHARE[precision],
    )
    estimate = Estimate(job)
    for round in range(3):
        estimate.saw_round(round, rounds[round], samples=4 * 16 * 8)
    # what a run promises after three rounds: within 10 %
    assert estimate.seconds_left(3, len(rounds)) == pytest.approx(rest, rel=0.1)


def test_a_check_shows_what_scoring_costs() -> None:
    job = plan([0.0] * ROUNDS)
    estimate = Estimate(job)
    for round in range(4):
        estimate.saw_round(round, ROUND_SECONDS, SAMPLES)
    training, checks = 16 * ROUND_SECONDS, 3
    assert estimate.seconds_left(4, ROUNDS) == pytest.approx(
        training + ROW_SECONDS * (checks * 256 + 2000)
    )
    # a check thrice as slow: coming checks are, too; the many rows of the final scoring are not
    estimate.saw_check(4, 3 * ROW_SECONDS * 256)
    assert estimate.seconds_left(4, ROUNDS) == pytest.approx(
        training + ROW_SECONDS * (3 * checks * 256 + 2000)
    )
    # a quicker one shows that scoring is cheaper than training let expect
    quick = Estimate(job)
    for round in range(4):
        quick.saw_round(round, ROUND_SECONDS, SAMPLES)
    quick.saw_check(4, 0.5 * ROW_SECONDS * 256)
    assert quick.seconds_left(4, ROUNDS) == pytest.approx(
        training + 0.5 * ROW_SECONDS * (checks * 256 + 2000)
    )


def test_the_final_scoring_counts_models_by_their_size() -> None:
    job = plan([0.0, 0.5], final_devices=4)
    # one whole model and five halves
    assert [job.scored_share(done) for done in (0, 1, 2, 6)] == pytest.approx(
        [0, 1 / 3.5, 1.5 / 3.5, 1]
    )


def test_the_final_scoring_lasts_no_longer_than_it_was_expected_to() -> None:
    job = plan([0.0, 0.5], final_devices=4, final_rows=100)
    estimate = Estimate(job)
    assert estimate.scoring_left(0, 0.0) is None
    assert estimate.scoring_left(1, 10.0) == pytest.approx(25)  # nothing was expected: 2.5 halves
    estimate.saw_round(0, ROUND_SECONDS, SAMPLES)
    whole = 350 * ROW_SECONDS  # by hand
    assert estimate.scoring_left(1, 0.5 * whole) == pytest.approx(0.5 * whole)
    assert estimate.scoring_left(1, 0.1 * whole) == pytest.approx(0.25 * whole)
    assert estimate.scoring_left(1, 2 * whole) == pytest.approx(5 * whole)


def test_a_run_without_checks_has_its_final_scoring_only() -> None:
    job = plan([0.0] * 2, evaluate_every=0, final_rows=100)
    estimate = Estimate(job)
    estimate.saw_round(0, ROUND_SECONDS, SAMPLES)
    assert estimate.seconds_left(2, 2) == pytest.approx(100 * ROW_SECONDS)
