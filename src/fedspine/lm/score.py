"""Scores models on given rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedspine.core.task import IGNORED, Examples
from fedspine.core.tensors import moved
from fedspine.lm.attention import module_inputs
from fedspine.lm.base import Base, Model
from fedspine.lm.prefix import (
    BATCH,
    Prefixes,
    activations,
    entering,
    first_block,
    name_of,
    storable,
)
from fedspine.lm.trainable_stack import TrainableStack

# of activations of test rows, which a process holds while it makes them
MOST_SCORED_BYTES = 1 << 30


@dataclass(frozen=True)
class Score:
    """Sums over scored rows or tokens: `loss` in nats, `correct` predictions, `count` of them."""

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right labels, 0 to 1; for language modelling, of right next tokens. NaN where
        none counts.
        """
        return self.correct / self.count if self.count else math.nan

    @property
    def mean_loss(self) -> float:
        """Nats per label, the logarithm of the perplexity for language modelling; NaN where none
        counts.
        """
        return self.loss / self.count if self.count else math.nan


def score(
    base: Base,
    model: Model,
    data: Examples,
    *,
    batch: int = BATCH,
    prefixes: Prefixes | None = None,
    rows: str = "",
) -> Score:
    """Score `model`, merged as it would be deployed, on all rows of `data`.

    Models whose frozen blocks below the lowest adapter are the same share these blocks'
    activations, which `prefixes` keeps; `rows` names the data there. A stored activation has the
    bytes of a new one.
    """
    first = first_block(base.layout, model)
    stored = None
    if (
        prefixes is not None
        and first
        and batch == BATCH
        and storable(base, data, MOST_SCORED_BYTES)
    ):
        key = name_of(rows, first, model.structure)
        stored = prefixes.get(key, lambda: activations(base, model, data, first))
    with torch.no_grad():
        module = base.fit(model.to(base.device), merge=True)
    if stored is None:
        return score_module(module, data, batch=batch)
    entry = base.start_at(first)

    def enter(chosen: np.ndarray) -> None:
        entry.hidden = entering(base, data, stored, chosen, data.width(chosen))

    return _scores(module, data, batch, base.device, enter=enter)[0]


def score_together(
    base: Base, models: Sequence[Model], data: Examples, *, batch: int = 32
) -> list[Score]:
    """`score` of several models of one structure, each batch in one pass through all of them.

    They share the base's weights, so their adapters stay apart from these instead of being merged:
    the same but for rounding.
    """
    return _scores(TrainableStack(base, models).fit(), data, batch, base.device, len(models))


def score_module(module: nn.Module, data: Examples, *, batch: int = 32) -> Score:
    """Score a module that maps a batch of inputs to logits as transformers models do."""
    return _scores(module, data, batch, next(module.parameters()).device)[0]


def _scores(
    module: nn.Module,
    data: Examples,
    batch: int,
    device: torch.device,
    models: int = 1,
    enter: Callable[[np.ndarray], None] = lambda rows: None,
) -> list[Score]:
    """Of each model that `module` computes, whose inputs hold the rows of one model after another.

    `enter` receives the rows of a batch before it is computed.
    """
    loss, correct, count = np.zeros(models), np.zeros(models, np.int64), 0
    with torch.inference_mode():
        for rows in data.batches_by_length(batch):
            inputs = moved(data.batch(rows), device)
            labels = inputs.pop("labels")
            enter(rows)
            inputs = {name: tensor.repeat(models, 1) for name, tensor in inputs.items()}
            logits = module(**module_inputs(inputs)).logits.float().unflatten(0, (models, -1))
            if labels.dim() == 2:
                logits, labels = logits[:, :, :-1].flatten(1, 2), labels[:, 1:].flatten()
            valid = labels != IGNORED
            if data.counted is not None:  # often few of the tokens, and logits are large
                logits, labels, valid = logits[:, valid], labels[valid], valid[valid]
            for i, own in enumerate(logits):
                loss[i] += float(
                    nn.functional.cross_entropy(own, labels, ignore_index=IGNORED, reduction="sum")
                )
                correct[i] += int((own.argmax(-1) == labels)[valid].sum())
            count += int(valid.sum())
    return [Score(loss=float(loss[i]), correct=int(correct[i]), count=count) for i in range(models)]
