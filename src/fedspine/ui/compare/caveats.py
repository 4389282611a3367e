"""The caveats of a comparison: how each number was computed, and what it does not show."""

from fedspine.report.tables import counted
from fedspine.ui.compare.comparison import ComparisonReport


def caveats(report: ComparisonReport) -> list[str]:
    """The caveats that apply to these comparisons, one per line."""
    runs = [
        run
        for section in report.sections
        for s in section.comparison.results
        for run in s.method.runs.values()
    ]
    fleets = [run.recipe.fleet for run in runs]
    lines = [
        "Final scores are of the models that devices run, on all test rows, the "
        "mean over the device models scored. Curves and targets use the checks "
        "on the way, on a part of the test rows and fewer models, for every "
        "method alike; a final score never counts as reaching the target.",
        "Time to target is the simulated time of the first check that is as good as the target, so "
        "its resolution is the distance between two checks. A speed-up is given only where both "
        "methods reach the target in all common seeds.",
        (
            "Over time and bytes a seed's value holds until its "
            "next check, and its last one until the end of the others."
        ),
        "Intervals are paired over common seeds: Student's t on the "
        "seeds' differences, for ratios on logarithms. They cover the "
        "seeds that were run, not other data or devices.",
        *_quorums(report),
        *_correction(report),
        "Waiting is the mean time that an asked device waits for the slowest of its round, summed "
        "over rounds, as a share of the simulated time."
        + _unseen_waiting(any(fleet.drop or fleet.delay_seconds for fleet in fleets)),
    ]
    return [*lines, *_latency(report), *report.notes]


def _quorums(report: ComparisonReport) -> list[str]:
    """What share of a round's replies each method waited for; nothing where all waited for all."""
    shares = {
        s.method.name: run.recipe.fleet.quorum
        for section in report.sections
        for s in section.comparison.results
        for run in s.method.runs.values()
    }
    if set(shares.values()) <= {1.0}:
        return []
    each = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    if len(set(shares.values())) == 1:
        return [f"Rounds end at a share of their replies (fleet.quorum): {each}."]
    return [
        f"Rounds end at different shares of their replies (fleet.quorum): {each}. "
        "So these methods were not compared on equal terms."
    ]


def _correction(report: ComparisonReport) -> list[str]:
    """What p-values are corrected for; nothing where no pair was tested."""
    for section in report.sections:
        for pair in section.comparison.pairs:
            if pair.final is not None and pair.final.p is not None:
                name, tests = section.comparison.quality.name, counted(pair.final.tests, "pair")
                return [
                    "p is that of a paired t-test, before and after Holm's correction for the "
                    f"number of pairs on this page, separately for each measure ({tests} for the "
                    f'final {name}). "Beyond noise" means that p is below 0.05 after the '
                    "correction. Intervals are not corrected."
                ]
    return []


def _unseen_waiting(lossy: bool) -> str:
    return " It excludes the time that fleet.drop and fleet.delay_seconds add." if lossy else ""


def _latency(report: ComparisonReport) -> list[str]:
    """How latency was measured, once for each way."""
    ways = {
        "Latency is measured, not simulated: one forward pass of the model of device "
        f"{one.device}, seed {one.seed}, {counted(one.tokens, 'token')} in a row on "
        f"{counted(one.threads, 'thread')}, batch 1, {one.hardware}; methods one after the other, "
        "so a difference of a few percent means nothing."
        for section in report.sections
        for one in section.latencies.values()
    }
    return sorted(ways)
