"""Paired intervals: what the differences of the same seeds say about two methods, by Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and the bounds of its interval; with one seed there are none.

    `nothing` is the value that stands for no difference: 0 of a difference, 1 of a ratio.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    nothing: float = 0.0

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval leaves out `nothing`; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= self.nothing <= self.high


def paired(differences: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of paired differences, one for each seed, at n - 1 degrees of freedom.

    >>> found = paired([1.0, 2.0, 3.0])
    >>> round(found.low, 2), found.mean, round(found.high, 2), found.beyond_noise
    (-0.48, 2.0, 4.48, False)
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_ratio(ratios: Sequence[float]) -> Interval:
    """The same for positive ratios: their geometric mean, and the interval of the mean logarithm."""
    logs = paired([math.log(ratio) for ratio in ratios])
    low, high = (None if bound is None else math.exp(bound) for bound in (logs.low, logs.high))
    return Interval(math.exp(logs.mean), low, high, logs.n, nothing=1.0)


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for a probability from 0.5 to below 1, by bisection on the distribution function.

    >>> round(t_quantile(0.975, 2), 3)
    4.303
    """
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (
            (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
        )
    return high


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for t of at least 0 and whole degrees: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total  # P(-t <= T <= t)
    return (1 + inside) / 2
