"""A latency model of each device, fitted to the times that it reported.

The option `rls` of FedSpine (reconstructed), section 4: seconds = a * (1 - sparsity) + b * rank + c
is fitted to each device by recursive least squares with forgetting. In information form the
evidence is a sum of outer products, so it can be added up: a device with few rounds is assumed to
be like the fleet, but for its speed. What the fleet has in common is learnt within devices [ours].
"""

from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedspine.core.message import message

Evidence = NDArray[
    np.float64
]  # [3, 4]: discounted sums of features x features and features x seconds

FEATURES = 3  # 1 - sparsity, rank over the largest, 1
LIKE_THE_FLEET = 0.1  # plays' worth of the fleet's coefficients in each device's
# A fleet that has only ever run unpruned cannot tell a from c; so small a weight shares its time
# out evenly.
UNDECIDED = 1e-6
ITERATIONS = 20  # of the common coefficients, each of which refits the speeds


@message
class LatencyModel:
    """The latency model of one device: the `evidence` of the rounds that it reported."""

    evidence: np.ndarray


def no_evidence() -> Evidence:
    return np.zeros((FEATURES, FEATURES + 1))


def observe(
    evidence: Evidence, *, sparsity: float, rank: float, seconds: float, discount: float
) -> Evidence:
    """The evidence after one more round, the older ones discounted; `rank` is a share of the
    largest.

    Raises ValueError for a time that is not finite.

    >>> observe(no_evidence(), sparsity=0.5, rank=1.0, seconds=4.0, discount=0.9)[0].tolist()
    [0.25, 0.5, 0.5, 2.0]
    """
    if not np.isfinite(seconds):
        raise ValueError(f"expected finite seconds, got {seconds}")
    return add(evidence, _features(sparsity, rank), seconds, discount)


def add(
    evidence: Evidence, features: NDArray[np.float64], seconds: float, discount: float
) -> Evidence:
    """The evidence after one more exchange with these `features` [3], the older ones discounted."""
    return discount * evidence + np.outer(features, [*features, seconds])


def common_coefficients(evidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """a, b and c of a device of middling speed, none negative, from the evidence of all, [devices,
    3, 4]; zeros where nothing is known.

    Their ratios are those with which devices' own rounds agree best, each at a speed of its own.
    Devices are compared with themselves alone: the slower ones are given less to do, so that across
    devices work would seem to take no time.
    """
    evidence = evidence[evidence[:, -1, FEATURES] > 0]  # of those that took any time
    if not len(evidence):
        return np.zeros(FEATURES)
    gram, moment = evidence[..., :FEATURES], evidence[..., FEATURES]
    everybody = gram.sum(0)
    everybody += UNDECIDED * max(np.trace(everybody), 1.0) * np.eye(FEATURES)
    common = np.ones(FEATURES)
    for _ in range(ITERATIONS):
        slowness = _slowness(common, gram, moment)
        common = _least_squares(everybody, (moment / slowness[:, None]).sum(0))
    return float(np.median(_slowness(common, gram, moment))) * common


def coefficients(own: Evidence, common: NDArray[np.float64]) -> NDArray[np.float64]:
    """a, b and c of a device, none negative, from its own evidence and the `common` ones [3]; for a
    stack of devices, [..., 3] from [..., 3, 4].

    What the device's own rounds do not determine comes from the common ones, scaled by how much
    slower or faster the device was in its rounds.
    """
    gram, moment = own[..., :FEATURES], own[..., FEATURES]
    usual = _slowness(common, gram, moment)[..., None] * common
    prior = LIKE_THE_FLEET * np.eye(FEATURES)
    return _least_squares(gram + prior, moment + LIKE_THE_FLEET * usual)


def coefficients_of(
    evidence: Mapping[str, Evidence], devices: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """The coefficients of these devices, from what is known of any; one that has never replied gets
    the common ones.
    """
    common = common_coefficients(np.stack([no_evidence(), *evidence.values()]))
    own = {device: evidence.get(device, no_evidence()) for device in devices}
    if not own:
        return {}
    return dict(zip(own, coefficients(np.stack(list(own.values())), common), strict=True))


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
