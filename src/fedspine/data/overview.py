"""Statistics of a data set: rows, classes, duplicates, and each device's share."""

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fedspine.data.dataset import Dataset, Rows


def overview(data: Dataset) -> dict[str, Any]:
    """Rows by split, rows left out by reason, rows of each class, and duplicates across the splits.

    `doubles` counts the test rows whose text, pair of texts, or array is also a training row.

    >>> train = Rows(("a", "b"), None, np.array([0, 1]), {})
    >>> test = Rows(("b",), None, np.array([1]), {})
    >>> overview(Dataset("x.csv", train, test, ("no", "yes"), None))
    {'rows': {'train': 2, 'test': 1}, 'left_out': {}, 'classes': {'no': 1, 'yes': 2}, 'doubles': 1}
    """
    learnt = set(_contents(data.train))
    return {
        "rows": {"train": len(data.train), "test": len(data.test)},
        "left_out": dict(data.left_out),
        "classes": {
            name: of_train + of_test
            for name, of_train, of_test in zip(
                data.label_names,
                _counts(data, data.train.labels),
                _counts(data, data.test.labels),
                strict=True,
            )
        },
        "doubles": sum(content in learnt for content in _contents(data.test)),
    }


def holdings(
    data: Dataset, names: Sequence[str], shares: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """For each device its name, its number of training rows, and its rows of each class."""
    found = []
    for name, share in zip(names, shares, strict=True):
        held = None if data.train.labels is None else data.train.labels[share]
        counts = _counts(data, held)
        classes = {of: count for of, count in zip(data.label_names, counts, strict=True) if count}
        found.append({"device": name, "rows": len(share), "classes": classes})
    return found


def _counts(data: Dataset, labels: np.ndarray | None) -> list[int]:
    if labels is None:
        return []
    return np.bincount(labels, minlength=len(data.label_names)).tolist()


def _contents(rows: Any) -> list[Hashable]:
    """Keys that are equal for duplicate rows; texts are compared without case and extra white
    space.
    """
    if isinstance(rows, Rows):
        pairs = rows.pairs or [""] * len(rows.texts)
        return [(_same(text), _same(pair)) for text, pair in zip(rows.texts, pairs, strict=True)]
    return [hashlib.sha256(np.ascontiguousarray(x).tobytes()).digest() for x in rows.x]


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()
