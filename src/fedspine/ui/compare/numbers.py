"""The numbers of a comparison: each method's results and costs over its seeds, and the differences
of pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.report.tables import counted
from fedspine.ui.compare.groups import Group, MethodRuns
from fedspine.ui.compare.intervals import Interval, holm, paired, paired_ratio
from fedspine.ui.compare.runs import Run

MARGIN_POINTS = 0.005  # 0.5 points below the best accuracy that all runs reach
MARGIN_NATS = 0.005  # above the lowest loss that all reach: half a percent of perplexity
MEASURES = (  # of a pair, each with its own interval and test
    *("final", "speed_up", "bytes_saving", "shorter_run", "waiting_share", "memory_ratio"),
)


@dataclass(frozen=True)
class Quality:
    """The quality measure of runs."""

    name: Literal["accuracy", "loss"]
    higher_is_better: bool

    def at_least(self, value: Any, target: float) -> Any:
        """Whether values are as good as the target."""
        return value >= target if self.higher_is_better else value <= target


ACCURACY, LOSS = Quality("accuracy", True), Quality("loss", False)


@dataclass(frozen=True)
class Target:
    """The quality that runs are timed to; `value` is None where there were no checks on the way."""

    value: float | None
    how: str  # auto, or what was asked for
    best_of_all: float | None  # the best check that every run reaches


@dataclass(frozen=True)
class OverSeeds:
    """One number of each seed; None for a seed that has none, such as one that never reached the
    target.
    """

    values: Mapping[int, float | None]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values.values() if value is not None]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Over all seeds; None where one of them has no number, since the others alone would
        flatter.
        """
        return float(np.mean(self.known)) if self.known and len(self.known) == self.n else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds (n - 1); None below two."""
        return float(np.std(self.known, ddof=1)) if self.mean is not None and self.n > 1 else None

    def table(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "spread": self.spread,
            "n": self.n,
            "seeds_with_a_number": len(self.known),
            "by_seed": {str(seed): value for seed, value in self.values.items()},
        }


@dataclass(frozen=True)
class MethodResult:
    """One method's numbers; seconds simulated, bytes of both ways, `final` on all test rows."""

    method: MethodRuns
    final: OverSeeds
    sparsity: OverSeeds
    seconds_to_target: OverSeeds
    bytes_to_target: OverSeeds
    simulated_seconds: OverSeeds
    bytes: OverSeeds
    waiting_share: OverSeeds
    peak_memory_bytes: OverSeeds

    @property
    def reached(self) -> int:
        """How many seeds reach the target."""
        return len(self.seconds_to_target.known)


@dataclass(frozen=True)
class Pair:
    """Two methods over their common seeds, `first` against `second`; None where there is nothing to
    compare.

    `final`, `waiting_share` are differences, first minus second. The others are ratios: `speed_up`
    is the second's seconds to target over the first's, `bytes_saving` the same of bytes,
    `shorter_run` of the seconds of whole runs, so above 1 is good for the first; `memory_ratio` is
    the first's over the second's.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    final: Interval | None
    speed_up: Interval | None
    bytes_saving: Interval | None
    shorter_run: Interval | None
    waiting_share: Interval | None
    memory_ratio: Interval | None


@dataclass(frozen=True)
class Comparison:
    """A group of runs in numbers, the best method first."""

    title: str
    quality: Quality
    target: Target
    checks: str  # what the target is measured on, as text
    results: tuple[MethodResult, ...]
    pairs: tuple[Pair, ...]


def compared(group: Group, target: str = "auto") -> Comparison:
    """The numbers of one group. Raises BadInput for an invalid target."""
    quality = LOSS if group.kind == "causal-lm" else ACCURACY
    wanted = target_of(group, quality, target)
    results = [_result(method, quality, wanted) for method in group.methods]
    worst = -np.inf if quality.higher_is_better else np.inf
    results.sort(
        key=lambda s: worst if s.final.mean is None else s.final.mean,
        reverse=quality.higher_is_better,
    )
    run = next(iter(group.methods[0].runs.values())).recipe.run
    every = (
        "never"
        if run.evaluate_every == 0
        else "every round"
        if run.evaluate_every == 1
        else f"every {run.evaluate_every} rounds"
    )
    return Comparison(
        title=group.title,
        quality=quality,
        target=wanted,
        checks=(
            f"{every}, {counted(run.evaluate_rows, 'test row')}, "
            f"{counted(run.evaluate_devices, 'device model')}"
        ),
        results=tuple(results),
        pairs=tuple(_pair(first, second) for first, second in combinations(results, 2)),
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p-values corrected over all pairs of all comparisons, by measure."""
    found = [list(comparison.pairs) for comparison in comparisons]
    for name in MEASURES:
        tested = [
            (pairs, place, interval)
            for pairs in found
            for place, pair in enumerate(pairs)
            if (interval := getattr(pair, name)) is not None and interval.p is not None
        ]
        p_values = holm([interval.p for _, _, interval in tested])
        for (pairs, place, interval), p in zip(tested, p_values, strict=True):
            after = replace(interval, p_corrected=p, tests=len(tested))
            pairs[place] = replace(pairs[place], **{name: after})
    return [
        replace(comparison, pairs=tuple(pairs))
        for comparison, pairs in zip(comparisons, found, strict=True)
    ]


def target_of(group: Group, quality: Quality, text: str) -> Target:
    """The requested target, or, for `auto`, what every run reaches, less a small margin."""
    best = _best_of_all(group, quality)
    if text == "auto":
        margin = -MARGIN_POINTS if quality.higher_is_better else MARGIN_NATS
        return Target(None if best is None else best + margin, "auto", best)
    asked = _parsed(text, quality)
    checked = any(
        len(run.curve.quality) for method in group.methods for run in method.runs.values()
    )
    return Target(asked if checked else None, text, best)


def _parsed(text: str, quality: Quality) -> float:
    """An accuracy as a share up to 1 or in percent, a loss in nats."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if quality is ACCURACY and (text.endswith("%") or value > 1):
        value /= 100
    if not (
        0 < value <= 1 if quality is ACCURACY else 0 < value < np.inf and not text.endswith("%")
    ):
        wanted = (
            "an accuracy such as 0.7 or 70%"
            if quality is ACCURACY
            else "a loss in nats above 0, such as 1.5"
        )
        raise BadInput(f"--target is {text!r}; auto or {wanted} was expected")
    return value


def _best_of_all(group: Group, quality: Quality) -> float | None:
    """The worst over runs of each run's best check."""
    curves = [run.curve.quality for method in group.methods for run in method.runs.values()]
    if not all(map(len, curves)):
        return None
    return float(min(map(max, curves)) if quality.higher_is_better else max(map(min, curves)))


def _result(method: MethodRuns, quality: Quality, target: Target) -> MethodResult:
    def over(number: Callable[[Run], float | None]) -> OverSeeds:
        return OverSeeds({seed: number(run) for seed, run in method.runs.items()})

    return MethodResult(
        method=method,
        final=over(lambda run: run.summary.get(quality.name)),
        sparsity=over(lambda run: run.summary.get("sparsity")),
        seconds_to_target=over(lambda run: _at_target(run, run.curve.seconds, quality, target)),
        bytes_to_target=over(lambda run: _at_target(run, run.curve.bytes, quality, target)),
        simulated_seconds=over(lambda run: run.summary["simulated_seconds"]),
        bytes=over(lambda run: run.summary["bytes_up"] + run.summary["bytes_down"]),
        waiting_share=over(waiting_share),
        peak_memory_bytes=over(lambda run: run.summary["peak_memory_bytes_simulated"]),
    )


def waiting_share(run: Run) -> float | None:
    """The mean idle time of an asked device, as a share of the run's simulated seconds."""
    seconds = run.summary["simulated_seconds"]
    return run.summary["waiting_seconds"] / seconds if seconds else None


def _at_target(run: Run, costs: np.ndarray, quality: Quality, target: Target) -> float | None:
    """The cost at the first check that is as good as the target; None where none is."""
    if target.value is None:
        return None
    reached = np.flatnonzero(quality.at_least(run.curve.quality, target.value))
    return float(costs[reached[0]]) if len(reached) else None


def _pair(first: MethodResult, second: MethodResult) -> Pair:
    seeds = tuple(seed for seed in first.final.values if seed in second.final.values)

    def both(number: Callable[[MethodResult], OverSeeds]) -> list[tuple[float, float]] | None:
        """The two numbers of every common seed; None unless all are there, so that no seed is
        dropped silently.
        """
        found = [(number(first).values[seed], number(second).values[seed]) for seed in seeds]
        return (
            [(a, b) for a, b in found if a is not None and b is not None] if _whole(found) else None
        )

    def difference(number: Callable[[MethodResult], OverSeeds]) -> Interval | None:
        found = both(number)
        return paired([a - b for a, b in found]) if found else None

    def ratio(number: Callable[[MethodResult], OverSeeds], *, over_first: bool) -> Interval | None:
        found = both(number)
        if not found or min(map(min, found)) <= 0:
            return None
        return paired_ratio([b / a if over_first else a / b for a, b in found])

    return Pair(
        first=first.method.name,
        second=second.method.name,
        seeds=seeds,
        final=difference(lambda s: s.final),
        speed_up=ratio(lambda s: s.seconds_to_target, over_first=True),
        bytes_saving=ratio(lambda s: s.bytes_to_target, over_first=True),
        shorter_run=ratio(lambda s: s.simulated_seconds, over_first=True),
        waiting_share=difference(lambda s: s.waiting_share),
        memory_ratio=ratio(lambda s: s.peak_memory_bytes, over_first=False),
    )


def _whole(found: list[tuple[float | None, float | None]]) -> bool:
    return bool(found) and all(None not in numbers for numbers in found)
