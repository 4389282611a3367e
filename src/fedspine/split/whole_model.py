"""Training a whole model on a device, for methods without a half on the server: both halves of a
cut, computed one after the other.

So one method file serves transformers, where LoRA and the task head are trained, and nets, where
everything is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from fedspine.core.checks import Asked, need
from fedspine.core.device import Device
from fedspine.core.fleet import Fleet, NoMemory, Profile
from fedspine.core.message import Tensors, message
from fedspine.core.noise import MOST_LOSS
from fedspine.core.reads import Descent, Reads, largest_share, last_steps, lasting
from fedspine.core.task import Task
from fedspine.core.tensors import moved, single
from fedspine.split.batches import rows_at
from fedspine.split.interface import SplitModel
from fedspine.split.messages import Cutting
from fedspine.split.received import check_model
from fedspine.split.trainable_half import Optimising, TrainableHalf
from fedspine.split.training_settings import ModelTraining, check_training, optimising_at

LAST = 5  # final steps whose mean loss is reported
Wire: TypeAlias = Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True)
class WholeModelTraining(ModelTraining):
    """The settings that whole-model methods share; steps and batch as in MergeSFL's code."""

    steps: int = 42
    batch: int = 64
    weight_decay: float = 0.0
    clip: float = 0.0
    precision: Wire = "fp16"  # of weights on the wire

    def predicted_reads(self, base: Any) -> Reads:
        """What a device's orders will read."""
        return replace(training_at(self, base, 0, 1).reads, scale=self.scale, rank=self.rank)


# with which a tiny model learns a toy task in a few rounds
TOY = MappingProxyType(
    {
        "rank": 4,
        "steps": 8,
        "batch": 16,
        "optimiser": "adamw",
        "learning_rate": 2e-2,
        "clip": 1.0,
    }
)


@message
class Training:
    """How a device trains a whole model in one round."""

    cutting: Cutting
    optimising: Optimising
    steps: int
    batch: int  # rows of a step; all of the data where there are fewer

    @property
    def reads(self) -> Reads:
        how = self.optimising
        return Reads(
            steps=self.steps,
            batch=self.batch,
            lasting=lasting(self.steps, how.learning_rate * how.weight_decay),
            descent=Descent(
                kind=how.kind,
                learning_rates=(how.learning_rate,),
                weight_decay=how.weight_decay,
                clip=how.clip or None,
            ),
        )

    def check(self, asked: Asked) -> None:
        need(min(self.steps, self.batch) >= 1, "steps and batch must be at least 1")


@dataclass(frozen=True)
class LocalResult:
    """The result of training: all weights by name, and every row's loss at each step before it was
    trained on.
    """

    weights: Tensors
    # one for each step, [rows of which a label counted]; with noise `MOST_LOSS` at most
    losses: tuple[np.ndarray, ...]
    texts: tuple[np.ndarray, ...]  # of these rows
    # the mean of the last steps' mean losses, in nats, with the device's noise; not finite where
    # one of them is not, 0 where no label counted
    ended: float


def train_whole(device: Device, weights: Tensors, training: Training) -> LocalResult:
    """Train all weights of a model together; a loss that is not finite ends training at once and is
    part of the result.
    """
    base = device.base
    split_model = training.cutting.of(base)
    under = TrainableHalf(
        moved(single(weights), base.device), training.optimising, split_model.statistics
    )
    seed = int(device.rng.integers(2**31))
    losses, sizes, tokens = [], [], []
    counted: list[np.ndarray] = []  # texts of which a label counted, of steps that have any
    for step in range(training.steps):
        rows = rows_at(len(device.data), training.batch, seed, step)
        device.uses(rows)
        batch = device.data.batch(rows)
        drawn = [int(part) for part in np.random.SeedSequence([seed, step]).generate_state(2)]
        features = split_model.client_forward(under.weights, batch, seed=drawn[0])
        found = split_model.server_forward(under.weights, features, batch["labels"], seed=drawn[1])
        labelled = found.counted > 0
        mean = (found.total[labelled] / found.counted[labelled]).detach()
        losses.append(_bounded_losses(device, mean.cpu().double().numpy()))
        if len(losses[-1]):
            counted.append(device.data.texts_of(rows[labelled.cpu().numpy()]))
        sizes.append(len(rows))
        tokens.append(1 if features.mask is None else features.mask.shape[1])
        loss = found.mean
        if not torch.isfinite(loss):
            break
        loss.backward()
        under.step()
    _account(device, split_model, sizes, tokens)
    trained = moved(under.now(), torch.device("cpu"))
    sent = {n: t for n, t in single(weights).items() if n not in split_model.statistics}
    return LocalResult(
        weights=device.released(sent, trained),
        losses=tuple(each for each in losses if len(each)),
        texts=tuple(counted),
        ended=_final_loss(device, [float(each.mean()) for each in losses if len(each)], counted),
    )


def _final_loss(device: Device, losses: Sequence[float], counted: Sequence[np.ndarray]) -> float:
    if not losses:
        return 0.0
    last = last_steps(counted, LAST, device.fewest_rows)
    rows = [np.ones(len(texts)) for texts in counted[-last:]]
    one_row = MOST_LOSS * largest_share(counted[-last:], rows)
    return device.mean_beside(float(np.mean(losses[-last:])), one_row)


def _bounded_losses(device: Device, losses: np.ndarray) -> np.ndarray:
    """Rows' losses as they count in what leaves."""
    if device.noise is None:
        return losses
    return np.where(np.isfinite(losses), np.minimum(losses, MOST_LOSS), losses)


def _account(
    device: Device, split_model: SplitModel, rows: Sequence[int], tokens: Sequence[int]
) -> None:
    both = ("client", "server")
    device.spend(
        flops=sum(
            split_model.flops(part, count, width)
            for count, width in zip(rows, tokens, strict=True)
            for part in both
        ),
        launches=len(rows) * sum(split_model.launches(part) for part in both),
        samples=sum(rows),
        memory_bytes=memory_bytes(split_model, max(rows), max(tokens)),
    )


def memory_bytes(split_model: SplitModel, rows: int, tokens: int) -> int:
    """Memory for training both halves in one step."""
    return sum(split_model.memory_bytes(part, rows, tokens) for part in ("client", "server"))


# --- the server's part ---


def check_whole(fields: ModelTraining, task: Task) -> None:
    """Raise BadInput for settings of training whole models that cannot work."""
    check_training(fields, task)
    cutting_of(fields, task.base).of(task.base)


def cutting_of(fields: ModelTraining, base: Any) -> Cutting:
    """Where a whole model is cut to be computed in two calls, which makes no difference to what is
    learnt.
    """
    return Cutting(cut=base.default_cut, rank=fields.rank, scale=fields.scale)


def training_at(fields: ModelTraining, base: Any, round: int, rounds: int) -> Training:
    """The settings of one round, counted from 0."""
    return Training(
        cutting=cutting_of(fields, base),
        optimising=optimising_at(fields, round, rounds),
        steps=fields.steps,
        batch=fields.batch,
    )


def weights_of(split_model: SplitModel, model: Any) -> Tensors:
    """All that training changes of a model, by name."""
    client_model, server_model = split_model.parts(model)
    return {**client_model, **server_model}


def trained_of(split_model: SplitModel, model: Any) -> Tensors:
    """The weights without statistics of batches, such as a variance: a sum of changes of these
    could be negative.
    """
    weights = single(weights_of(split_model, model))
    return {name: own for name, own in weights.items() if name not in split_model.statistics}


def model_of(split_model: SplitModel, like: Any, weights: Tensors) -> Any:
    """The model with these weights; `like` is one of the same names."""
    client_model, server_model = split_model.parts(like)
    return split_model.join(
        {name: weights[name] for name in client_model},
        {name: weights[name] for name in server_model},
    )


def check_sent(weights: Tensors, cutting: Cutting, precision: str, asked: Asked) -> None:
    """Raise Unusable unless an order has all weights that training a whole model changes."""
    check_model(weights, cutting.cut, cutting.rank, precision, asked)


def with_memory(
    fleet: Fleet, split_model: SplitModel, batch: int, tokens: int
) -> tuple[Profile, ...]:
    """The devices that have the memory to train; the others are noted."""
    able = []
    for device in fleet.devices:
        needed = memory_bytes(split_model, min(batch, device.examples), tokens)
        if needed <= device.memory_bytes:
            able.append(device)
        else:
            fleet.note(
                device=device.id,
                left_out=f"{needed} bytes are needed, it has {device.memory_bytes}",
            )
    return tuple(able)


def no_memory() -> NoMemory:
    """The error for a round in which no device can be asked."""
    return NoMemory(
        "no device has the memory to train this model; lower method.batch or take a smaller "
        "task.model"
    )
