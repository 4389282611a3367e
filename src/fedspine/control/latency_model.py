"""A latency model of each device, fitted to the times that it reported.

The option `rls` of FedSpine (reconstructed), section 4: seconds = a * (1 - sparsity) + b * rank + c
is fitted to each device by recursive least squares with forgetting. In information form the
evidence is a sum of outer products, so it can be added up over devices: a device with few rounds is
assumed to be like the fleet.
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


def coefficients(own: Evidence, fleet: Evidence) -> NDArray[np.float64]:
    """a, b and c of a device, none negative, from its own evidence and the sum over the fleet's;
    for a stack of devices, [..., 3] from [..., 3, 4].

    What the device's own rounds do not determine comes from the fleet's coefficients, scaled by how
    much slower or faster the device was in its rounds.
    """
    undecided = UNDECIDED * max(np.trace(fleet[:, :FEATURES]), 1.0) * np.eye(FEATURES)
    common = _least_squares(fleet[:, :FEATURES] + undecided, fleet[:, FEATURES])
    # of its squared times, if it were as fast as the fleet
    expected = _form(common, own[..., :FEATURES], common)
    moment = own[..., FEATURES]
    slowdown = np.ones_like(expected)
    np.divide(_dot(common, moment), expected, out=slowdown, where=expected > 0)
    prior = LIKE_THE_FLEET * np.eye(FEATURES)
    return _least_squares(
        own[..., :FEATURES] + prior, moment + LIKE_THE_FLEET * (slowdown[..., None] * common)
    )


def coefficients_of(
    known: Mapping[str, LatencyModel], devices: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """The coefficients of these devices; one that has never replied gets those of the fleet."""
    fleet = sum((each.evidence for each in known.values()), no_evidence())
    own = {
        device: known[device].evidence if device in known else no_evidence() for device in devices
    }
    if not own:
        return {}
    return dict(zip(own, coefficients(np.stack(list(own.values())), fleet), strict=True))


def predicted(coefficients: NDArray[np.float64], *, sparsity: float, rank: float) -> float:
    """Seconds of a round at a sparsity and a share of the largest rank."""
    return float(_features(sparsity, rank) @ coefficients)


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
