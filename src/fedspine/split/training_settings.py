"""Settings of training both halves of a model, wherever each of them is: what split and whole-model
methods share.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fedspine.core.errors import BadInput
from fedspine.core.reads import Reads
from fedspine.core.task import Examples, Task
from fedspine.lm.base import Base
from fedspine.lm.lora import check_rank
from fedspine.split.trainable_half import Optimising, check_optimising, learning_rate_at
from fedspine.split.wire import WirePrecision


@dataclass(frozen=True, kw_only=True)
class ModelTraining:
    """The hyper-parameters that these methods share; both halves are trained alike."""

    rank: int = 8  # of a transformer's adapters; nets train all weights
    scale: float = 2.0  # alpha / rank
    steps: int = 20  # optimiser steps of a round
    batch: int = 32  # rows of one step
    optimiser: Literal["sgd", "adamw"] = "adamw"  # fresh in every round; SGD without momentum
    learning_rate: float = 2e-3
    decay: float = 0.0  # factor on the rate after each round; 0: linear to zero over the rounds
    lowest: float = 0.0  # the rate does not fall below it
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm in each half; 0: never
    precision: WirePrecision = "fp16"  # of what crosses the wire

    def predicted_reads(self, base: Any) -> Reads:
        """What a device's orders will read."""
        return Reads(steps=self.steps, batch=self.batch)


def check_training(fields: ModelTraining, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    if isinstance(task.train, Examples) and task.train.positions is not None:
        raise BadInput(
            "task.pack is for methods that tune adapters on a device's whole model; leave it out, "
            "or choose one of these, such as fedlora"
        )
    for name in ("steps", "batch", "rank"):
        if getattr(fields, name) < 1:
            raise BadInput(f"method.{name} is {getattr(fields, name)}, but at least 1 is needed")
    for name in ("scale", "learning_rate"):  # which `lowest` would hide
        if not getattr(fields, name) > 0:
            raise BadInput(
                f"method.{name} is {getattr(fields, name)}, but a positive number is needed"
            )
    for name in ("decay", "lowest"):
        if not 0 <= getattr(fields, name) <= 1:
            raise BadInput(f"method.{name} is {getattr(fields, name)}, but 0 to 1 was expected")
    if fields.batch > len(task.train):
        raise BadInput(
            f"method.batch is {fields.batch}, but all devices "
            f"together hold {len(task.train)} rows; lower it"
        )
    if isinstance(task.base, Base):
        check_rank("method.rank", (fields.rank,), task.base.layout)
    check_optimising(optimising_at(fields, 0, 1))


def optimising_at(fields: ModelTraining, round: int, rounds: int) -> Optimising:
    """How a half is trained in a round, counted from 0."""
    rate = learning_rate_at(fields.learning_rate, round, rounds, fields.decay, fields.lowest)
    return Optimising(
        kind=fields.optimiser,
        learning_rate=rate,
        weight_decay=fields.weight_decay,
        clip=fields.clip,
    )
