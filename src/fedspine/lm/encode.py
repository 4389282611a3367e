"""Texts to token ids: cut at `max_tokens` for classification, in windows for language modelling.

Windows as in the `transformers` guide "Perplexity of fixed-length models": plain slices of the
token sequence, of which only the first begins with the text's own beginning. Windows to train on
share one token, so that each token is predicted once; those to score share half a window, of which
nothing is counted again.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fedspine.core.task import Examples, TaskKind
from fedspine.data.dataset import Rows
from fedspine.lm.dialogues import encode_dialogues


def encode(
    tokenizer: Any,
    rows: Rows,
    kind: TaskKind,
    max_tokens: int,
    *,
    scored: bool = False,
    ended: bool = True,
    bi_encoder: bool = False,
) -> Examples:
    """Tokenise a split once; every row has at most `max_tokens` tokens, special ones included.

    Both texts of a pair make one text, or with `bi_encoder` each is one of its own with at most
    `max_tokens`, one behind the other in the row.

    For language modelling each text is `ended` by the tokenizer's end token, where it has one, and
    rows that are only `scored` begin with tokens of the window before (`Examples.context`). Of
    dialogues the answers alone count: `lm.dialogues`.
    """
    texts = list(rows.texts)
    if kind == "causal-lm" and rows.dialogues is not None:
        return encode_dialogues(tokenizer, rows.dialogues, max_tokens)
    if kind == "causal-lm":
        coded = tokenizer(texts, verbose=False)["input_ids"]
        whole = [_with_end(ids, tokenizer.eos_token_id, ended) for ids in coded]
        return _in_windows(whole, max_tokens, _overlap(max_tokens, scored), tokenizer.pad_token_id)
    pairs = None if rows.pairs is None else list(rows.pairs)
    if bi_encoder:
        firsts, seconds = (
            tokenizer(each, truncation=True, max_length=max_tokens)["input_ids"]
            for each in (texts, pairs)
        )
        both = list(zip(firsts, seconds, strict=True))
        of_text = [[0] * len(first) + [1] * len(second) for first, second in both]
        whole = [first + second for first, second in both]
        return _examples(whole, rows.labels, of_text, tokenizer.pad_token_id)
    coded = tokenizer(texts, pairs, truncation=True, max_length=max_tokens)
    segments = coded.get("token_type_ids") if pairs is not None else None
    return _examples(coded["input_ids"], rows.labels, segments, tokenizer.pad_token_id)


def _with_end(ids: list[int], end: int | None, ended: bool) -> list[int]:
    """A text's tokens with one end token, whether or not the tokenizer adds it, or with none."""
    if end is None:
        return ids
    has = len(ids) > 1 and ids[-1] == end  # a lone one may be the token that begins texts
    if ended:
        return ids if has else [*ids, end]
    return ids[:-1] if has else ids


def _overlap(max_tokens: int, scored: bool) -> int:
    """The overlap of two consecutive windows, in tokens."""
    # the guide's stride of 512 at 1024 tokens: each token that counts has at least half a window
    # before it
    return max(1, max_tokens // 2) if scored else 1


def _in_windows(texts: list[list[int]], max_tokens: int, overlap: int, padding: int) -> Examples:
    """Windows of each text, each of which begins `max_tokens - overlap` tokens after the one
    before.
    """
    windows, sources, context = [], [], []
    for text, ids in enumerate(texts):
        # the next one would hold nothing new
        for start in range(0, max(1, len(ids) - overlap), max_tokens - overlap):
            windows.append(ids[start : start + max_tokens])
            sources.append(text)
            context.append(overlap if start else 0)
    return replace(
        _examples(windows, None, None, padding),
        sources=np.array(sources, np.int64),
        # the first token of a row is never predicted, so one token of context is no matter
        context=np.array(context, np.int64) if overlap > 1 else None,
    )


def _examples(
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
