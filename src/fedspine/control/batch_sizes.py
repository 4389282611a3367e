"""How many rows each device takes in one iteration, so that all finish it at the same time.

MergeSFL (Liao et al. 2024, arXiv:2311.13348), Eq. 7 to 9 and its scaling-up, as reconstructed.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int


def regulate(
    cost: Float[np.ndarray, " workers"],
    largest: int,
    most: Int[np.ndarray, " workers"],
    fastest: float | None = None,
) -> Int[np.ndarray, " workers"]:
    """Rows of each worker, int64 [workers]: as many as it processes while the fastest processes
    `largest` (D); Eq. 9.

    `cost` [workers], and `fastest` of the fastest worker, are in seconds per row. Without
    `fastest`, it is the smallest `cost`, so pass all eligible workers: the fastest counts even if
    it is not chosen. Every worker gets at least one row and at most `most` [workers], which its
    data and memory allow.

    >>> regulate(np.array([1.0, 2.0, 100.0]), 64, np.array([64, 20, 64])).tolist()
    [64, 20, 1]
    """
    # the ratio first: it is exactly 1 where costs are equal, so that equal workers get equal
    # batches
    rows = np.floor(largest * ((cost.min() if fastest is None else fastest) / cost)).astype(
        np.int64
    )
    return np.minimum(np.maximum(rows, 1), most)


def scaled_up(
    cost: Float[np.ndarray, " chosen"],
    largest: int,
    most: Int[np.ndarray, " chosen"],
    budget_rows: int,
    fastest: float,
) -> Int[np.ndarray, " chosen"]:
    """Eq. 9 for the longest iteration in which all batches together have at most `budget_rows` rows
    and each has at most `largest`.

    The iteration is no shorter than `largest` rows take the `fastest` worker, for which the budget
    must suffice. Batches grow in proportion to speed and are rounded once, since scaling rounded
    batches makes some workers wait. Growth ends when a worker reaches `largest`: beyond that, slow
    workers would grow while fast ones wait for them. A worker at its own `most` does not end it.

    >>> scaled_up(np.array([1.0, 2.1]), 64, np.array([64, 64]), 30, fastest=0.1).tolist()
    [20, 9]
    """
    # all iterations at whose very end some worker is done
    rows = np.tile(np.arange(1, largest + 1), len(cost))
    costs = np.repeat(cost, largest)
    longer = (rows * costs > largest * fastest) & (rows * costs <= largest * cost.min())
    order = np.flatnonzero(longer)[np.argsort((rows * costs)[longer], kind="stable")]
    batches, low, high = regulate(cost, largest, most, fastest), 0, len(order)
    while low < high:  # sums never fall as iterations grow
        middle = (low + high) // 2
        trial = regulate(cost, int(rows[order[middle]]), most, float(costs[order[middle]]))
        if trial.sum() <= budget_rows:
            batches, low = trial, middle + 1
        else:
            high = middle
    return batches


def waiting_share(seconds: Float[np.ndarray, " chosen"]) -> float:
    """The mean time that workers wait for the slowest one (W), divided by the slowest one's time.

    >>> waiting_share(np.array([4.0, 2.0]))
    0.25
    """
    return float(np.mean(seconds.max() - seconds) / seconds.max())


def rows_that_fit(needs: Callable[[int], int], memory_bytes: int, at_most: int) -> int:
    """The most rows, up to `at_most`, whose training needs no more than `memory_bytes`; 0 if a
    single row needs more.

    `needs(rows)` gives bytes and never falls as rows grow.

    >>> rows_that_fit(lambda rows: 100 + 10 * rows, 155, 64)
    5
    """
    fits, too_many = 0, at_most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needs(middle) <= memory_bytes:
            fits = middle
        else:
            too_many = middle
    return fits
