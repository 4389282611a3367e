"""Device speeds from the exchanges of the current split round, and batches with which all devices
finish at the same time.

Ours; MergeSFL's Eq. 9 uses only the speed of earlier rounds and has no fixed cost of an exchange.
The model: seconds of an exchange = fixed + each * load, with one `fixed` for the fleet and one
`each` per device.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from fedspine.control.batch_sizes import waiting_share

TRUST = 0.1  # in a fixed part known before, in exchanges of every device
PART = 0.9  # of the shortest exchange that may be fixed: no device's load is free
# of the longest iteration that the limits allow: how far it may be cut for less waiting
SHORTER = 0.75
LEAST_COST = 1e-9  # of the slowest's seconds per row, which no worker's fall below
TRIALS = 256  # iterations that are compared


def fitted(
    loads: Sequence[Float[np.ndarray, " exchanges"]],
    seconds: Sequence[Float[np.ndarray, " exchanges"]],
    usual: float = 0.0,
) -> tuple[float, Float[np.ndarray, " devices"]]:
    """The fixed part and each device's seconds per unit of load, by least squares of the relative
    errors.

    Loads and seconds, one array per device, are above 0 and have at least one exchange each.
    `usual` is the fixed part known before. It counts like `TRUST` exchanges of every device, and
    decides alone if loads do not vary.

    >>> seconds = [np.array([3.0, 6.0]), np.array([4.0, 10.0])]
    >>> fixed, each = fitted([np.array([10.0, 40.0])] * 2, seconds)
    >>> bool(1 < fixed < 2), bool(0.1 < each[0] < each[1] < 0.25)
    (True, True)
    """
    towards = against = 0.0
    for load, taken in zip(loads, seconds, strict=True):
        weights = taken**-2.0
        scale = (weights * load**2).sum()
        # what the device's best slope leaves of its seconds, and of one fixed second
        left = taken - load * (weights * load * taken).sum() / scale
        left_of_one = 1 - load * (weights * load).sum() / scale
        trust = TRUST * weights.mean()
        towards += (weights * left * left_of_one).sum() + trust * usual
        against += (weights * left_of_one**2).sum() + trust
    shortest = min(float(taken.min()) for taken in seconds)
    fixed = float(np.clip(towards / against, 0, PART * shortest))
    pairs = zip(loads, seconds, strict=True)
    each = [
        (load * (taken - fixed) / taken**2).sum() / (load / taken).dot(load / taken)
        for load, taken in pairs
    ]
    return fixed, np.array(each)


def levelled(
    cost: Float[np.ndarray, " workers"],
    fixed: float,
    largest: int,
    most: Int[np.ndarray, " workers"],
    budget_rows: int,
) -> Int[np.ndarray, " workers"]:
    """Batch sizes with which all workers finish at the same time, in the longest iteration within
    the limits or one slightly shorter.

    `cost` is in seconds per row, and `fixed` the seconds that an iteration takes besides. Every
    worker gets at least 1 row and at most its own `most` and `largest` (D); together they get at
    most `budget_rows`, which is at least the number of workers. Of all iterations that last at
    least `SHORTER` times the longest one, the one is taken in which workers below their `most` wait
    least.

    >>> levelled(np.array([1.0, 2.0, 4.0]), 3.0, 8, np.array([8, 8, 8]), 100).tolist()
    [8, 4, 2]
    >>> levelled(np.array([1.0, 2.1, 1.0]), 0.0, 8, np.array([8, 8, 2]), 100).tolist()
    [6, 3, 2]
    """
    most = np.minimum(most, largest)
    # a worker that takes as long for any number of rows would get no number of them
    cost = np.maximum(cost, LEAST_COST * (cost.max() or 1.0))

    def rows_within(seconds: float) -> np.ndarray:  # of rows alone
        # a hair more than rounding may take away, so that a worker at its very end counts as done
        return np.clip(np.floor(seconds / cost * (1 + 1e-9)), 1, most).astype(np.int64)

    ends = np.unique(np.outer(cost, np.arange(1, largest + 1)))  # at which some worker is done
    # no longer than the fastest takes for D rows, unless the slowest takes longer for one
    ends = ends[ends <= max(largest * cost.min(), cost.max())]
    low, high = (
        0,
        len(ends),
    )  # sums never fall as iterations grow, and the first one has a row of each
    while high - low > 1:
        middle = (low + high) // 2
        if rows_within(ends[middle]).sum() <= budget_rows:
            low = middle
        else:
            high = middle
    ends = ends[: low + 1]
    ends = ends[fixed + ends >= SHORTER * (fixed + ends[-1])]
    trials = [
        rows_within(end) for end in ends[:: -max(1, len(ends) // TRIALS)]
    ]  # the longest first

    def waiting(rows: np.ndarray) -> float:
        seconds = fixed + rows * cost
        # one at its own most could not do more
        return waiting_share(np.where(rows < most, seconds, seconds.max()))

    return min(trials, key=waiting)


def early(
    ends: Float[np.ndarray, " workers"], step: float, least: int
) -> Int[np.ndarray, " workers"]:
    """The number of steps before the end at which each worker leaves the round, if it then needs
    `ends` seconds to finish.

    `least` workers stay to the last step, or all if there are fewer. A step takes `step` seconds.
    The chosen length of the round has the smallest sum of its time and the mean worker's waiting.

    >>> early(np.array([1.0, 1.0, 1.2, 4.1]), step=1.0, least=2).tolist()
    [0, 0, 0, 3]
    """
    longest = np.sort(ends)[min(least, len(ends)) - 1 :]  # ends of the last step's workers
    steps = np.maximum(np.ceil((ends - longest[:, None]) / step - 1e-9), 0).astype(np.int64)
    waiting = longest[:, None] + steps * step - ends
    return steps[np.argmin(longest + waiting.mean(axis=1))]
