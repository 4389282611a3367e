"""FedLoRA: every device tunes one adapter of the same rank, and the server averages A and B
(FedAvg).

McMahan et al. 2017 (arXiv:1602.05629) on LoRA, Hu et al. 2021 (arXiv:2106.09685), as FedIT does
(Zhang et al. 2023, arXiv:2305.05644). The simplest method here, and the reference that pruning
methods are measured against. Departures: docs/methods/fedlora.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from fedspine.core.checks import Asked, as_ordered
from fedspine.core.device import Device, DeviceId, keeps_privacy, on_device
from fedspine.core.fleet import Fleet
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.parts import quiet
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.base import Model
from fedspine.lm.lora import check_depth, check_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_adapter, check_head, check_loss, model_of
from fedspine.lm.request import TuneResult
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import TOY, LocalTraining, Tuning, check_tuning, tuning_at
from fedspine.pruning.head_start import HeadWeights, Start, check_head_start, prepared_head


@message
class LoraOrder:
    adapter: Tensors  # fp16
    head: Tensors  # fp16
    scale: float
    tuning: Tuning

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale)

    def check(self, asked: Asked) -> None:
        check_adapter(self.adapter, asked.base.layout)
        check_head(self.head, asked)


@message
class LoraResult:
    adapter: Tensors  # fp16
    head: Tensors  # fp16
    loss: float | None  # mean over the last steps; None where the run promises privacy
    examples: int

    def check(self, asked: Asked) -> None:
        """Adapter and head are of the order's shapes."""
        as_ordered(self, asked)
        check_loss(self.loss)


@keeps_privacy
@on_device
def tune_adapter(device: Device, order: LoraOrder) -> LoraResult:
    model = model_of(order, device.base.layout)
    trace = tune(device, model, order.tuning)
    return lora_result(device, trace, trace.model.adapter)


def lora_result(device: Device, trace: TuneResult, adapter: Tensors) -> LoraResult:
    """What a device sends back of its training, with the part of the adapter that it trained."""
    return LoraResult(
        adapter=half(adapter),
        head=half(trace.model.head),
        loss=trace.loss,
        examples=len(device.data),
    )


@message
class LoraState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    layout: PrunableLayout
    adapter: Tensors
    head: Tensors


@method("fedlora", merges_late=tune_adapter, robust=True, server_optimiser=True, same_shapes=True)
@dataclass(frozen=True)
class FedLora(LocalTraining):
    """FedAvg of LoRA factors at one rank.

    >>> from fedspine import FedLora, Recipe
    >>> Recipe(method=FedLora(rank=4, steps=10), rounds=5).method.steps
    10
    """

    rank: int = 8
    scale: float = 2.0  # alpha / rank
    depth: int = 0  # blocks with an adapter, counted from the output; 0: all of them
    head_start: Start = "random"  # the initial task head
    head_weights: HeadWeights = quiet("rows")  # what devices count by in the classifier
    privacy: ClassVar = ("rows", "devices")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4)

    def check(self, task: Task) -> None:
        check_rank("method.rank", (self.rank,), task.base.layout)
        check_depth(self.depth, task.base.layout)
        check_tuning(self)
        check_head_start(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> LoraState:
        layout = task.base.layout
        depth = self.depth or layout.layers
        return LoraState(
            round=0,
            rounds=task.rounds,
            layout=layout,
            turns=task.turns,
            adapter=fresh(
                (s for s in layout.sites if s.layer >= layout.layers - depth), self.rank, rng
            ),
            head=task.base.initial_head(rng),
        )

    def round(self, state: LoraState, fleet: Fleet) -> LoraState:
        head = prepared_head(self, state, fleet)
        order = LoraOrder(
            adapter=half(state.adapter),
            head=half(head),
            scale=self.scale,
            tuning=tuning_at(self, state.round, state.rounds, state.turns),
        )
        replies = usable(
            fleet.ask(tune_adapter, {device.id: order for device in fleet.devices}), fleet
        )
        replies = on_todays(replies, adapter=state.adapter, head=head)
        for reply in replies:
            fleet.note(device=reply.device, rank=self.rank, sparsity=0.0, loss=reply.value.loss)
        return replace(
            state,
            round=state.round + 1,
            **merged(replies, fleet, adapter=state.adapter, head=head),
        )

    def deploy(self, state: LoraState, device: DeviceId | None = None) -> Model:
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: LoraState) -> Model:
        return self.deploy(state)
