"""A latency model of each device, fitted to the times that it reported.

The option `rls` of FedSpine (reconstructed), section 4, fits seconds = a * (1 - sparsity) +
b * rank + c to each device by recursive least squares with forgetting. Here the seconds of
computing are fitted so, and those of traffic are the bytes times what a byte takes on the device's
link [ours]. A device with few rounds is assumed to be like the fleet, but for its speed, and what
the fleet has in common is learnt within devices [ours]. In information form the evidence is a sum
of outer products, so it can be added up.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedspine.control.links import expected_links, log_of_byte
from fedspine.core.message import message

Evidence = NDArray[np.float64]  # [6, 6]: discounted sums of products of what a round showed

FEATURES = 3  # 1 - sparsity, rank over the largest, 1
# beside them the seconds of computing, the logarithm of what a byte took, and the megabytes
COMPUTING, LINK, TRAFFIC = range(FEATURES, FEATURES + 3)
SEEN = FEATURES + 3
LIKE_THE_FLEET = 0.1  # plays' worth of the common coefficients in each device's
# A fleet that has only ever run unpruned cannot tell a from c; so small a weight shares its time
# out evenly.
UNDECIDED = 1e-6
ITERATIONS = 20  # of the common coefficients, each of which refits the speeds


@message
class LatencyModel:
    """The latency model of one device: the `evidence` of the rounds that it reported."""

    evidence: np.ndarray


def no_evidence() -> Evidence:
    return np.zeros((SEEN, SEEN))


def observe(
    evidence: Evidence,
    *,
    sparsity: float,
    rank: float,
    seconds: float,
    compute_seconds: float,
    bytes: int,
    discount: float,
) -> Evidence:
    """The evidence after one more round, the older ones discounted; `rank` is a share of the
    largest. What an earlier version kept is forgotten.

    Raises ValueError for times that are not finite.

    >>> cost = {"seconds": 4.0, "compute_seconds": 3.0, "bytes": 10**6}
    >>> observe(no_evidence(), sparsity=0.5, rank=1.0, discount=0.9, **cost)[0, :4].tolist()
    [0.25, 0.5, 0.5, 1.5]
    """
    if not np.isfinite([seconds, compute_seconds]).all():
        raise ValueError(f"expected finite seconds, got {seconds} and {compute_seconds}")
    link = log_of_byte(seconds=seconds, compute_seconds=compute_seconds, bytes=bytes)
    seen = [*_features(sparsity, rank), compute_seconds, link, bytes / 1e6]
    before = evidence if evidence.shape == (SEEN, SEEN) else no_evidence()
    return discount * before + np.outer(seen, seen)


def coefficients_of(
    evidence: Mapping[str, Evidence], devices: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """a, b and c of these devices, none negative, from what is known of any; zeros where nothing
    is.

    What a device's own rounds do not determine of its computing comes from the common coefficients,
    at its speed. One that has never replied has a middling speed and a middling link.
    """
    wanted = list(devices)
    known = {id: each for id, each in evidence.items() if each.shape == (SEEN, SEEN)}
    if not known:
        return {device: np.zeros(FEATURES) for device in wanted}
    moments = np.stack([*known.values(), no_evidence()])  # the last one is of a new device
    own = moments[:-1]
    weights = own[:, FEATURES - 1, FEATURES - 1]
    links, _ = expected_links(weights, weights, own[:, FEATURES - 1, LINK], own[:, LINK, LINK])
    gram, computing = moments[:, :FEATURES, :FEATURES], moments[:, :FEATURES, COMPUTING]
    common = common_coefficients(gram[:-1], computing[:-1])
    everybody = gram.sum(0)
    megabytes = _least_squares(everybody + _undecided(everybody), own[:, :FEATURES, TRAFFIC].sum(0))
    found = coefficients(gram, computing, common) + 1e6 * links[:, None] * megabytes
    places = {id: place for place, id in enumerate(known)}
    return {device: found[places.get(device, len(known))] for device in wanted}


def common_coefficients(
    gram: NDArray[np.float64], moment: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The coefficients of a device of middling speed, from the sums of all devices, [devices, 3, 3]
    and [devices, 3]; zeros where nothing took any time.

    Their ratios are those with which devices' own rounds agree best, each at a speed of its own.
    Devices are compared with themselves alone: the slower ones are given less to do, so that across
    devices work would seem to take no time.
    """
    timed = moment[:, -1] > 0
    gram, moment = gram[timed], moment[timed]
    if not len(gram):
        return np.zeros(FEATURES)
    everybody = gram.sum(0)
    everybody = everybody + _undecided(everybody)
    common = np.ones(FEATURES)
    for _ in range(ITERATIONS):
        slowness = _slowness(common, gram, moment)
        common = _least_squares(everybody, (moment / slowness[:, None]).sum(0))
    return float(np.median(_slowness(common, gram, moment))) * common


def coefficients(
    gram: NDArray[np.float64], moment: NDArray[np.float64], common: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The coefficients of a stack of devices, [..., 3], from their own sums [..., 3, 3] and [...,
    3]; what these do not determine comes from the `common` ones at the device's speed.
    """
    usual = _slowness(common, gram, moment)[..., None] * common
    prior = LIKE_THE_FLEET * np.eye(FEATURES)
    return _least_squares(gram + prior, moment + LIKE_THE_FLEET * usual)


def predicted(coefficients: NDArray[np.float64], *, sparsity: float, rank: float) -> float:
    """Seconds of a round at a sparsity and a share of the largest rank."""
    return float(_features(sparsity, rank) @ coefficients)


def _slowness(
    common: NDArray[np.float64], gram: NDArray[np.float64], moment: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How many times as long as the common coefficients say each of a stack of devices took, in
    least squares; 1 where they say nothing.
    """
    took, expected = _dot(common, moment), _form(common, gram, common)
    return np.divide(took, expected, out=np.ones_like(expected), where=(expected > 0) & (took > 0))


def _undecided(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    return UNDECIDED * max(float(np.trace(gram)), 1.0) * np.eye(FEATURES)


def _features(sparsity: float, rank: float) -> NDArray[np.float64]:
    return np.array([1 - sparsity, rank, 1.0])


def _least_squares(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares with nonnegative coefficients, since no device gets faster by more work. Tries
    every set of zeros, for all sums [..., 3, 3] and [..., 3] of a stack at once.
    """
    best, lowest = np.zeros_like(moment), np.zeros(moment.shape[:-1])
    for size in range(1, FEATURES + 1):
        for used in map(list, combinations(range(FEATURES), size)):
            trial = np.zeros_like(moment)
            within = gram[..., used, :][..., used]
            trial[..., used] = np.linalg.solve(within, moment[..., used, None])[..., 0]
            error = _form(trial, gram, trial) - _dot(2 * moment, trial)
            better = (trial.min(-1) >= 0) & (error < lowest)
            best = np.where(better[..., None], trial, best)
            lowest = np.where(better, error, lowest)
    return best


def _form(
    left: NDArray[np.float64], gram: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """left^T gram right of each of a stack."""
    return (left[..., None, :] @ gram @ right[..., :, None])[..., 0, 0]


def _dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inner product of each of a stack."""
    return (left[..., None, :] @ right[..., :, None])[..., 0, 0]
