"""Exported models of one task compared on the same rows: their predictions and their accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedspine.core.errors import BadInput, listed
from fedspine.core.task import Examples
from fedspine.data.array_rows import GivenRows
from fedspine.exports.given_rows import array_rows, random_rows, spread, text_rows
from fedspine.exports.loaded import AnyLoaded, Loaded, LoadedNet
from fedspine.exports.parity_rows import made_up
from fedspine.lm.encode import encode
from fedspine.lm.score import IGNORED

ROWS = 1000  # at most
BATCH = 32


@dataclass(frozen=True)
class Agreement:
    """The result of one model on the rows."""

    rows: int
    rows_from: str  # where they come from
    equal_predictions: float  # share equal to the first model's, 0 to 1: labels, or top next tokens
    accuracy: float | None  # 0 to 1; None without labels, and for language models
    mean_loss: float | None  # nats per token; None for classifiers, NaN if no token is predicted
    perplexity: float | None  # its exponential


def agreements(models: Sequence[AnyLoaded], data: str | None) -> list[Agreement]:
    """Each model on the rows of `data`: of a run's folder the test rows, else, of texts, with
    columns `text`, `label` and, for pairs, `pair`. None: on random rows, of texts from the first
    model's vocabulary.

    Raises BadInput for models of different tasks, and for data that cannot be read.
    """
    check_one_task(models)
    first: Any = models[0]
    if isinstance(first, LoadedNet):
        rows, rows_from = _array_rows(first, data)
        found = [net_answers(m, rows) for m in models]
    else:
        rows, rows_from = _text_rows(first, data)
        found = [
            answers(
                m,
                encode(
                    m.tokenizer, rows, m.kind, m.max_tokens, scored=True, bi_encoder=m.bi_encoder
                ),
            )
            for m in models
        ]
    return [
        Agreement(
            rows=len(rows),
            rows_from=rows_from,
            equal_predictions=_equal(found[0][0], predicted),
            accuracy=accuracy,
            mean_loss=loss,
            perplexity=None if loss is None else float(np.exp(loss)),
        )
        for predicted, accuracy, loss in found
    ]


def check_one_task(models: Sequence[AnyLoaded]) -> None:
    """Raise BadInput for models that cannot predict the same rows."""
    first = models[0]
    for other in models[1:]:
        if _task(other) != _task(first):
            raise BadInput(
                f"expected models of one task, got {_task(first)} and {_task(other)}; bench them "
                "separately"
            )


def _task(model: AnyLoaded) -> str:
    of = f"{model.kind} of {listed(model.labels)}" if model.labels else model.kind
    match model:
        case LoadedNet(reads=reads):
            return f"{of} from {reads.type} rows of shape {list(reads.shape)}"
    return of


def _text_rows(model: Loaded, data: str | None) -> tuple[Any, str]:
    if data is None:
        rows = made_up(model.tokenizer, model.max_tokens, pairs=model.kind == "pair")
        return rows, "random words; give data with --rows"
    rows, rows_from = text_rows(data, model.kind, model.labels)
    return rows.take(spread(len(rows), ROWS).tolist()), rows_from


def _array_rows(net: LoadedNet, data: str | None) -> tuple[GivenRows, str]:
    if data is None:
        return random_rows(net.reads), "random numbers; give data with --rows"
    rows, rows_from = array_rows(data, net.reads)
    return rows.take(spread(len(rows), ROWS)), rows_from


def net_answers(net: LoadedNet, rows: GivenRows) -> tuple[np.ndarray, float | None, float | None]:
    """A net's predictions and accuracy, as `answers` gives them."""
    starts = range(0, len(rows), BATCH)
    predicted = np.concatenate([net.logits(rows.x[i : i + BATCH]).argmax(-1) for i in starts])
    return predicted, rows.accuracy(predicted), None


def answers(model: Loaded, examples: Examples) -> tuple[np.ndarray, float | None, float | None]:
    """Predictions, one per row or per token; then accuracy and mean loss, as in `Agreement`."""
    if model.kind == "causal-lm":
        return _tokens(model, examples)
    batches = list(examples.batches_by_length(BATCH))
    with torch.inference_mode():
        logits = [_logits(model, examples, batch) for batch in batches]
    predicted = np.concatenate([each.argmax(-1) for each in logits])[
        np.argsort(np.concatenate(batches))
    ]
    labels = examples.labels
    return predicted, None if labels is None else float((predicted == labels).mean()), None


def _tokens(model: Loaded, examples: Examples) -> tuple[np.ndarray, None, float]:
    found, losses, count = [], 0.0, 0
    with torch.inference_mode():
        for batch in examples.batches_by_length(
            1
        ):  # one row each, so the order is the same for all models
            inputs = examples.batch(batch)
            labels = inputs.pop("labels")[0, 1:]
            logits = model.module(**inputs).logits[0].float()
            found.append(logits.argmax(-1).numpy())
            losses += float(
                torch.nn.functional.cross_entropy(
                    logits[:-1], labels, ignore_index=IGNORED, reduction="sum"
                )
            )
            count += int((labels != IGNORED).sum())
    return np.concatenate(found), None, losses / count if count else float("nan")


def _logits(model: Loaded, examples: Examples, rows: np.ndarray) -> np.ndarray:
    inputs = examples.batch(rows)
    del inputs["labels"]
    logits: np.ndarray = model.module(**inputs).logits.numpy()
    return logits


def _equal(first: np.ndarray, other: np.ndarray) -> float:
    """The share of equal predictions; 0 if the tokenizers split the rows differently."""
    return float((first == other).mean()) if first.shape == other.shape else 0.0
