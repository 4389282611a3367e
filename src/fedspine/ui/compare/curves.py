"""Curves of several seeds as one: their mean and its spread along rounds, simulated seconds or
bytes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedspine.report.drawing import Panel
from fedspine.report.series import Floats
from fedspine.report.traces import Along, Gap, Trace, gap_panel, trace_panel
from fedspine.ui.compare.numbers import Comparison, MethodResult, OverSeeds

CAPTIONS: Mapping[Along, str] = {
    "seconds": "Simulated time of the whole fleet",
    "bytes": "Bytes of all devices together, down and up",
    "rounds": "Rounds done",
}
SHOWN = "mean and standard deviation over seeds; large marks are the final scores on all test rows."


def panels(comparison: Comparison, numbers: Mapping[str, int], prefix: str) -> list[Panel]:
    """Quality over time, bytes and rounds, and all methods against the best.

    `numbers` gives every method its colour, `prefix` makes the names unique.
    """
    quality = comparison.quality.name
    along_costs = [
        trace_panel(
            f"{prefix}{quality}-over-{along}",
            quality,
            f"{CAPTIONS[along]}; {SHOWN}",
            [_trace(result, along, numbers[result.method.name]) for result in comparison.results],
            along,
            comparison.target.value,
        )
        for along in CAPTIONS
    ]
    return [*along_costs, _gaps(comparison, numbers, prefix)] if comparison.pairs else along_costs


def _gaps(comparison: Comparison, numbers: Mapping[str, int], prefix: str) -> Panel:
    """Every other method against the best, from its pairs."""
    best, *others = comparison.results
    quality, gaps = comparison.quality.name, []
    for other, pair in zip(
        others, comparison.pairs, strict=False
    ):  # the pairs of the best method come first
        name = other.method.name
        found = [(other.final.values[seed], best.final.values[seed]) for seed in pair.seeds]
        seeds = [mine - its for mine, its in found if mine is not None and its is not None]
        # a pair is the best minus the other, which turns the interval round
        mean, low, high = (
            (pair.final.mean, pair.final.high, pair.final.low) if pair.final else (None, None, None)
        )
        turned = [None if value is None else -value for value in (mean, low, high)]
        gaps.append(Gap(name, numbers[name], seeds, *turned))
    caption = (
        "Faint dots are common seeds, large marks their mean, lines its 95 % interval, which is "
        "not corrected for the number of pairs: a line that crosses 0 is within the seeds' noise, "
        "one that does not may be, too."
    )
    return gap_panel(f"{prefix}final-{quality}", quality, caption, best.method.name, gaps)


def _trace(result: MethodResult, along: Along, number: int) -> Trace:
    runs = [*result.method.runs.values()]
    drawn = [run.curve for run in runs if len(run.curve.quality)]
    xs, values = on_a_grid(
        [getattr(curve, along) for curve in drawn], [curve.quality for curve in drawn]
    )
    mean = values.mean(axis=0) if drawn else xs
    band = values.std(axis=0, ddof=1) if len(values) > 1 else None
    ends: Mapping[Along, OverSeeds] = {
        "seconds": result.simulated_seconds,
        "bytes": result.bytes,
        "rounds": OverSeeds({run.seed: float(run.summary["rounds"]) for run in runs}),
    }
    final, end = result.final, ends[along].mean
    return Trace(
        name=result.method.name,
        number=number,
        xs=xs,
        mean=mean,
        low=None if band is None else mean - band,
        high=None if band is None else mean + band,
        end=None if end is None or final.mean is None else (end, final.mean, final.spread),
    )


def on_a_grid(costs: Sequence[Floats], values: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Several curves [checks of each] as steps on the grid of all their checks: xs [points], values
    [curves, points].

    The grid begins where every curve has had its first check. A curve's value holds until its next
    check, and after its last one to the end, since the model of a run that is over stays what it
    is.

    >>> costs = [np.array([1.0, 3.0]), np.array([2.0, 4.0])]
    >>> xs, steps = on_a_grid(costs, [np.array([0.1, 0.3]), np.array([0.2, 0.4])])
    >>> xs.tolist(), steps.tolist()
    ([2.0, 3.0, 4.0], [[0.1, 0.3, 0.3], [0.2, 0.2, 0.4]])
    """
    if not costs:
        return np.empty(0), np.empty((0, 0))
    grid = np.unique(np.concatenate(costs))
    grid = grid[grid >= max(cost[0] for cost in costs)]
    steps = [
        found[np.searchsorted(cost, grid, side="right") - 1]
        for cost, found in zip(costs, values, strict=True)
    ]
    return grid, np.stack(steps)
