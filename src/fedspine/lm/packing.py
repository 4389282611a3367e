"""Packing: several short texts in one row, so that little is padded.

Texts of a row do not see each other: each token attends to the earlier ones of its own text, whose
positions begin at 0. So a text's logits are those that it has alone, but for rounding.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedspine.core.task import Examples


def packed(
    data: Examples, shares: Sequence[np.ndarray], max_tokens: int
) -> tuple[Examples, tuple[np.ndarray, ...]]:
    """The rows with those of each device packed into rows of at most `max_tokens` tokens, and each
    device's rows among these.

    Rows of two devices never share one. A row's source is that of its first text.
    """
    bins = [_bins(data.lengths[share], share, max_tokens) for share in shares]
    flat = [rows for of_device in bins for rows in of_device]
    ordered = data.take(np.concatenate(flat))
    lengths = ordered.lengths
    starts = np.repeat(ordered.offsets[:-1], lengths)
    positions = np.arange(len(ordered.ids)) - starts
    counted = np.ones(len(positions), bool) if ordered.counted is None else ordered.counted.copy()
    counted[positions == 0] = False  # nothing in the row precedes it
    first = np.concatenate([[0], np.cumsum([len(rows) for rows in flat])])
    whole = replace(
        ordered,
        offsets=ordered.offsets[first],
        sources=ordered.texts_of(np.arange(len(ordered)))[first[:-1]],
        counted=counted,
        positions=positions.astype(np.int32),
    )
    ends = np.cumsum([len(of_device) for of_device in bins])
    return whole, tuple(np.arange(end - len(of), end) for of, end in zip(bins, ends, strict=True))


def _bins(lengths: np.ndarray, rows: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows in bins of at most so many tokens: the longest first, each into the fullest bin that
    has room for it.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in each bin, ascending
    for place in np.argsort(-lengths, kind="stable"):
        length = int(lengths[place])
        found = bisect_left(room, (length, -1))
        if found == len(room):
            bins.append([])
            left, chosen = most, len(bins) - 1
        else:
            left, chosen = room.pop(found)
        bins[chosen].append(int(rows[place]))
        insort(room, (left - length, chosen))
    return [np.array(each) for each in bins]
