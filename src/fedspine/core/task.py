"""The task that a run solves: a base model, encoded examples and what is measured on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

    from fedspine.core.privacy import Privacy

TaskKind: TypeAlias = Literal["classification", "pair", "causal-lm", "array"]
BUILT_IN_MODELS = ("minilm", "smollm2")
AUTO = "auto"  # the model is chosen for the data
NETS = ("alexnet", "alexnet-small", "cnn-h", "cnn-s", "vgg16", "vgg-small")  # models of arrays
BUILT_IN_DATA = ("pydoc-topics", "pydoc-qa")
IGNORED = -100  # a label position that no loss counts
# how a classifier reads rows
Pooling: TypeAlias = Literal["mean", "cls", "bi-encoder"]
GRAIN = 8  # padded lengths are multiples of it: fewer shapes for kernels to be made for


def row_tokens(pooling: Pooling | Literal["auto"] | None, max_tokens: int) -> int:
    """The most tokens of a row if a text has at most `max_tokens`: a bi-encoder's row holds both
    texts of a pair, each truncated separately.
    """
    return 2 * max_tokens if pooling == "bi-encoder" else max_tokens


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in flat arrays, one after another: row i is `ids[offsets[i]:offsets[i+1]]`."""

    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [rows + 1]
    labels: np.ndarray | None  # int64 [rows]; None: the next token is the label
    segments: np.ndarray | None  # uint8 [tokens], which text of a pair a token belongs to
    padding: int  # the token id that fills short rows
    # int64 [rows], the text each row was cut from; None: every text is one row
    sources: np.ndarray | None = None
    # int64 [rows], tokens at the start of each row that are read and not counted; None: all count
    context: np.ndarray | None = None
    # bool [tokens], those that are labels, never the first of a text; None: all
    counted: np.ndarray | None = None
    # int32 [tokens], the place of each token in its own text, where rows hold several texts, which
    # do not see each other; None: every row is of one text
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Examples":
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Examples(
            ids=self.ids[index],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[rows],
            segments=None if self.segments is None else self.segments[index],
            padding=self.padding,
            sources=None if self.sources is None else self.sources[rows],
            context=None if self.context is None else self.context[rows],
            counted=None if self.counted is None else self.counted[index],
            positions=None if self.positions is None else self.positions[index],
        )

    def texts_of(self, rows: np.ndarray) -> np.ndarray:
        """The index of the text that each of these rows was cut from; for most tasks the row."""
        return rows if self.sources is None else self.sources[rows]

    def prompt(self, row: int) -> np.ndarray:
        """What a language model is given of a row to continue it, int32 [tokens]: of a dialogue all
        before the first label, of another text its first half, one token at least.
        """
        part = slice(self.offsets[row], self.offsets[row + 1])
        ids = self.ids[part]
        if self.counted is not None and self.counted[part].any():
            return ids[: self.counted[part].argmax()]
        return ids[: max(1, len(ids) // 2)]

    def predicted(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The number of labels in each of these rows: its class, or its tokens except the first and
        the context, or those that are `counted`.
        """
        if self.labels is not None:
            return np.ones(len(rows), np.int64)
        if self.counted is not None:
            until = np.concatenate([[0], np.cumsum(self.counted)])
            return until[self.offsets[1:][rows]] - until[self.offsets[:-1][rows]]
        skipped = 1 if self.context is None else np.maximum(1, self.context[rows])
        return np.maximum(0, self.lengths[rows] - skipped)

    def width(self, rows: Sequence[int] | np.ndarray) -> int:
        """The tokens to which these rows are padded: their longest, rounded up to `GRAIN`, but not
        beyond the longest row of all, which the model can read.
        """
        lengths = self.lengths[rows]
        # at least 1: a text may have no token at all
        return max(1, int(min(-(-lengths.max() // GRAIN) * GRAIN, self.lengths.max())))

    def places(self, rows: Sequence[int] | np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The index of each token of these rows in the flat arrays, and a mask of real tokens: both
        [rows, width].
        """
        columns = np.arange(width)[None, :]
        inside = columns < self.lengths[rows][:, None]
        return np.where(inside, self.offsets[rows][:, None] + columns, 0), inside

    def batch(
        self, rows: Sequence[int] | np.ndarray, width: int | None = None
    ) -> dict[str, "torch.Tensor"]:
        """Model inputs for these rows, padded to `width` (default: their own).

        All are int64: `input_ids`, `attention_mask` and, if there are any, `token_type_ids` and
        `position_ids` of [rows, width]; `labels` of [rows], or for language models [rows, width]
        with `IGNORED` where no label counts. Padding is decided by place: a padding id within a
        text, which may be its end token, is a label.
        """
        import torch

        index, inside = self.places(rows, self.width(rows) if width is None else width)
        ids = np.where(inside, self.ids[index], self.padding).astype(np.int64)
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
        }
        if self.segments is not None:
            inputs["token_type_ids"] = torch.from_numpy(
                np.where(inside, self.segments[index], 0).astype(np.int64)
            )
        if self.positions is not None:
            inputs["position_ids"] = torch.from_numpy(
                np.where(inside, self.positions[index], 0).astype(np.int64)
            )
        if self.labels is not None:
            labels = self.labels[rows]
        else:
            counted = inside
            if self.context is not None:
                counted = inside & (np.arange(ids.shape[1]) >= self.context[rows][:, None])
            if self.counted is not None:
                counted = counted & self.counted[index]
            labels = np.where(counted, ids, IGNORED)
        return inputs | {"labels": torch.from_numpy(labels)}

    def batches_by_length(self, size: int) -> Iterator[np.ndarray]:
        """All rows once, in batches of `size` rows of similar length, so that little is padded."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]


@dataclass(frozen=True)
class Arrays:
    """Rows of numbers, all of one shape: images, sensor windows, audio clips.

    uint8 values go from 0 to 255 and stand for 0 to 1; float32 values are what a net reads.
    """

    x: np.ndarray  # uint8 or float32 [rows, channels, ...]
    labels: np.ndarray  # int64 [rows]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def lengths(self) -> np.ndarray:
        """1 for each row, in place of the tokens of `Examples`."""
        return np.ones(len(self), np.int64)

    def take(self, rows: np.ndarray) -> "Arrays":
        """These rows, in this order."""
        return Arrays(x=self.x[rows], labels=self.labels[rows])

    def texts_of(self, rows: np.ndarray) -> np.ndarray:
        """The rows themselves."""
        return rows

    def predicted(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """1 for each row: its class."""
        return np.ones(len(rows), np.int64)

    def width(self, rows: Sequence[int] | np.ndarray) -> int:
        """1, whatever the rows: nothing is padded."""
        return 1

    def batch(
        self, rows: Sequence[int] | np.ndarray, width: int | None = None
    ) -> dict[str, "torch.Tensor"]:
        """`inputs`, float32 [rows, channels, ...], and `labels`, int64 [rows]; `width` makes no
        difference.
        """
        import torch

        inputs = torch.from_numpy(self.x[rows])
        if inputs.dtype is torch.uint8:
            inputs = inputs.float() / 255
        return {"inputs": inputs, "labels": torch.from_numpy(self.labels[rows])}

    def batches_by_length(self, size: int) -> Iterator[np.ndarray]:
        """All rows once, in their order."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))


Data: TypeAlias = Examples | Arrays


@dataclass(frozen=True)
class Task:
    """Everything that a method knows before the first round."""

    kind: TaskKind
    base: Any  # a `Base` of `lm` for texts, a `Net` of `nets` for arrays
    train: Data
    test: Data
    label_names: tuple[str, ...]
    max_tokens: int  # of a row; 1 for arrays
    rounds: int
    # how often a device trains in the whole run, on average; 0: caches for later rounds do not pay
    turns: float = 1.0
    privacy: "Privacy | None" = None  # what the run promises each device
