"""Run an exported model on texts: a label with its probability, or a continuation with the loss of
what was given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fedspine.data.tasks import Rows
from fedspine.errors import BadInput
from fedspine.export.load import Loaded
from fedspine.lm.encode import encode
from fedspine.lm.score import score_module
from fedspine.task import Examples

BATCH = 32  # texts at a time
NEW_TOKENS = 40  # of a continuation


@dataclass(frozen=True)
class Labelled:
    """The likeliest label of a text or a pair, and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Continued:
    """What the model would write next, and its mean loss in nats per token of the given text (NaN
    for one token).
    """

    continuation: str
    mean_loss: float


Prediction: TypeAlias = Labelled | Continued


def predict(
    loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> list[Prediction]:
    """One prediction for each text, in order; `pairs` holds the second texts, for kind pair only.

    A text longer than the model's `max_tokens` is cut for a label, and read in windows for a loss;
    a continuation starts from its last tokens. Raises BadInput for missing, surplus or unequally
    many second texts.
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
        return [_continued(loaded, text) for text in texts]
    return _labelled(loaded, _encoded(loaded, texts, pairs))


def _encoded(loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None) -> Examples:
    # as in training, so that a prediction is what the run measured
    rows = Rows(tuple(texts), None if pairs is None else tuple(pairs), None, {})
    examples = encode(loaded.tokenizer, rows, loaded.kind, loaded.max_tokens)
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


def _continued(loaded: Loaded, text: str) -> Continued:
    examples = _encoded(loaded, [text], None)
    score = score_module(loaded.module, examples)
    prompt = torch.from_numpy(examples.ids[-loaded.max_tokens :]).long()[None]
    with torch.inference_mode():
        whole = loaded.module.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )
    continuation = loaded.tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
    return Continued(continuation, score.mean_loss if score.count else math.nan)
