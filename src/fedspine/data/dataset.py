"""The types of data sets: rows of texts or arrays, in a train and a test split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspine.core.errors import BadInput

ANSWERS = "assistant"  # the role whose messages are answers
TEST_FRACTION = 5  # one row in five is held out for testing if the data has no test rows
_SPLIT_SEED = 20260101  # the same rows for everyone, whatever the seed of a run


@dataclass(frozen=True)
class Dialogue:
    """A conversation that ends with an answer and does not begin with one.

    `messages` are pairs of role and content; the contents of the role `ANSWERS` are learnt. `where`
    is its row in the data, for messages to the user.
    """

    messages: tuple[tuple[str, str], ...]
    where: str = "a row"


@dataclass(frozen=True)
class Rows:
    """One split: `texts` and, for pairs of sentences, `pairs` of the same length; `labels` int64
    [rows].

    `pairs` is None without a second sentence, `labels` is None for language modelling. `columns`
    holds the columns that a partition may need, as strings. `dialogues` are the rows as
    conversations whose answers are learnt, with the same content in `texts`; None if whole texts
    are learnt.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray | None
    columns: Mapping[str, Sequence[str]]
    dialogues: tuple[Dialogue, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int]) -> "Rows":
        """The rows at these indices, in this order."""
        return Rows(
            texts=tuple(self.texts[row] for row in index),
            pairs=None if self.pairs is None else tuple(self.pairs[row] for row in index),
            labels=None if self.labels is None else self.labels[index],
            columns={
                name: tuple(values[row] for row in index) for name, values in self.columns.items()
            },
            dialogues=None
            if self.dialogues is None
            else tuple(self.dialogues[row] for row in index),
        )


@dataclass(frozen=True)
class ArrayRows:
    """One split: `x` uint8 or float32 [rows, ...], `labels` int64 [rows]; `columns` as strings, for
    a partition.
    """

    x: np.ndarray
    labels: np.ndarray
    columns: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Sequence[int]) -> "ArrayRows":
        """The rows at these indices, in this order."""
        return ArrayRows(
            x=self.x[index],
            labels=self.labels[index],
            columns={
                name: tuple(values[row] for row in index) for name, values in self.columns.items()
            },
        )


@dataclass(frozen=True)
class Dataset:
    """A train and a test split with the same classes; `natural` is the column that names a natural
    device, if any.

    A label is an index into `label_names`, which is empty for language modelling. `left_out` counts
    the rows left out of both splits, by reason; `tasks.remarks` reports them with the other `notes`
    on how the data was read.
    """

    name: str
    train: Rows | ArrayRows
    test: Rows | ArrayRows
    label_names: tuple[str, ...]
    natural: str | None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    not_drawn: int = 0  # training rows outside the random sample


def held_out(labels: Sequence[Any] | np.ndarray | None, rows: int) -> tuple[list[int], list[int]]:
    """The indices of the training rows, and of a random fifth for testing; a class keeps its rows
    for training if it would have none there.

    Both ascending. Raises BadInput if either would be empty.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    count = max(1, len(order) // TEST_FRACTION)
    held, kept = order[:count].tolist(), order[count:].tolist()
    if labels is not None:
        learned = {labels[row] for row in kept}
        kept += [row for row in held if labels[row] not in learned]
        held = [row for row in held if labels[row] in learned]
    if labels is not None and not held and len(set(labels)) == rows > 2:
        raise BadInput(
            f"expected classes of several rows each, to set a fifth of them aside for testing, but "
            f"each of the {rows} rows has its own label; name another label column, or give a "
            "separate test file"
        )
    if not kept or not held:
        raise BadInput(
            f"expected enough rows to set a fifth aside for testing, found {len(order)}; "
            "give more rows, or a separate test file"
        )
    return sorted(kept), sorted(held)
