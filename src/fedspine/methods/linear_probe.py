"""Linear probing: the base is frozen, devices train the head alone, the server averages it
(FedAvg).

The control for methods that tune the base: probes of frozen features (Alain and Bengio 2016,
arXiv:1610.01644) under FedAvg, McMahan et al. 2017 (arXiv:1602.05629). Departures:
docs/methods/linear_probe.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from fedspine.core.checks import Asked, as_ordered
from fedspine.core.device import Device, DeviceId, keeps_privacy, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.base import Model
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_head, check_loss
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import HeadTraining, Tuning, check_tuning, tuning_at


@message
class ProbeOrder:
    head: Tensors  # fp16
    tuning: Tuning

    def check(self, asked: Asked) -> None:
        check_head(self.head, asked)


@message
class ProbeResult:
    head: Tensors  # fp16
    loss: float | None  # mean over the last steps; None where the run promises privacy
    examples: int

    def check(self, asked: Asked) -> None:
        """The head is of the order's shape."""
        as_ordered(self, asked)
        check_loss(self.loss)


@keeps_privacy
@on_device
def tune_head(device: Device, order: ProbeOrder) -> ProbeResult:
    trace = tune(device, _probe_model(device.base.layout, single(order.head)), order.tuning)
    return ProbeResult(head=half(trace.model.head), loss=trace.loss, examples=len(device.data))


@message
class ProbeState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    layout: PrunableLayout
    head: Tensors


@method("linear_probe", merges_late=tune_head, robust=True, server_optimiser=True, same_shapes=True)
@dataclass(frozen=True)
class LinearProbe(HeadTraining):
    """FedAvg of the task head over a frozen base."""

    learning_rate: float = 1e-2  # over the rounds as `schedule` says
    privacy: ClassVar = ("rows", "devices")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(steps=8, batch=16, learning_rate=3e-2)

    def check(self, task: Task) -> None:
        if not task.base.head:
            raise BadInput(
                "linear_probe trains the task head alone, and a language model has none; choose "
                "another method, such as fedlora"
            )
        check_tuning(self)

    def start(self, task: Task, rng: np.random.Generator) -> ProbeState:
        return ProbeState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=task.base.layout,
            head=task.base.initial_head(rng),
        )

    def round(self, state: ProbeState, fleet: Fleet) -> ProbeState:
        order = ProbeOrder(
            head=half(state.head), tuning=tuning_at(self, state.round, state.rounds, state.turns)
        )
        replies = usable(
            fleet.ask(tune_head, {device.id: order for device in fleet.devices}), fleet
        )
        replies = on_todays(replies, head=state.head)
        for reply in replies:
            fleet.note(device=reply.device, rank=0, sparsity=0.0, loss=reply.value.loss)
        return replace(
            state,
            round=state.round + 1,
            **merged(replies, fleet, head=state.head),
        )

    def deploy(self, state: ProbeState, device: DeviceId | None = None) -> Model:
        return _probe_model(state.layout, state.head)

    def unpruned(self, state: ProbeState) -> Model:
        return self.deploy(state)


def _probe_model(layout: PrunableLayout, head: Tensors) -> Model:
    return Model(structure=full(layout), adapter={}, head=head, scale=1.0)
