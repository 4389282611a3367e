"""HetLoRA: each device has its own rank and may lower it; the server pads with zeros and weights by
norm.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP, arXiv:2401.06432. Nothing but rank is pruned. Departures: docs/methods/hetlora.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedspine.core.checks import Asked, need, tensors_of, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet, Profile, Reply
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.aggregate import (
    Contribution,
    average_factors,
    bounded,
    by_norm,
)
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name, cut_rank
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import (
    adapter_shapes,
    check_adapter,
    check_head,
    check_loss,
    check_settings,
)
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning, tuning_at
from fedspine.lm.unequal_ranks import (
    RankedState,
    UnequalRanks,
    check_ranks,
    first_fields,
    model_of,
    rank_of_device,
)

TINY = 1e-9  # 0.7 of 10 directions are seven, whatever the last bit says


@message
class HetLoraOrder:
    adapter: Tensors  # fp16, the first directions of the common one
    head: Tensors  # fp16
    scale: float
    rank: int
    shrunk: int  # the rank to shrink to; the directions beyond it are the tail
    penalty: float  # lambda, on the tail
    tuning: Tuning

    @property
    def reads(self) -> Reads:
        """With what the penalty adds to the training that `tuning` declares."""
        own = self.tuning.reads
        how = own.descent and replace(own.descent, penalty=own.descent.penalty + self.penalty)
        return replace(own, scale=self.scale, descent=how)

    def check(self, asked: Asked) -> None:
        check_adapter(self.adapter, asked.base.layout, self.rank)
        check_head(self.head, asked)
        within("shrunk", self.shrunk, 1, self.rank)
        check_settings(penalty=self.penalty)


@message
class HetLoraResult:
    adapter: Tensors  # fp16
    head: Tensors  # fp16
    rank: int  # that was kept
    loss: float  # mean over the last steps, without the penalty
    examples: int

    def check(self, asked: Asked) -> None:
        """The adapter has the order's rank, or the one to shrink to."""
        asked.examples(self.examples)
        check_loss(self.loss)
        check_head(self.head, asked)
        ranks = (self.rank,) if asked.order is None else (asked.order.rank, asked.order.shrunk)
        need(self.rank in ranks, f"rank is {self.rank}, but one of {ranks} was expected")
        tensors_of("adapter", self.adapter, adapter_shapes(asked.base.layout, self.rank))


@on_device
def tune_and_shrink(device: Device, order: HetLoraOrder) -> HetLoraResult:
    layout, sent = device.base.layout, single(order.adapter)
    model = Model(structure=full(layout), adapter=sent, head=single(order.head), scale=order.scale)
    pressed = order.penalty > 0 and order.shrunk < order.rank
    penalty = (
        (lambda factors: order.penalty * tail(layout, factors, order.shrunk)) if pressed else None
    )
    trace = tune(device, model, order.tuning, penalty=penalty)
    before, after = (
        tail(layout, sent, order.shrunk),
        tail(layout, trace.model.adapter, order.shrunk),
    )
    rank = order.shrunk if after < before else order.rank
    return HetLoraResult(
        adapter=half(cut_rank(trace.model.adapter, rank)),
        head=half(trace.model.head),
        rank=rank,
        loss=trace.loss,
        examples=len(device.data),
    )


def tail(layout: PrunableLayout, adapter: Tensors, start: int) -> Tensor:
    """||B[:, start:]|| ||A[start:]||, summed over sites; 0 where no direction is left.

    A bound on what the last directions add.
    """
    products = [
        torch.linalg.vector_norm(adapter[b_name(site.path)][:, start:])
        * torch.linalg.vector_norm(adapter[a_name(site.path)][start:])
        for site in layout.sites
    ]
    return torch.stack(products).sum()


@message
class HetLoraState(RankedState):
    """The adapter is of the largest rank."""


@method("hetlora", merges_late=tune_and_shrink, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class HetLora(UnequalRanks):
    """LoRA at ranks that differ between devices, zero-padded and averaged by norm."""

    penalty: float = 1e-3  # lambda: weight of the tail's norm in the loss
    decay: float = 0.99  # gamma: share of its rank that a device keeps when it shrinks; 1: never
    weigh_by: Literal["norm", "examples"] = "norm"  # what a device's adapter is weighted by

    def check(self, task: Task) -> None:
        check_ranks(self, task)
        if not self.penalty >= 0:
            raise BadInput(f"method.penalty is {self.penalty}, but it cannot be negative")
        if not 0 < self.decay <= 1:
            raise BadInput(
                f"method.decay is {self.decay}, but a share above 0 and up to 1 was expected"
            )

    def start(self, task: Task, rng: np.random.Generator) -> HetLoraState:
        return HetLoraState(**first_fields(self, task, rng))

    def round(self, state: HetLoraState, fleet: Fleet) -> HetLoraState:
        orders = self._orders(state, fleet.devices)
        replies = usable(fleet.ask(tune_and_shrink, orders), fleet)
        replies = on_todays(replies, head=state.head)
        for reply in replies:
            rank, kept = reply.order.rank, reply.value.rank
            fleet.note(
                device=reply.device, rank=rank, kept=kept, sparsity=0.0, loss=reply.value.loss
            )
        return replace(
            state,
            round=state.round + 1,
            adapter=self._merge(state, fleet, replies),
            **merged(replies, fleet, head=state.head),
            ranks=state.ranks | {r.device: r.value.rank for r in replies},
        )

    def deploy(self, state: HetLoraState, device: DeviceId | None = None) -> Model:
        """At the device's own rank; the global model at the largest."""
        return model_of(self, state, device)

    def unpruned(self, state: HetLoraState) -> Model:
        return model_of(self, state)

    def _merge(
        self, state: HetLoraState, fleet: Fleet, replies: Sequence[Reply[HetLoraResult]]
    ) -> Tensors:
        everything = full(state.layout)
        parts = [
            Contribution(
                sent=single(reply.order.adapter),
                back=single(reply.value.adapter),
                structure=everything,
                weight=float(reply.weight),
                late=reply.late > 0,
            )
            for reply in replies
        ]
        parts = bounded(fleet, state.layout, replies, parts)
        weighed = by_norm(parts) if self.weigh_by == "norm" else parts
        mean = average_factors(state.layout, state.adapter, weighed, fleet.aggregation)
        return fleet.server.step("adapter", state.adapter, mean)

    def _orders(
        self, state: HetLoraState, devices: tuple[Profile, ...]
    ) -> dict[DeviceId, HetLoraOrder]:
        head, tuning = half(state.head), tuning_at(self, state.round, state.rounds)
        orders = {}
        for profile in devices:
            given = rank_of_device(self, profile.id, profile.memory_bytes, state.seed)
            rank = state.ranks.get(profile.id, given)
            orders[profile.id] = HetLoraOrder(
                adapter=half(cut_rank(state.adapter, rank)),
                head=head,
                scale=self.scale,
                rank=rank,
                shrunk=max(floor(self.decay * rank + TINY), self.ranks[0]),
                penalty=self.penalty,
                tuning=tuning,
            )
        return orders
