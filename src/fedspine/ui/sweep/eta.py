"""The time left of a sweep, from the wall time of its finished cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ahead:
    """A cell that is not finished: `round` of `rounds` are saved, `began` of them before its
    process started.

    `seconds` is the wall time of its process so far, None where it has none.
    """

    label: str
    round: int
    rounds: int
    began: int = 0
    seconds: float | None = None


def seconds_left(
    ahead: Sequence[Ahead], finished: Mapping[str, Sequence[float]], jobs: int
) -> float | None:
    """Wall seconds until all cells are finished, `jobs` at a time; None where nothing is known yet.

    `finished` has the wall seconds of the finished cells by label. A cell takes what the median
    cell of its label took, which no outlier moves; without one, what the median of all took, and
    before any is finished what the running cells take at the speed of their rounds so far.

    >>> ahead = [Ahead("a", 0, 10), Ahead("a", 5, 10), Ahead("b", 0, 10)]
    >>> seconds_left(ahead, {"a": [60, 100, 9000]}, jobs=2)
    125.0
    """
    predicted = [whole for cell in ahead if (whole := _extrapolated(cell)) is not None]
    everything = [seconds for label in finished.values() for seconds in label] or predicted
    if not ahead or not everything:
        return None if ahead else 0.0
    lefts = [_eta(cell, median(finished.get(cell.label) or everything)) for cell in ahead]
    return max(sum(lefts) / jobs, *lefts)


def _eta(cell: Ahead, whole: float) -> float:
    return whole * (1 - cell.round / cell.rounds)


def _extrapolated(cell: Ahead) -> float | None:
    """The wall seconds of the whole cell at the speed of the rounds done so far, in which loading
    counts.
    """
    if cell.seconds is None or cell.round <= cell.began:
        return None
    return cell.seconds * cell.rounds / (cell.round - cell.began)
