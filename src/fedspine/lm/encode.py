"""Texts to token ids: cut at `max_tokens` for classification, in consecutive windows for language modelling."""

from typing import Any

import numpy as np

from fedspine.data.tasks import Rows
from fedspine.task import Examples, Kind


def encode(tokenizer: Any, rows: Rows, kind: Kind, max_tokens: int) -> Examples:
    """Tokenise a split once; every row has at most `max_tokens` tokens, special ones included."""
    texts = list(rows.texts)
    if kind == "causal-lm":
        windows = [
            ids[start : start + max_tokens]
            for ids in tokenizer(texts, verbose=False)["input_ids"]
            for start in range(0, len(ids), max_tokens)
            if len(ids) - start > 1 or start == 0  # a lone token at the end has nothing to predict
        ]
        return _flat(windows, None, None, tokenizer.pad_token_id)
    pairs = None if rows.pairs is None else list(rows.pairs)
    coded = tokenizer(texts, pairs, truncation=True, max_length=max_tokens)
    segments = coded.get("token_type_ids") if pairs is not None else None
    return _flat(coded["input_ids"], rows.labels, segments, tokenizer.pad_token_id)


def owners(tokenizer: Any, rows: Rows, max_tokens: int) -> np.ndarray:
    """For language modelling, the row that each window of `encode` came from: int64 [windows]."""
    lengths = [len(ids) for ids in tokenizer(list(rows.texts), verbose=False)["input_ids"]]
    windows = [max(1, (n - 2) // max_tokens + 1) for n in lengths]
    return np.repeat(np.arange(len(lengths)), windows)


def _flat(ids: list[list[int]], labels: np.ndarray | None, segments: list[list[int]] | None, padding: int) -> Examples:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Examples(
        ids=np.fromiter((i for row in ids for i in row), np.int32, int(offsets[-1])),
        offsets=offsets,
        labels=None if labels is None else np.asarray(labels, np.int64),
        segments=None if segments is None else np.fromiter((i for row in segments for i in row), np.uint8),
        padding=padding,
    )
