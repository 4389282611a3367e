"""Run an exported model on texts: a label with its probability, or a continuation with the loss of
what was given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.data.dataset import Rows
from fedspine.exports.load import Loaded
from fedspine.lm.encode import encode
from fedspine.lm.fits import positions
from fedspine.lm.score import score_module

BATCH = 32  # texts at a time
NEW_TOKENS = 40  # of a continuation


@dataclass(frozen=True)
class Labelled:
    """The likeliest label of a text or a pair, and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Continued:
    """The model's continuation, and its mean loss in nats per token of the given text (NaN
    for one token).

    `ended` says whether the model came to an end of its own, or was stopped after so many tokens.
    """

    continuation: str
    mean_loss: float
    ended: bool


Prediction: TypeAlias = Labelled | Continued


def predict(
    loaded: Loaded,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
) -> list[Prediction]:
    """One prediction for each text, in order; `pairs` holds the second texts, for kind pair only.

    A text longer than the model's `max_tokens` is cut for a label, and read in windows for a loss;
    a continuation starts from its last tokens and has at most `new_tokens`. A text that is to be
    continued has no end, so none counts in its loss. Raises BadInput for missing, surplus or
    unequally many second texts.
    """
    if (pairs is not None) != (loaded.kind == "pair"):
        have, want = ("pairs", "single texts") if pairs is not None else ("single texts", "pairs")
        raise BadInput(
            f"{have} came, but this model of kind {loaded.kind} reads {want}; give it those"
        )
    if pairs is not None and len(pairs) != len(texts):
        raise BadInput(
            f"{len(texts)} texts and {len(pairs)} second texts came; give one second text for "
            "each text"
        )
    if not texts:
        return []
    if loaded.kind == "causal-lm":
        return [_continued(loaded, text, new_tokens) for text in texts]
    return _labelled(loaded, _encoded(loaded, texts, pairs))


def _encoded(loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None) -> Examples:
    # as in training, so that a prediction equals the run's
    rows = Rows(tuple(texts), None if pairs is None else tuple(pairs), None, {})
    examples = encode(
        loaded.tokenizer, rows, loaded.kind, loaded.max_tokens, scored=True, ended=False
    )
    for index, length in enumerate(examples.lengths):
        if length == 0:
            raise BadInput(
                f"text {index + 1} is empty for this model's tokenizer; give it at least one word"
            )
    return examples


def _labelled(loaded: Loaded, examples: Examples) -> list[Prediction]:
    found: list[Prediction | None] = [None] * len(examples)
    with torch.inference_mode():
        for rows in examples.batches_by_length(BATCH):
            inputs = examples.batch(rows)
            del inputs["labels"]
            best = loaded.module(**inputs).logits.softmax(-1).max(-1)
            for row, probability, index in zip(
                rows, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                found[row] = Labelled(loaded.labels[index], probability)
    return [one for one in found if one is not None]


def _continued(loaded: Loaded, text: str, new_tokens: int) -> Continued:
    examples = _encoded(loaded, [text], None)
    score = score_module(loaded.module, examples)
    # the model has no positions beyond these
    room = max(1, positions(loaded.module.config) - new_tokens)
    prompt = _last(examples, min(loaded.max_tokens, room))
    ends = _ends(loaded)
    with torch.inference_mode():
        whole = loaded.module.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=loaded.tokenizer.pad_token_id,
            eos_token_id=ends or None,
        )
    written = whole[0, prompt.shape[1] :]
    continuation = loaded.tokenizer.decode(written, skip_special_tokens=True)
    return Continued(
        continuation, score.mean_loss, ended=bool(set(written[-1:].tolist()) & set(ends))
    )


def _last(examples: Examples, most: int) -> torch.Tensor:
    """The last tokens of the only text, at most so many: int64 [1, tokens]."""
    # later windows repeat the end of the one before
    skipped = np.zeros(len(examples), np.int64) if examples.context is None else examples.context
    rows = zip(examples.offsets[:-1] + skipped, examples.offsets[1:], strict=True)
    ids = np.concatenate([examples.ids[first:last] for first, last in rows])
    return torch.from_numpy(ids[-most:]).long()[None]


def _ends(loaded: Loaded) -> list[int]:
    """The tokens that end a continuation: the tokenizer's end token, and those of the model's
    settings.
    """
    stated = loaded.module.generation_config.eos_token_id
    of_model = stated if isinstance(stated, list) else [stated]
    return sorted({end for end in (loaded.tokenizer.eos_token_id, *of_model) if end is not None})
