"""FedAvg: devices train the whole model for some steps, and the server averages the results.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(arXiv:1602.05629): the baseline of split learning without a split. Departures:
docs/methods/fedavg.md.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from fedspine.core.checks import Asked, as_ordered
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Fleet
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.task import Task
from fedspine.core.tensors import single
from fedspine.lm.received import check_loss
from fedspine.split.whole_model import (
    TOY,
    Training,
    WholeModelTraining,
    check_sent,
    check_whole,
    cutting_of,
    model_of,
    no_memory,
    train_whole,
    trained_of,
    training_at,
    weights_of,
    with_memory,
)
from fedspine.split.wire import weights_wired


@message
class AverageOrder:
    weights: (
        Tensors  # all that is trained: of a transformer LoRA and the task head, of a net everything
    )
    training: Training
    precision: str  # of the weights sent back

    def check(self, asked: Asked) -> None:
        check_sent(self.weights, self.training.cutting, self.precision, asked)


@message
class AverageResult:
    weights: Tensors
    loss: float  # mean over the last steps
    examples: int

    def check(self, asked: Asked) -> None:
        """The weights are of the order's shapes."""
        as_ordered(self, asked)
        check_loss(self.loss)


@on_device
def train_and_send(device: Device, order: AverageOrder) -> AverageResult:
    result = train_whole(device, order.weights, order.training)
    return AverageResult(
        weights=weights_wired(result.weights, order.precision),
        loss=result.ended,
        examples=len(device.data),
    )


@message
class AverageState:
    round: int
    rounds: int
    max_tokens: int
    model: Any


@method("fedavg", merges_late=train_and_send, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedAvg(WholeModelTraining):
    """Whole models trained on devices and averaged by rows; defaults as in MergeSFL's code."""

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY)

    def check(self, task: Task) -> None:
        check_whole(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> AverageState:
        split_model = cutting_of(self, task.base).of(task.base)
        return AverageState(
            round=0,
            rounds=task.rounds,
            max_tokens=task.max_tokens,
            model=split_model.join(*split_model.start(rng)),
        )

    def round(self, state: AverageState, fleet: Fleet) -> AverageState:
        split_model = cutting_of(self, fleet.base).of(fleet.base)
        order = AverageOrder(
            weights=weights_wired(weights_of(split_model, state.model), self.precision),
            training=training_at(self, fleet.base, state.round, state.rounds),
            precision=self.precision,
        )
        able = with_memory(fleet, split_model, self.batch, state.max_tokens)
        came = fleet.ask(train_and_send, {device.id: order for device in able})
        if not (able or came):
            raise no_memory()
        replies = on_todays(usable(came, fleet), weights=trained_of(split_model, state.model))
        for reply in replies:
            fleet.note(device=reply.device, loss=reply.value.loss)
        before = single(weights_of(split_model, state.model))
        statistics = split_model.statistics
        weights = merged(replies, fleet, averaged=statistics, weights=before)["weights"]
        return replace(
            state, round=state.round + 1, model=model_of(split_model, state.model, weights)
        )

    def deploy(self, state: AverageState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: AverageState) -> Any:
        return state.model
