"""Run an exported model on texts or on rows of arrays: a label with its probability, a continuation
with the loss of the given text, or the answer of a model that was tuned on dialogues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.data.array_rows import fitting
from fedspine.data.dataset import Rows
from fedspine.exports.loaded import AnyLoaded, Loaded, LoadedNet
from fedspine.lm.decoding import Decoding, ends_of, written
from fedspine.lm.dialogues import Messages, end_of_answers, prompt_ids
from fedspine.lm.encode import encode
from fedspine.lm.fits import positions
from fedspine.lm.score import score_module

BATCH = 32  # texts at a time
NEW_TOKENS, ANSWER_TOKENS = 40, 256  # defaults for a continuation and for an answer


@dataclass(frozen=True)
class Labelled:
    """The likeliest label of a text, a pair or a row, and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Continued:
    """The model's continuation, and its mean loss in nats per token of the given text (NaN
    for one token).

    `ended` says whether the model ended the text itself, or was stopped at the token limit.
    """

    continuation: str
    mean_loss: float
    ended: bool


@dataclass(frozen=True)
class ChatAnswer:
    """The model's answer; `ended` says whether the model ended it itself."""

    answer: str
    ended: bool


Prediction: TypeAlias = Labelled | Continued | ChatAnswer


def predict(
    loaded: AnyLoaded,
    texts: Sequence[str] | np.ndarray,
    pairs: Sequence[str] | None = None,
    *,
    new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Prediction]:
    """One prediction for each text, in order; `pairs` holds the second texts, for kind pair only.

    A net on arrays gets rows, [rows, ...], of the shape and type of its training data in place of
    texts. A model that was tuned on dialogues answers each text with at most `new_tokens` (None:
    256).

    A text longer than the model's `max_tokens` is truncated for a label, and read in windows for a
    loss; a continuation starts from its last tokens and has at most `new_tokens` (None: 40). A text
    to be continued has no end token, so none counts in its loss. Decoding is greedy at temperature
    0, else tokens are sampled with `seed`. Raises BadInput for missing, unexpected or unequally
    many second texts, for texts that are not valid Unicode, for more new tokens than the model has
    positions, and for rows of another shape or type.
    """
    if isinstance(loaded, LoadedNet):
        return _labelled_rows(loaded, texts)
    if isinstance(texts, np.ndarray):
        raise BadInput(f"got rows of arrays, but this model of kind {loaded.kind} reads texts")
    if (pairs is not None) != (loaded.kind == "pair"):
        have, want = ("pairs", "single texts") if pairs is not None else ("single texts", "pairs")
        raise BadInput(
            f"got {have}, but this model of kind {loaded.kind} reads {want}; pass {want}"
        )
    if pairs is not None and len(pairs) != len(texts):
        raise BadInput(
            f"got {len(texts)} texts and {len(pairs)} second texts; pass one second text for each "
            "text"
        )
    if not texts:
        return []
    _check_unicode(texts, "text")
    _check_unicode(pairs or (), "second text")
    if loaded.kind == "causal-lm":
        decoding = decoding_for(loaded, new_tokens, temperature, seed)
        if loaded.chat:
            return [answered(loaded, [("user", text)], decoding) for text in texts]
        return [_continued(loaded, text, decoding) for text in texts]
    return _labelled(loaded, _encoded(loaded, texts, pairs))


def _check_unicode(texts: Sequence[str], what: str) -> None:
    """Raise BadInput for a text with half a character, such as an argument that is not UTF-8."""
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{what} {number} is not UTF-8; write it again") from None


def _labelled_rows(net: LoadedNet, rows: Any) -> list[Prediction]:
    """The likeliest class of each row of an array, [rows, ...]; raises what `predict` raises."""
    x = fitting(np.asarray(rows), "what was given", net.reads)
    found: list[Prediction] = []
    for first in range(0, len(x), BATCH):
        logits = torch.from_numpy(net.logits(x[first : first + BATCH]))
        best = logits.softmax(-1).max(-1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        found += [Labelled(net.labels[index], probability) for probability, index in pairs]
    return found


def _encoded(loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None) -> Examples:
    # as in training, so that predictions equal those of the run
    rows = Rows(tuple(texts), None if pairs is None else tuple(pairs), None, {})
    examples = encode(
        loaded.tokenizer,
        rows,
        loaded.kind,
        loaded.max_tokens,
        scored=True,
        ended=False,
        bi_encoder=loaded.bi_encoder,
    )
    for index, length in enumerate(examples.lengths):
        if length == 0:
            raise BadInput(
                f"text {index + 1} has no tokens in this model's tokenizer; pass at least one word"
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


def decoding_for(loaded: Loaded, new_tokens: int | None, temperature: float, seed: int) -> Decoding:
    """The decoding settings; without `new_tokens`, the default for this kind of model, or half of
    its positions if they are fewer.

    Raises BadInput for more new tokens than the model has positions for besides a prompt.
    """
    room = positions(loaded.module.config)
    if new_tokens is not None and new_tokens >= room:
        raise BadInput(
            f"{new_tokens:,} new tokens were asked for, but this model has {room:,} positions for "
            f"a text and what it adds; ask for at most {room - 1:,}"
        )
    usual = min(ANSWER_TOKENS if loaded.chat else NEW_TOKENS, max(1, room // 2))
    return Decoding(new_tokens or usual, temperature, seed)


def only_for_language(folder: Any, new_tokens: int | None, temperature: float) -> None:
    """Raise BadInput for settings of decoding, which a classifier in `folder` would ignore."""
    given = {"--tokens": new_tokens is not None, "--temperature": temperature > 0}
    for option in (name for name, stated in given.items() if stated):
        raise BadInput(f"{option} is for language models, and {folder} labels rows; leave it out")


def answered(
    loaded: Loaded, messages: Messages, decoding: Decoding, streamer: Any = None
) -> ChatAnswer:
    """The answer to a dialogue; its oldest exchanges are dropped if the model lacks positions for
    all of it.

    `streamer` is one of transformers, called with each new token. Raises BadInput for a last
    message that is too long.
    """
    _check_unicode([content for _, content in messages[-1:]], "message")
    room = positions(loaded.module.config) - decoding.new_tokens
    ids = prompt_ids(loaded.tokenizer, messages)
    while len(ids) > room and len(messages) > 2:
        messages = messages[2:]
        ids = prompt_ids(loaded.tokenizer, messages)
    if len(ids) > room:
        raise BadInput(
            f"the text has {len(ids):,} tokens, and this model reads {room:,} before an answer of "
            f"{decoding.new_tokens:,}; shorten it, or ask for fewer new tokens"
        )
    ends = _ends(loaded, end_of_answers(loaded.tokenizer))
    padding = loaded.tokenizer.pad_token_id
    (new,) = written(loaded.module, [ids], decoding, ends=ends, padding=padding, streamer=streamer)
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return ChatAnswer(text.strip(), ended=bool(set(new[-1:]) & set(ends)))


def _continued(loaded: Loaded, text: str, decoding: Decoding) -> Continued:
    examples = _encoded(loaded, [text], None)
    score = score_module(loaded.module, examples)
    # within the model's positions
    room = positions(loaded.module.config) - decoding.new_tokens
    prompt = _last(examples, min(loaded.max_tokens, room))
    ends = _ends(loaded)
    padding = loaded.tokenizer.pad_token_id
    (new,) = written(loaded.module, [prompt], decoding, ends=ends, padding=padding)
    continuation = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Continued(continuation, score.mean_loss, ended=bool(set(new[-1:]) & set(ends)))


def _last(examples: Examples, most: int) -> list[int]:
    """The last tokens of the only text, at most `most`."""
    # each window repeats the end of the previous one
    skipped = np.zeros(len(examples), np.int64) if examples.context is None else examples.context
    rows = zip(examples.offsets[:-1] + skipped, examples.offsets[1:], strict=True)
    ids = np.concatenate([examples.ids[first:last] for first, last in rows])
    return ids[-most:].tolist()


def _ends(loaded: Loaded, *more: int | None) -> list[int]:
    """The tokens that end a generated text."""
    return ends_of(loaded.tokenizer, loaded.module.generation_config, *more)
