"""FFA-LoRA: LoRA whose A factors stay as they were drawn; devices train the B factors, and the
server averages them.

Sun et al. 2024 (arXiv:2403.12313). The mean of the products B A is then the product of the means,
and noise of differential privacy enters B alone, not the product of two noisy factors. Departures:
docs/methods/ffa_lora.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch

from fedspine.core.checks import Asked, as_ordered
from fedspine.core.device import Device, DeviceId, keeps_privacy, on_device
from fedspine.core.fleet import Fleet
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name, check_depth, check_rank, fresh_a, is_a
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_b, check_head, check_loss, check_settings
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import TOY, LocalTraining, Tuning, check_tuning, tuning_at


@message
class FfaOrder:
    seed: int  # of the A factors, which are not sent
    adapter: Tensors  # fp16, the B factors
    head: Tensors  # fp16
    scale: float
    tuning: Tuning

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale)

    def check(self, asked: Asked) -> None:
        """B factors of one rank of some of the model's layers, and its head."""
        check_settings(seed=self.seed)
        check_b(self.adapter, asked.base.layout)
        check_head(self.head, asked)


@message
class FfaResult:
    adapter: Tensors  # fp16, the B factors
    head: Tensors  # fp16
    loss: float | None  # mean over the last steps; None where the run promises privacy
    examples: int

    def check(self, asked: Asked) -> None:
        """B factors and head are of the order's shapes."""
        as_ordered(self, asked)
        check_loss(self.loss)


@keeps_privacy
@on_device
def tune_b(device: Device, order: FfaOrder) -> FfaResult:
    layout = device.base.layout
    model = Model(
        structure=full(layout),
        adapter=_whole_adapter(layout, order.seed, single(order.adapter)),
        head=single(order.head),
        scale=order.scale,
    )
    trace = tune(device, model, order.tuning, freeze_a=True)
    return FfaResult(
        adapter=half(_b_factors(trace.model.adapter)),
        head=half(trace.model.head),
        loss=trace.loss,
        examples=len(device.data),
    )


@message
class FfaState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    layout: PrunableLayout
    seed: int  # of the A factors
    adapter: Tensors  # the B factors
    head: Tensors


@method("ffa-lora", merges_late=tune_b, robust=True, server_optimiser=True, same_shapes=True)
@dataclass(frozen=True)
class FfaLora(LocalTraining):
    """FedAvg of LoRA's B factors at one rank; the A factors are frozen."""

    rank: int = 8
    scale: float = 2.0  # alpha / rank
    depth: int = 0  # blocks with an adapter, counted from the output; 0: all of them
    privacy: ClassVar = ("rows", "devices")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4)

    def check(self, task: Task) -> None:
        check_rank("method.rank", (self.rank,), task.base.layout)
        check_depth(self.depth, task.base.layout)
        check_tuning(self)

    def start(self, task: Task, rng: np.random.Generator) -> FfaState:
        layout = task.base.layout
        lowest = layout.layers - (self.depth or layout.layers)
        seed = int(rng.integers(2**31))
        return FfaState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=layout,
            seed=seed,
            adapter={
                b_name(site.path): torch.zeros(site.rows, self.rank)
                for site in layout.sites
                if site.layer >= lowest
            },
            head=task.base.initial_head(rng),
        )

    def round(self, state: FfaState, fleet: Fleet) -> FfaState:
        order = FfaOrder(
            seed=state.seed,
            adapter=half(state.adapter),
            head=half(state.head),
            scale=self.scale,
            tuning=tuning_at(self, state.round, state.rounds, state.turns),
        )
        replies = usable(fleet.ask(tune_b, {device.id: order for device in fleet.devices}), fleet)
        replies = on_todays(replies, adapter=state.adapter, head=state.head)
        for reply in replies:
            fleet.note(device=reply.device, rank=self.rank, sparsity=0.0, loss=reply.value.loss)
        return replace(
            state,
            round=state.round + 1,
            **merged(replies, fleet, adapter=state.adapter, head=state.head),
        )

    def deploy(self, state: FfaState, device: DeviceId | None = None) -> Model:
        return Model(
            structure=full(state.layout),
            adapter=_whole_adapter(state.layout, state.seed, state.adapter),
            head=state.head,
            scale=self.scale,
        )

    def unpruned(self, state: FfaState) -> Model:
        return self.deploy(state)


def _whole_adapter(layout: PrunableLayout, seed: int, b_factors: Tensors) -> Tensors:
    """The whole adapter: these B factors, and A factors of the same rank as drawn from the seed."""
    rng, adapter = np.random.default_rng(seed), {}
    for site in layout.sites:
        b = b_factors.get(b_name(site.path))
        if b is not None:
            adapter[a_name(site.path)] = fresh_a(rng, b.shape[1], site.columns)
            adapter[b_name(site.path)] = b
    return adapter


def _b_factors(adapter: Tensors) -> Tensors:
    return {name: factor for name, factor in adapter.items() if not is_a(name)}
