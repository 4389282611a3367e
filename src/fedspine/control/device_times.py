"""What the exchanges of each device took, and from it how long the next ones will take.

LEGEND (reconstructed), section 7; arXiv:2412.20004. Devices report the time of their computing and
what their upload costs [paper]; here the computing is told from the traffic. A round of depth k,
the number of blocks with an adapter, takes

    seconds = a * work + b * work * k / layers + bytes * exp(link),

where a is the forward pass of all blocks, b the backward pass of all, and `link` the logarithm of
what a byte takes (`control/links.py`); `work` is 1 for a whole round and less for a probe of a few
batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import erfc, log

import numpy as np

from fedspine.control.links import Array, expected_links, log_of_byte, noise_within, ratio
from fedspine.core.fleet import Cost
from fedspine.core.message import message

LIKE_THE_FLEET = 0.1  # exchanges' worth of the fleet's split of computing in each device's
# shares of the backward pass that are tried; without evidence it is as long as the forward pass, as
# input gradients are
SHARES = np.linspace(0.0, 1.0, 101)
EQUAL = 0.5
STEPS = 40  # of bisection, each of which halves the interval


@message
class DeviceTimes:
    """The discounted sums of one device's exchanges."""

    # of the products of 1, work, work * k / layers, seconds of computing and the link's logarithm
    moments: np.ndarray  # [5, 5]
    squares: float  # of the exchanges' weights


@dataclass(frozen=True)
class Expected:
    """The expected seconds of a round, [devices, depths 0 to layers], those of its traffic alone,
    and how uncertain they are.
    """

    seconds: Array
    sending: Array
    computing_variance: Array
    sending_variance: Array


def timed(
    before: DeviceTimes | None,
    cost: Cost,
    *,
    depth: int,
    layers: int,
    full_bytes: float,
    discount: float,
    work: float = 1.0,
) -> DeviceTimes:
    """A device's times after one more exchange at this depth; None: there was none before.

    `full_bytes` is the traffic of full depth, `work` the share of a round's batches.
    """
    link = log(full_bytes) + log_of_byte(
        seconds=cost.seconds,
        compute_seconds=cost.compute_seconds,
        bytes=cost.bytes_down + cost.bytes_up,
    )
    seen = np.array([1.0, work, work * depth / layers, cost.compute_seconds, link])
    moments, squares = np.outer(seen, seen), 1.0
    if isinstance(before, DeviceTimes):
        moments = discount * before.moments + moments
        squares = discount**2 * before.squares + squares
    return DeviceTimes(moments=moments, squares=squares)


def expected(
    times: Mapping[str, DeviceTimes], devices: Sequence[str], traffic: Array
) -> Expected | None:
    """What a round will take `devices` at each depth; None if no device was ever timed.

    `traffic` [depths] is a share of that of full depth. What an earlier version kept of a device
    is passed over.
    """
    known = {id: each for id, each in times.items() if isinstance(each, DeviceTimes)}
    if not known:
        return None
    moments = np.stack([each.moments for each in known.values()])
    squares = np.array([each.squares for each in known.values()])
    depths = np.arange(len(traffic)) / (len(traffic) - 1)
    computing, computing_variance = _computing(moments, squares, depths)
    sending, sending_variance = _sending(moments, squares, traffic)
    places = {id: place for place, id in enumerate(known)}
    rows = np.array([places.get(id, len(known)) for id in devices])  # the last one is of the new
    return Expected(
        (computing + sending)[rows], sending[rows], computing_variance[rows], sending_variance[rows]
    )


def _computing(moments: Array, squares: Array, depths: Array) -> tuple[Array, Array]:
    """Seconds of computing and their variance, [devices + 1, depths]; the last one is a new device.

    What a device's own rounds do not determine comes from the fleet's split into forward and
    backward pass, at the device's speed.
    """
    weights, gram, moment = moments[:, 0, 0], moments[:, 1:3, 1:3], moments[:, 1:3, 3]
    squared = moments[:, 3, 3]
    split = _split(gram, moment)
    slowness = ratio(moment @ split, _form(gram, split))
    costs = _two_nonnegative(
        gram + LIKE_THE_FLEET * np.eye(2), moment + LIKE_THE_FLEET * slowness[:, None] * split
    )
    left = squared - 2 * (costs * moment).sum(-1) + _form(gram, costs)
    spread = ratio(slowness.var(), slowness.mean() ** 2)
    noise = noise_within(ratio(left * weights, squared), weights, squares, spread)
    table = costs @ np.stack([np.ones_like(depths), depths])
    doubt = noise * (1 + squares / weights**2)
    mean, between = table.mean(0), table.var(0)
    return (
        np.vstack([table, mean]),
        np.vstack([doubt[:, None] * table**2, between + noise * mean**2]),
    )


def _sending(moments: Array, squares: Array, traffic: Array) -> tuple[Array, Array]:
    """Seconds of traffic and their variance, [devices + 1, depths]; the last is a new device."""
    factor, variance = expected_links(moments[:, 0, 0], squares, moments[:, 0, 4], moments[:, 4, 4])
    table = factor[:, None] * traffic
    return table, variance[:, None] * table**2


def _split(gram: Array, moment: Array) -> Array:
    """The fleet's shares of forward and backward pass, with which devices' own rounds agree best.

    Devices are compared with themselves alone: the slower ones train fewer blocks, so that across
    devices depth seems to save nothing.
    """
    splits = np.stack([1 - SHARES, SHARES])
    explained = np.square(moment @ splits) / np.einsum("is,dij,js->ds", splits, gram, splits)
    level = explained[:, SHARES == EQUAL]
    fit = ratio(explained, level).sum(0) - 1e-9 * np.square(SHARES - EQUAL)
    return splits[:, np.argmax(fit)]


def median_of_longest(seconds: Array, variance: Array, steps: int = STEPS) -> Array:
    """The time [...] that the longest of independent log-normal times [..., devices] of these means
    and variances is as likely to exceed as not; found by `steps` of bisection.

    It is above the longest of the means where several devices may be the last.

    >>> import numpy as np
    >>> times = np.array([1.0, 1.0, 0.5])
    >>> [round(float(median_of_longest(times, v * times**2)), 2) for v in (0.0, 0.09)]
    [1.0, 1.12]
    """
    spread = np.log1p(ratio(variance, seconds**2))
    means, sigma = np.log(seconds) - spread / 2, np.sqrt(spread)
    low, high = means.max(-1), (means + 8 * sigma).max(-1)
    at, logs = _log_of_normal_cdf()
    safe = np.maximum(sigma, 1e-9)
    for _ in range(steps):
        middle = (low + high) / 2
        early = np.interp((middle[..., None] - means) / safe, at, logs).sum(-1) < log(0.5)
        low, high = np.where(early, middle, low), np.where(early, high, middle)
    return np.exp(high)


@cache
def _log_of_normal_cdf() -> tuple[Array, Array]:
    """The logarithm of the standard normal distribution function, at points to interpolate it."""
    at = np.linspace(-8, 8, 3201)
    return at, np.array([log(erfc(-x / 2**0.5) / 2) for x in at])


def _two_nonnegative(gram: Array, moment: Array) -> Array:
    """Least squares with two nonnegative coefficients, of each of a stack, [..., 2, 2] and
    [..., 2].
    """
    both = np.linalg.solve(gram, moment[..., None])[..., 0]
    alone = np.maximum(moment, 0) / np.stack([gram[..., 0, 0], gram[..., 1, 1]], -1)
    better = np.argmax(alone * moment, -1)[..., None] == np.arange(2)
    return np.where(both.min(-1, keepdims=True) >= 0, both, np.where(better, alone, 0.0))


def _form(gram: Array, vector: Array) -> Array:
    """vector^T gram vector of each of a stack."""
    return np.einsum("...i,...ij,...j->...", vector, gram, vector)
