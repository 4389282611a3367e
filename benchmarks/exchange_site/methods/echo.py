"""Echo: every site returns the numbers it was sent. No learning, so that what is timed is the
exchange alone.
"""

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Self

import numpy as np
import torch

from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import AllLost, Fleet
from fedspine.core.message import Tensors, message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full

WARM_UP = 3  # exchanges of each size that are not counted


@message
class EchoOrder:
    numbers: torch.Tensor  # float32


@message
class EchoResult:
    numbers: torch.Tensor  # float32


@on_device
def echo(device: Device, order: EchoOrder) -> EchoResult:
    return EchoResult(numbers=order.numbers)


@message
class EchoState:
    round: int
    layout: PrunableLayout
    head: Tensors


@method("echo")
@dataclass(frozen=True)
class EchoMethod:
    """In a round, `exchanges` of each size with all sites at once; the seconds of each are in the
    notes.
    """

    sizes: tuple[int, ...] = (40_000, 4_000_000)  # bytes of a message, each way
    exchanges: int = 30

    @classmethod
    def toy(cls) -> Self:
        return cls(sizes=(1000,), exchanges=1)

    def check(self, task: Task) -> None:
        pass

    def start(self, task: Task, rng: np.random.Generator) -> EchoState:
        return EchoState(round=0, layout=task.base.layout, head=task.base.initial_head(rng))

    def round(self, state: EchoState, fleet: Fleet) -> EchoState:
        for size in self.sizes:
            for number in range(-WARM_UP, self.exchanges):
                numbers = torch.rand(size // 4)
                began = perf_counter()
                replies = fleet.ask(
                    echo, {device.id: EchoOrder(numbers=numbers) for device in fleet.devices}
                )
                seconds = perf_counter() - began
                if (
                    not all(torch.equal(reply.value.numbers, numbers) for reply in replies)
                    or len(replies) < 2
                ):
                    raise AllLost(f"{len(replies)} sites returned what they were sent")
                if number >= 0:
                    fleet.note(size=size, seconds=seconds)
        return replace(state, round=state.round + 1)

    def deploy(self, state: EchoState, device: DeviceId | None = None) -> Model:
        return Model(structure=full(state.layout), adapter={}, head=state.head, scale=1.0)

    def unpruned(self, state: EchoState) -> Model:
        return self.deploy(state)
