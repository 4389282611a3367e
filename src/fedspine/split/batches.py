"""Which rows of a device make up its batches within a round."""

from functools import lru_cache

import numpy as np


def rows_at(there: int, batch: int, seed: int, iteration: int) -> np.ndarray:
    """The rows of one of many equal batches: pass after pass over all rows, each in an order of its own.

    >>> sorted(rows_at(4, 2, 0, 0).tolist() + rows_at(4, 2, 0, 1).tolist()), len(rows_at(4, 9, 0, 5))
    ([0, 1, 2, 3], 4)
    """
    return rows_from(there, batch, seed, iteration * min(batch, there))


def rows_from(there: int, batch: int, seed: int, taken: int) -> np.ndarray:
    """The rows of the batch that comes after `taken` rows of such passes.

    >>> sorted(rows_from(4, 3, 0, 0).tolist() + rows_from(4, 1, 0, 3).tolist())
    [0, 1, 2, 3]
    """
    batch = min(batch, there)
    first, last = taken // there, (taken + batch - 1) // there
    start = taken - first * there
    return np.concatenate([_pass(there, seed, number) for number in range(first, last + 1)])[start : start + batch]


@lru_cache(maxsize=256)  # a round asks for many batches of the same few passes
def _pass(there: int, seed: int, number: int) -> np.ndarray:
    """All rows in the order of one pass."""
    return np.random.default_rng([seed, number]).permutation(there)
