"""FedProx on LoRA: local training is held near the model that the server sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", MLSys, arXiv:1812.06127. Each
device minimises its loss plus mu / 2 * ||w - w_t||^2, where w are the weights that it trains, the
LoRA factors and the task head, and w_t those of the server. Departures from the paper: README.md.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from fedspine import BadInput, Device, Fleet, Task, message, method, on_device
from fedspine.core.merging import merged
from fedspine.core.message import Tensors
from fedspine.core.method import usable
from fedspine.core.tensors import half, single
from fedspine.lm.base import Model
from fedspine.lm.lora import check_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import LocalTraining, Tuning, check_tuning, tuning_at


@message
class ProxOrder:
    """What the server sends to a device."""

    adapter: Tensors  # fp16
    head: Tensors  # fp16
    scale: float
    mu: float
    tuning: Tuning


@message
class ProxResult:
    """What a device returns."""

    adapter: Tensors  # fp16
    head: Tensors  # fp16
    loss: float  # mean over the last steps, without the proximal term
    examples: int


@on_device
def tune_near(device: Device, order: ProxOrder) -> ProxResult:
    """Train the received model on the device's rows, with the proximal term."""
    model = Model(
        structure=full(device.base.layout),
        adapter=single(order.adapter),
        head=single(order.head),
        scale=order.scale,
    )
    sent = {
        name: tensor.to(device.base.device)
        for name, tensor in {**model.adapter, **model.head}.items()
    }

    def proximal(trained: Tensors) -> torch.Tensor:
        gaps = [(trained[name] - sent[name]).square().sum() for name in trained]
        return 0.5 * order.mu * torch.stack(gaps).sum()

    trace = tune(device, model, order.tuning, penalty=proximal if order.mu else None)
    return ProxResult(
        adapter=half(trace.model.adapter),
        head=half(trace.model.head),
        loss=trace.loss,
        examples=len(device.data),
    )


@message
class ProxState:
    """What the server knows after a round; a run is saved and resumed from it."""

    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    layout: PrunableLayout
    adapter: Tensors
    head: Tensors


@method("fedprox_lora", robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedProxLora(LocalTraining):
    """FedLoRA with FedProx's proximal term."""

    rank: int = 8
    scale: float = 2.0  # alpha / rank
    mu: float = 0.1  # weight of the proximal term; 0 is FedLoRA

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(rank=4, steps=8, batch=16, learning_rate=2e-2, head_lr_multiplier=1.0)

    def check(self, task: Task) -> None:
        """Refuse what cannot work, before anything is spent."""
        check_rank("method.rank", (self.rank,), task.base.layout)
        check_tuning(self)
        if self.mu < 0:
            raise BadInput(f"method.mu is {self.mu}, but it cannot be negative; 0 is FedLoRA")

    def start(self, task: Task, rng: np.random.Generator) -> ProxState:
        """The state before the first round."""
        layout = task.base.layout
        return ProxState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=layout,
            adapter=fresh(layout.sites, self.rank, rng),
            head=task.base.initial_head(rng),
        )

    def round(self, state: ProxState, fleet: Fleet) -> ProxState:
        """Send, wait for the replies, merge those that are finite."""
        order = ProxOrder(
            adapter=half(state.adapter),
            head=half(state.head),
            scale=self.scale,
            mu=self.mu,
            tuning=tuning_at(self, state.round, state.rounds, state.turns),
        )
        replies = fleet.ask(tune_near, {device.id: order for device in fleet.devices})
        good = usable(replies, fleet)
        for reply in good:
            fleet.note(device=reply.device, rank=self.rank, sparsity=0.0, loss=reply.value.loss)
        return replace(
            state,
            round=state.round + 1,
            **merged(good, fleet, adapter=state.adapter, head=state.head),
        )

    def deploy(self, state: ProxState, device: str | None = None) -> Model:
        """The model that a device runs: here the same for all."""
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: ProxState) -> Model:
        """What was learnt, on the whole base."""
        return self.deploy(state)
