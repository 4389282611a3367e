"""Local training: the adapter and the task head on one device's rows, a fresh optimiser each time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedspine.device import Device
from fedspine.errors import BadInput
from fedspine.lm.base import Model
from fedspine.lm.cost import Extent, training_flops, training_memory_bytes
from fedspine.lm.importance import Criterion, Scores, score_units, smooth
from fedspine.message import message
from fedspine.task import IGNORED, Examples

LAST = 5  # steps whose mean loss stands for where training ended


@message
class Tuning:
    """How a device trains in one round."""

    steps: int
    batch: int
    learning_rate: float  # of the adapter
    head_learning_rate: float | None = None  # of the task head, None: as the adapter
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm


@runtime_checkable
class TuningFields(Protocol):
    """The hyper-parameters of local training that methods share."""

    steps: int
    batch: int
    learning_rate: float
    head_speed: float
    scale: float
    weight_decay: float


def check_tuning(fields: TuningFields) -> None:
    """Raise BadInput for training settings that cannot work."""
    for name in ("steps", "batch"):
        if getattr(fields, name) < 1:
            raise BadInput(f"method.{name} is {getattr(fields, name)}, but at least 1 is needed")
    for name in ("learning_rate", "head_speed", "scale"):
        if not getattr(fields, name) > 0:
            raise BadInput(f"method.{name} is {getattr(fields, name)}, but a positive number is needed")
    if fields.weight_decay < 0:
        raise BadInput(f"method.weight_decay is {fields.weight_decay}, but it cannot be negative")


def tuning_at(fields: TuningFields, round: int, rounds: int) -> Tuning:
    """The settings of one round, counted from 0: learning rates fall linearly to zero over the run."""
    learning_rate = fields.learning_rate * (1 - round / rounds)
    return Tuning(
        steps=fields.steps,
        batch=fields.batch,
        learning_rate=learning_rate,
        head_learning_rate=learning_rate * fields.head_speed,
        weight_decay=fields.weight_decay,
    )


@message
class Scoring:
    """Whether and how unit importance is followed while training."""

    every: int = 1  # steps
    keep: float = 0.9  # share of the old average at each update
    square: bool = False
    cross: float = 0.0
    normalise: bool = False

    @property
    def criterion(self) -> Criterion:
        return Criterion(square=self.square, cross=self.cross, normalise=self.normalise)


@dataclass(frozen=True)
class Trace:
    """What training gave: the tuned model, the mean loss of the last steps, the importance if it was followed."""

    model: Model
    loss: float
    scores: Scores | None


def tune(
    device: Device, model: Model, tuning: Tuning, *, scoring: Scoring | None = None, scores: Scores | None = None
) -> Trace:
    """Train `model` for `tuning.steps` optimiser steps on the device's rows.

    A loss that is not finite ends training at once and is returned as it is; the server leaves such a reply out.
    """
    adapter = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.adapter.items()}
    head = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.head.items()}
    trained = Model(structure=model.structure, adapter=adapter, head=head, scale=model.scale)
    module = device.base.fit(trained)
    parameters = [*adapter.values(), *head.values()]
    groups = [
        {"params": list(adapter.values()), "lr": tuning.learning_rate},
        {"params": list(head.values()), "lr": tuning.head_learning_rate or tuning.learning_rate},
    ]
    optimiser = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=tuning.weight_decay, fused=True)
    losses: list[float] = []
    tokens = squared = longest = 0
    for step, rows in enumerate(batches(device.data, tuning, device.rng)):
        inputs = device.data.batch(rows)
        count, length = inputs["input_ids"].shape
        tokens, squared, longest = tokens + count * length, squared + count * length**2, max(longest, length)
        loss = loss_of(module, inputs)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            break
        loss.backward()
        if scoring is not None and step % scoring.every == 0:
            scores = smooth(scores, score_units(device.base, trained, scoring.criterion), scoring.keep)
        nn.utils.clip_grad_norm_(parameters, tuning.clip)
        optimiser.step()
        optimiser.zero_grad()
    _account(device, trained, Extent(tokens, squared), steps=len(losses), batch=tuning.batch, longest=longest)
    tuned = Model(structure=model.structure, adapter=_detached(adapter), head=_detached(head), scale=model.scale)
    return Trace(model=tuned, loss=float(np.mean(losses[-LAST:])), scores=scores)


def loss_of(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy: per row for classification, per predicted token for language modelling."""
    labels = inputs["labels"]
    logits = module(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


def batches(data: Examples, tuning: Tuning, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows for each step: whole passes over shuffled data, cut into batches of like length in random order."""
    wanted = tuning.steps * tuning.batch
    passes = [rng.permutation(len(data)) for _ in range(-(-wanted // len(data)))]
    rows = np.concatenate(passes)[:wanted]
    by_length = rows[np.argsort(data.lengths[rows], kind="stable")]
    for start in rng.permutation(tuning.steps) * tuning.batch:
        yield by_length[start : start + tuning.batch]


def _account(device: Device, model: Model, extent: Extent, *, steps: int, batch: int, longest: int) -> None:
    anatomy = device.base.anatomy
    rank = rank_of(model)
    device.spend(
        flops=training_flops(anatomy, model.structure, rank, extent),
        launches=steps * anatomy.layers,
        samples=steps * batch,
        memory_bytes=training_memory_bytes(
            anatomy, model.structure, rank=rank, embeddings=device.base.embeddings, batch=batch, tokens=longest
        ),
    )


def rank_of(model: Model) -> int:
    """The largest rank of the model's adapter, 0 without one."""
    return max((tensor.shape[0] for name, tensor in model.adapter.items() if name.endswith(".lora_A")), default=0)


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
