"""The rows of a device's batches within a round: a fixed number of rows, or as many as fill a
number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedspine.core.checks import Asked, need
from fedspine.core.message import message

AHEAD = 16  # the last rows of a batch of tokens are chosen among this many next rows
# rows are taken in order while there is room for more rows of mean length than this
FREELY = 3.0


@message
class Budget:
    """Batches of as many rows as nearly fill `tokens`: at least one row, at most `rows`. Ours."""

    tokens: int
    rows: int

    def check(self, asked: Asked) -> None:
        need(min(self.tokens, self.rows) >= 1, "a batch needs at least 1 token and 1 row")


def most_rows(batch: int | Budget) -> int:
    """The largest number of rows of such a batch."""
    return batch if isinstance(batch, int) else batch.rows


@dataclass(frozen=True)
class Drawn:
    """A batch, and what determines the next one."""

    rows: np.ndarray  # int64 [rows]
    taken: int  # rows of the passes that were in line so far
    left: np.ndarray  # int64 [rows]: those of them that are still in line, in order


def drawn(
    lengths: np.ndarray, batch: int | Budget, seed: int, taken: int = 0, left: Sequence[int] = ()
) -> Drawn:
    """The next batch of rows with these numbers of tokens.

    >>> first = drawn(np.full(5, 4), 3, seed=0)
    >>> second = drawn(np.full(5, 4), Budget(tokens=9, rows=4), 0, first.taken, first.left)
    >>> len(first.rows), sorted({*first.rows.tolist(), *second.rows.tolist()}), len(second.left)
    (3, [0, 1, 2, 3, 4], 3)
    """
    there = len(lengths)
    wanted = min(batch if isinstance(batch, int) else batch.rows + AHEAD, there)
    fresh = max(0, wanted - len(left))
    line = np.concatenate([np.asarray(left, np.int64), rows_from(there, fresh, seed, taken)])
    if isinstance(batch, int):
        return Drawn(rows=line[:wanted], taken=taken + fresh, left=line[wanted:])
    places = filling(lengths[line], batch.tokens, batch.rows)
    return Drawn(rows=line[places], taken=taken + fresh, left=np.delete(line, places))


def filling(lengths: np.ndarray, tokens: int, most: int) -> list[int]:
    """Places of rows in line that together have at most, and nearly, `tokens` tokens.

    Rows are taken in order while many fit, then the longest that fits among the next `AHEAD`. If
    none fits at all, the shortest of these is taken: a row longer than `tokens` waits until only
    such rows are left among them.

    >>> filling(np.array([5, 9, 4, 7, 5, 3]), 20, 9), filling(np.array([9, 8]), 5, 9)
    ([0, 1, 4], [1])
    """
    line, picked, spare = list(range(len(lengths))), [], tokens
    plenty = FREELY * lengths.mean()
    while len(picked) < most:
        fit = [place for place in line[:AHEAD] if lengths[place] <= spare]
        if not fit:
            break
        place = fit[0] if spare > plenty else max(fit, key=lambda place: lengths[place])
        picked.append(place)
        line.remove(place)
        spare -= lengths[place]
    return picked or [int(lengths[:AHEAD].argmin())]


def rows_at(there: int, batch: int, seed: int, iteration: int) -> np.ndarray:
    """The rows of one of many equal batches, from consecutive passes over all rows, each in its own
    random order.

    >>> sorted(rows_at(4, 2, 0, 0).tolist() + rows_at(4, 2, 0, 1).tolist())
    [0, 1, 2, 3]
    >>> len(rows_at(4, 9, 0, 5))
    4
    """
    return rows_from(there, batch, seed, iteration * min(batch, there))


def rows_from(there: int, batch: int, seed: int, taken: int) -> np.ndarray:
    """The rows of the batch after the first `taken` rows of such passes.

    >>> sorted(rows_from(4, 3, 0, 0).tolist() + rows_from(4, 1, 0, 3).tolist())
    [0, 1, 2, 3]
    """
    batch = min(batch, there)
    if not batch:
        return np.empty(0, np.int64)
    first, last = taken // there, (taken + batch - 1) // there
    start = taken - first * there
    return np.concatenate([_pass_order(there, seed, number) for number in range(first, last + 1)])[
        start : start + batch
    ]


@lru_cache(maxsize=256)  # a round asks for many batches of the same few passes
def _pass_order(there: int, seed: int, number: int) -> np.ndarray:
    """All rows in the order of one pass."""
    return np.random.default_rng([seed, number]).permutation(there)
