"""Settings of training both halves of a model, wherever each of them is: what split and whole-model methods share."""

from typing import Protocol

from fedspine.core.errors import BadInput
from fedspine.core.rates import Optimiser, Rate, check_settled
from fedspine.core.task import Task
from fedspine.lm.base import Base
from fedspine.lm.lora import check_rank
from fedspine.split.trainable_half import Optimising, check_optimising, learning_rate_at


class HalvedFields(Protocol):
    """The hyper-parameters that these methods share."""

    rank: int
    scale: float
    steps: int
    batch: int
    optimiser: Optimiser
    learning_rate: Rate
    decay: float
    lowest: float
    weight_decay: float
    clip: float


def check_halves(fields: HalvedFields, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    check_settled(fields)
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
            f"method.batch is {fields.batch}, but all devices together hold {len(task.train)} rows; lower it"
        )
    if isinstance(task.base, Base):
        check_rank("method.rank", (fields.rank,), task.base.anatomy)
    check_optimising(optimising_at(fields, 0, 1))


def optimising_at(fields: HalvedFields, round: int, rounds: int) -> Optimising:
    """How a half is trained in a round, counted from 0."""
    rate = learning_rate_at(fields.learning_rate, round, rounds, fields.decay, fields.lowest)
    return Optimising(
        kind=fields.optimiser,
        learning_rate=rate,
        weight_decay=fields.weight_decay,
        clip=fields.clip,
    )
