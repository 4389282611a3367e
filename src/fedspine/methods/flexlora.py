"""FlexLoRA: each device has its own rank; the server averages products and sends each device the
best adapter of its rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", NeurIPS, arXiv:2402.11505. A device's work is that of FedLoRA. Departures:
docs/methods/flexlora.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.aggregate import Contribution, bounded, mean_product
from fedspine.lm.base import Model
from fedspine.lm.factoring import factor
from fedspine.lm.lora import a_name, adapter_rank, b_name, cut_rank, is_b
from fedspine.lm.structure import full
from fedspine.lm.tuning import tuning_at
from fedspine.lm.unequal_ranks import (
    RankedState,
    UnequalRanks,
    check_ranks,
    first_fields,
    model_of,
    rank_of_device,
)
from fedspine.methods.fedlora import LoraOrder, LoraResult, tune_adapter


@message
class FlexLoraState(RankedState):
    """The adapter's directions are in the order of their singular values."""


@method("flexlora", merges_late=tune_adapter, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FlexLora(UnequalRanks):
    """LoRA at ranks that differ by device, averaged as products and truncated by their SVD."""

    # above 0 a device of rank r trains at scale alpha / r instead, as in the released code with 16
    alpha: float = 0.0

    def check(self, task: Task) -> None:
        check_ranks(self, task)
        if not self.alpha >= 0:
            raise BadInput(
                f"method.alpha is {self.alpha}, but a positive "
                "number, or 0 for one scale, was expected"
            )

    def start(self, task: Task, rng: np.random.Generator) -> FlexLoraState:
        return FlexLoraState(**first_fields(self, task, rng))

    def round(self, state: FlexLoraState, fleet: Fleet) -> FlexLoraState:
        ranks = {
            p.id: rank_of_device(self, p.id, p.memory_bytes, state.seed) for p in fleet.devices
        }
        by_rank = {rank: self._order(state, rank) for rank in set(ranks.values())}
        replies = usable(
            fleet.ask(tune_adapter, {id: by_rank[rank] for id, rank in ranks.items()}), fleet
        )
        replies = on_todays(replies, head=state.head)
        ranks = {reply.device: adapter_rank(reply.order.adapter) for reply in replies}
        for reply in replies:
            fleet.note(
                device=reply.device, rank=ranks[reply.device], sparsity=0.0, loss=reply.value.loss
            )
        return replace(
            state,
            round=state.round + 1,
            adapter=self._merge(state, fleet, replies),
            **merged(replies, fleet, head=state.head),
            ranks=state.ranks | ranks,
        )

    def deploy(self, state: FlexLoraState, device: DeviceId | None = None) -> Model:
        """At the device's own rank; the global model at the largest."""
        return model_of(self, state, device)

    def unpruned(self, state: FlexLoraState) -> Model:
        return model_of(self, state)

    def _order(self, state: FlexLoraState, rank: int) -> LoraOrder:
        scale = self.alpha / rank if self.alpha else self.scale
        # the first directions are the best approximation of their rank, since `factor` orders them
        adapter = _scaled(cut_rank(state.adapter, rank), self.scale / scale)
        return LoraOrder(
            adapter=half(adapter),
            head=half(state.head),
            scale=scale,
            tuning=tuning_at(self, state.round, state.rounds),
        )

    def _merge(
        self, state: FlexLoraState, fleet: Fleet, replies: Sequence[Reply[LoraResult]]
    ) -> Tensors:
        """The best factors of the row-weighted mean over devices of scale_i / scale * B_i A_i."""
        everything, parts = full(state.layout), []
        for reply in replies:
            sent, back = (
                _scaled(single(each.adapter), reply.order.scale / self.scale)
                for each in (reply.order, reply.value)
            )
            weight, late = float(reply.weight), reply.late > 0
            parts.append(Contribution(sent, back, everything, weight, late))
        before = {
            site.path: state.adapter[b_name(site.path)] @ state.adapter[a_name(site.path)]
            for site in state.layout.sites
        }
        parts = bounded(fleet, state.layout, replies, parts)
        mean = mean_product(state.layout, before, parts, fleet.aggregation)
        dense = fleet.server.step("products", before, mean)
        return factor(state.layout, dense, self.ranks[-1], state.adapter, state.seed + state.round)


def _scaled(adapter: Tensors, by: float) -> Tensors:
    """The adapter with its products multiplied by a factor, applied to B."""
    return {name: by * factor if is_b(name) else factor for name, factor in adapter.items()}
