"""What a byte takes on the link of each device, from what its exchanges took.

Links are logarithms since their speed changes by factors: what one exchange's link will be is then
normal around the device's mean, which is in turn normal around the fleet's. The mean of a device
that was seldom seen is drawn to the fleet's, and one that was never seen counts as the fleet does,
with the fleet's spread [ours].
"""

from math import log

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_SECONDS = 1e-3  # of traffic, whose logarithm is taken


def log_of_byte(*, seconds: float, compute_seconds: float, bytes: int) -> float:
    """The logarithm of the seconds that a byte of an exchange took, of all that was not
    computing.
    """
    return log(max(seconds - compute_seconds, LEAST_SECONDS) / max(bytes, 1))


def expected_links(
    weights: Array, squares: Array, sums: Array, squared: Array
) -> tuple[Array, Array]:
    """The seconds of a byte that are expected of each device, and of a new one as the last, with
    their relative variance; [devices + 1] each.

    `weights`, `sums` and `squared` are discounted sums over a device's exchanges of 1, of the
    link's logarithm and of its square, [devices]; `squares` those of the squared weights.
    """
    means = sums / weights
    left = squared - weights * means**2
    total = means.var(ddof=1) if len(means) > 1 else 0.0
    noise = noise_within(left, weights, squares, total)
    doubt = noise * squares / weights**2  # the variance of a device's mean
    between = max(total - doubt.mean(), 0.0)
    trust = ratio(between, between + doubt)
    means = np.append(means.mean() + trust * (means - means.mean()), means.mean())
    variance = noise + between * (1 - np.append(trust, 0.0))
    return np.exp(means + variance / 2), np.expm1(variance)


def noise_within(left: Array, weights: Array, squares: Array, spread: float) -> float:
    """The variance of one exchange around its device's mean, from all devices' squared residuals
    `left`. As long as devices were seen once, it is half of the `spread` between them.
    """
    freedom = (weights - squares / weights).sum()
    # residuals of exchanges that were all alike can be below 0 by rounding
    return float((max(left.sum(), 0.0) + spread / 2) / (freedom + 1))


def ratio(above: Array | float, below: Array | float) -> Array:
    """A quotient, 0 where nothing is divided by nothing."""
    below = np.asarray(below)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)
