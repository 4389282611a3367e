"""Every site returns the adapter that it was sent, with what training would have changed and the
noise of the site. No learning, so that what is timed is the exchange with its noise.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Fleet
from fedspine.core.message import Tensors, message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.base import Model
from fedspine.lm.lora import fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full

CHANGE = 0.01  # of each entry


@message
class AdapterOrder:
    adapter: Tensors  # fp16


@message
class AdapterResult:
    adapter: Tensors  # fp16


@on_device
def echo_trained(device: Device, order: AdapterOrder) -> AdapterResult:
    device.uses(np.arange(len(device.data)))
    sent = single(order.adapter)
    trained = {name: tensor + CHANGE for name, tensor in sent.items()}
    return AdapterResult(adapter=half(device.released(sent, trained)))


@message
class EchoAdapterState:
    layout: PrunableLayout
    head: Tensors


@method("echo_adapter")
@dataclass(frozen=True)
class EchoAdapterMethod:
    """A round is one exchange of an adapter with all sites."""

    rank: int = 8

    @classmethod
    def toy(cls) -> Self:
        return cls(rank=2)

    def check(self, task: Task) -> None:
        pass

    def start(self, task: Task, rng: np.random.Generator) -> EchoAdapterState:
        return EchoAdapterState(layout=task.base.layout, head=task.base.initial_head(rng))

    def round(self, state: EchoAdapterState, fleet: Fleet) -> EchoAdapterState:
        rng = np.random.default_rng(0)
        order = AdapterOrder(adapter=half(fresh(state.layout.sites, self.rank, rng)))
        fleet.ask(echo_trained, {device.id: order for device in fleet.devices})
        return state

    def deploy(self, state: EchoAdapterState, device: DeviceId | None = None) -> Model:
        return Model(structure=full(state.layout), adapter={}, head=state.head, scale=1.0)

    def unpruned(self, state: EchoAdapterState) -> Model:
        return self.deploy(state)
