"""Texts to token ids: cut at `max_tokens` for classification, in consecutive windows for language modelling."""

from dataclasses import replace
from typing import Any

import numpy as np

from fedspine.data.tasks import Rows
from fedspine.task import Examples, Kind


def encode(tokenizer: Any, rows: Rows, kind: Kind, max_tokens: int) -> Examples:
    """Tokenise a split once; every row has at most `max_tokens` tokens, special ones included."""
    texts = list(rows.texts)
    if kind == "causal-lm":
        windows, sources = [], []
        for text, ids in enumerate(tokenizer(texts, verbose=False)["input_ids"]):
            # a lone token at the end has nothing to predict
            starts = [
                start
                for start in range(0, len(ids), max_tokens)
                if len(ids) - start > 1 or start == 0
            ]
            windows += [ids[start : start + max_tokens] for start in starts]
            sources += [text] * len(starts)
        return replace(
            _flat(windows, None, None, tokenizer.pad_token_id), sources=np.array(sources, np.int64)
        )
    pairs = None if rows.pairs is None else list(rows.pairs)
    coded = tokenizer(texts, pairs, truncation=True, max_length=max_tokens)
    segments = coded.get("token_type_ids") if pairs is not None else None
    return _flat(coded["input_ids"], rows.labels, segments, tokenizer.pad_token_id)


def _flat(
    ids: list[list[int]], labels: np.ndarray | None, segments: list[list[int]] | None, padding: int
) -> Examples:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Examples(
        ids=np.fromiter((i for row in ids for i in row), np.int32, int(offsets[-1])),
        offsets=offsets,
        labels=None if labels is None else np.asarray(labels, np.int64),
        segments=None
        if segments is None
        else np.fromiter((i for row in segments for i in row), np.uint8),
        padding=padding,
    )
