"""Statistics of paired seeds: t intervals and tests of their differences, Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds, its 95 % interval and the p-value of its t-test; one seed has neither.

    `nothing` is the value that stands for no difference: 0 of a difference, 1 of a ratio.
    `p_corrected` is the p-value after Holm's correction for `tests` tests, of which this is one.
    The bounds are not corrected.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    nothing: float = 0.0
    p: float | None = None
    p_corrected: float | None = None
    tests: int = 1

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the corrected p-value is below 0.05; None where there is no test."""
        return None if self.p_corrected is None else self.p_corrected < 1 - LEVEL


def paired(differences: Sequence[float]) -> Interval:
    """Interval and two-sided t-test of the mean of paired differences, one for each seed.

    There are n - 1 degrees of freedom.

    >>> found = paired([1.0, 2.0, 3.0])
    >>> round(found.low, 2), found.mean, round(found.high, 2), round(found.p, 3), found.beyond_noise
    (-0.48, 2.0, 4.48, 0.074, False)
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * error
    p = _p(mean, error, n)
    return Interval(mean, mean - half, mean + half, n, p=p, p_corrected=p)


def _p(mean: float, error: float, n: int) -> float:
    if not error:  # all differences are equal
        return 0.0 if mean else 1.0
    return float(2 * stdtr(n - 1, -abs(mean) / error))


def paired_ratio(ratios: Sequence[float]) -> Interval:
    """The same for positive ratios: the geometric mean, interval and test of the mean logarithm."""
    logs = paired([math.log(ratio) for ratio in ratios])
    low, high = (None if bound is None else math.exp(bound) for bound in (logs.low, logs.high))
    return Interval(
        math.exp(logs.mean), low, high, logs.n, nothing=1.0, p=logs.p, p_corrected=logs.p
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, so that all of them hold at once (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; the order stays the same.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    left = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values)[order] * left).clip(max=1.0)
    return corrected.tolist()
