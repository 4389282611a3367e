"""How good a model is on given rows."""

from dataclasses import dataclass

import torch
from torch import nn

from fedspine.lm.base import Base, Model
from fedspine.task import IGNORED, Examples
from fedspine.tensors import moved


@dataclass(frozen=True)
class Score:
    """Sums over scored rows or tokens: `loss` in nats, `correct` predictions, `count` of them."""

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right labels, 0 to 1; for language modelling, of right next tokens."""
        return self.correct / self.count

    @property
    def mean_loss(self) -> float:
        return self.loss / self.count


def score(base: Base, model: Model, data: Examples, *, batch: int = 32) -> Score:
    """Score `model`, merged as it would be deployed, on all rows of `data`."""
    with torch.no_grad():
        module = base.fit(model.to(base.device), merge=True)
    return score_module(module, data, batch=batch)


def score_module(module: nn.Module, data: Examples, *, batch: int = 32) -> Score:
    """Score anything that maps a batch of inputs to logits as transformers models do."""
    loss, correct, count = 0.0, 0, 0
    device = next(module.parameters()).device
    with torch.inference_mode():
        for rows in data.batches_by_length(batch):
            inputs = moved(data.batch(rows), device)
            labels = inputs.pop("labels")
            logits = module(**inputs).logits.float()
            if labels.dim() == 2:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            valid = labels != IGNORED
            loss += float(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            correct += int((logits.argmax(-1) == labels)[valid].sum())
            count += int(valid.sum())
    return Score(loss=loss, correct=correct, count=count)
