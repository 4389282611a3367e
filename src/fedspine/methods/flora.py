"""FLoRA: devices tune adapters of different ranks; the server stacks them, and all devices merge
the stack into the base and start a fresh adapter.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS, arXiv:2409.05976. The product of the stacks is the weighted sum of the
devices' products, so nothing is lost in aggregation. Departures: docs/methods/flora.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspine.core.checks import Asked, need, tensors_of
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import bounded, merged, trims
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, on_todays, usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.aggregate import Contribution, mean_product
from fedspine.lm.base import Model
from fedspine.lm.cost import HALF
from fedspine.lm.lora import a_name, adapter_rank, b_name, fresh, is_a, w_name
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.received import adapter_shapes, check_head, check_rank_of, rank_in
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning, tuning_at
from fedspine.lm.unequal_ranks import UnequalRanks, check_ranks, rank_of_device
from fedspine.methods.fedlora import LoraResult, lora_result

MERGED = "flora"  # what a device has merged, in its memory


@message
class FloraOrder:
    round: int  # whose weights the device trains on
    since: int  # the round whose weights it has; 0: the base
    stacks: dict[str, Tensors]  # fp16, the stacked factors of each round from `since` on, by round
    change: Tensors  # fp16, everything merged since the base; empty if the stacks are smaller
    merged_rank: int  # of everything merged then, at most the model's width
    head: Tensors  # fp16
    rank: int  # of the device's own fresh adapter
    scale: float
    tuning: Tuning

    @property
    def rounds(self) -> list[str]:
        """The rounds of the stacks, in the order in which they are merged."""
        return [str(self.since + number) for number in range(len(self.stacks))]

    @property
    def reads(self) -> Reads:
        return Reads(
            scale=self.scale, rank=self.rank, merged=self.merged_rank, names=tuple(self.change)
        )

    def check(self, asked: Asked) -> None:
        layout = asked.base.layout
        need(0 <= self.since <= self.round, f"since is {self.since}, in round {self.round}")
        if self.change:
            alone = not self.stacks and self.since == 0
            need(alone, "expected stacks or the whole change, got both")
            tensors_of("change", self.change, _dense_shapes(layout))
            need(self.merged_rank >= _full_rank(layout), "merged_rank is below the change's")
        else:
            got, expected = len(self.stacks), self.round - self.since
            need(got == expected, f"expected stacks of {expected} rounds, got {got}")
            need(self.stacks.keys() == set(self.rounds), "stacks are of other rounds")
        merged, numbers = 0, 0
        for stack in self.stacks.values():
            rank = rank_in(stack)
            check_rank_of(rank, layout)
            tensors_of("a stack", stack, adapter_shapes(layout, rank))
            merged, numbers = merged + rank, numbers + sum(each.numel() for each in stack.values())
        # each stack costs as much time as the whole change, so there are no more than it replaces
        need(numbers <= layout.parameters, "the stacks are larger than the whole change")
        check_rank_of(self.rank, layout)
        least = min(merged, _full_rank(layout))
        need(self.merged_rank >= least, f"merged_rank is {self.merged_rank}, below {least}")
        check_head(self.head, asked)

    def returned(self, asked: Asked) -> dict[str, Tensors]:
        """An adapter of the device's rank on all layers."""
        shapes = adapter_shapes(asked.base.layout, self.rank)
        return {
            "adapter": {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (dtype, shape) in shapes.items()
            }
        }


@message
class Merged:
    """What a device has merged into its base up to a round, and its rank."""

    round: int
    rank: int
    change: Tensors  # fp16, by `<path>.weight`


@on_device
def merge_and_tune(device: Device, order: FloraOrder) -> LoraResult:
    """Merge the stacks that the device lacks, and train a fresh adapter on the result."""
    layout = device.base.layout
    now = _merge_stacks(device, order)
    device.memory[MERGED] = now
    model = Model(
        structure=full(layout),
        adapter=fresh(layout.sites, order.rank, device.rng),
        head=single(order.head),
        scale=order.scale,
    )
    trace = tune(device, model, order.tuning, change=now.change or None)
    return lora_result(device, trace, trace.model.adapter)


def _merge_stacks(device: Device, order: FloraOrder) -> Merged:
    """What the device has merged after this order; the device is charged for the merging."""
    layout = device.base.layout
    before = device.memory.get(MERGED) if order.since else Merged(round=0, rank=0, change={})
    if before is None or before.round != order.since:
        raise ValueError(f"the order builds on round {order.since}, whose weights are missing")
    rank, change = before.rank, order.change or before.change
    for number in order.rounds:
        change = merged_stack(layout, change, order.stacks[number])
        rank += adapter_rank(order.stacks[number])
    rank = _full_rank(layout) if order.change else min(rank, _full_rank(layout))
    if order.merged_rank < rank:
        raise ValueError(f"the order says rank {order.merged_rank}, but {rank} is merged then")
    parts = (*order.stacks.values(), order.change)
    received = sum(tensor.numel() for part in parts for tensor in part.values())
    device.spend(
        flops=sum(2.0 * layout.parameters * adapter_rank(s) for s in order.stacks.values()),
        memory_bytes=HALF * (device.base.embeddings + layout.parameters + received),
    )
    return Merged(round=order.round, rank=rank, change=change)


def stacked(weighted: Sequence[tuple[float, Tensors]]) -> Tensors:
    """One adapter in fp16 whose product is the weighted sum of those of adapters of any ranks: A is
    all p_k A_k stacked vertically, B all B_k side by side. The weights p_k sum to 1; if all are 0,
    so is the product.
    """
    total = sum(weight for weight, _ in weighted) or 1.0
    return {
        name: torch.cat(
            [
                (weight / total if is_a(name) else 1.0) * adapter[name].float()
                for weight, adapter in weighted
            ],
            0 if is_a(name) else 1,
        ).half()
        for name in weighted[0][1]
    }


def merged_stack(layout: PrunableLayout, change: Tensors, stack: Tensors) -> Tensors:
    """The change of all weights plus the product of this stack, by `<path>.weight`, in fp16.

    The server and every device compute the same sums, round by round, so they have the same bits.
    """
    return _added(layout, change, lambda site: _product(site, stack))


def _added(
    layout: PrunableLayout, change: Tensors, product_of: Callable[[PrunableSite], Tensor]
) -> Tensors:
    """The change of all weights plus the product of each site, of which one at a time is held."""
    after: Tensors = {}
    for site in layout.sites:
        product, before = product_of(site), change.get(w_name(site.path))
        after[w_name(site.path)] = (product if before is None else product + before.float()).half()
    return after


def _product(site: PrunableSite, adapter: Tensors) -> Tensor:
    """B A, fp32."""
    return adapter[b_name(site.path)].float() @ adapter[a_name(site.path)].float()


@message
class FloraState:
    round: int
    rounds: int
    seed: int
    layout: PrunableLayout
    change: (
        Tensors  # fp16, of all weights since the base, without the scale; empty before the first
    )
    merged_rank: int  # of the change, at most the model's width
    stacks: dict[str, Tensors]  # fp16, of the last rounds, by round
    head: Tensors
    versions: dict[str, int]  # the round whose weights a device has; others have the base


@method("flora", merges_late=merge_and_tune, robust=True, changes_base=True)
@dataclass(frozen=True)
class Flora(UnequalRanks):
    """LoRA at ranks that differ by device, aggregated by stacking and merged into the base.

    >>> from fedspine import Recipe
    >>> Recipe(method=Flora(ranks=(4, 8)), rounds=5).method.ranks
    (4, 8)
    """

    def check(self, task: Task) -> None:
        check_ranks(self, task)

    def predicted_reads(self, base: Any) -> Reads:
        """With the rank of everything merged at the end: the full rank of the weights."""
        return replace(super().predicted_reads(base), merged=_full_rank(base.layout))

    def start(self, task: Task, rng: np.random.Generator) -> FloraState:
        return FloraState(
            round=0,
            rounds=task.rounds,
            seed=int(rng.integers(2**31)),
            layout=task.base.layout,
            change={},
            merged_rank=0,
            stacks={},
            head=task.base.initial_head(rng),
            versions={},
        )

    def round(self, state: FloraState, fleet: Fleet) -> FloraState:
        orders = self._orders(state, fleet)
        replies = usable(fleet.ask(merge_and_tune, orders), fleet)
        replies = on_todays(replies, head=state.head)
        for reply in replies:
            fleet.note(
                device=reply.device, rank=reply.order.rank, sparsity=0.0, loss=reply.value.loss
            )
        # without a reply, the server does not know what a device has merged
        known = {id: version for id, version in state.versions.items() if id not in orders}
        return replace(
            state,
            round=state.round + 1,
            **_merged_products(state, fleet, replies),
            **merged(replies, fleet, head=state.head),
            versions=known | {reply.device: reply.order.round for reply in replies},
        )

    def deploy(self, state: FloraState, device: DeviceId | None = None) -> Model:
        """The base with everything merged, the same for all devices, as factors of full rank."""
        adapter: Tensors = {}
        for site in state.layout.sites if state.change else ():
            weight = state.change[w_name(site.path)].float()
            wide = site.rows <= site.columns
            adapter[a_name(site.path)] = weight if wide else torch.eye(site.columns)
            adapter[b_name(site.path)] = torch.eye(site.rows) if wide else weight
        return Model(
            structure=full(state.layout), adapter=adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: FloraState) -> Model:
        return self.deploy(state)

    def _orders(self, state: FloraState, fleet: Fleet) -> dict[DeviceId, FloraOrder]:
        tuning, head = tuning_at(self, state.round, state.rounds), half(state.head)
        made: dict[tuple[int, int], FloraOrder] = {}
        orders = {}
        for profile in fleet.devices:
            rank = rank_of_device(self, profile.id, profile.memory_bytes, state.seed)
            since = state.versions.get(profile.id, 0)
            if (since, rank) not in made:
                made[since, rank] = FloraOrder(
                    round=state.round,
                    **_changes_since(state, since),
                    head=head,
                    rank=rank,
                    scale=self.scale,
                    tuning=tuning,
                )
            orders[profile.id] = made[since, rank]
        return orders


def _merged_products(
    state: FloraState, fleet: Fleet, replies: Sequence[Reply[LoraResult]]
) -> dict[str, Any]:
    """The change after a round, its rank, and the stacks, by their names in the state.

    Products are bounded and left out as `fleet.aggregation` says. Their median or trimmed mean has
    any rank, so no stack has it, and devices are sent the whole change.
    """
    layout, adapters = state.layout, [reply.value.adapter for reply in replies]
    if trims(fleet.aggregation):
        parts = [
            Contribution(sent={}, back=adapter, structure=full(layout), weight=float(reply.weight))
            for reply, adapter in zip(replies, adapters, strict=True)
        ]
        nothing = {site.path: torch.zeros(site.rows, site.columns) for site in layout.sites}
        mean = mean_product(layout, nothing, parts, fleet.aggregation)
        change = _added(layout, state.change, lambda site: mean[site.path])
        return {"change": change, "merged_rank": _full_rank(layout), "stacks": {}}
    shares = bounded(
        fleet,
        "adapter",
        [reply.device for reply in replies],
        ({site.path: _product(site, each) for site in layout.sites} for each in adapters),
    )
    counted = [
        (float(reply.weight), _shortened(adapter, share))
        for reply, adapter, share in zip(replies, adapters, shares, strict=True)
        if share
    ]
    stack = stacked(counted or [(0.0, adapters[0])])
    return {
        "change": merged_stack(layout, state.change, stack),
        "merged_rank": min(state.merged_rank + adapter_rank(stack), _full_rank(layout)),
        "stacks": _stacks_to_keep(layout, state.stacks | {str(state.round): stack}),
    }


def _shortened(adapter: Tensors, share: float) -> Tensors:
    """The adapter with its products times `share`."""
    if share == 1:
        return adapter
    return {name: tensor if is_a(name) else share * tensor for name, tensor in adapter.items()}


def _changes_since(state: FloraState, since: int) -> dict[str, Any]:
    """What a device with the weights of round `since` lacks: the stacks of the rounds from then on,
    or the whole change if that is smaller.
    """
    rounds = [str(number) for number in range(since, state.round)]
    if all(number in state.stacks for number in rounds):
        stacks, rank = {number: state.stacks[number] for number in rounds}, state.merged_rank
        return {"since": since, "stacks": stacks, "change": {}, "merged_rank": rank}
    widest = _full_rank(state.layout)  # a dense change can be of any rank
    return {"since": 0, "stacks": {}, "change": state.change, "merged_rank": widest}


def _stacks_to_keep(layout: PrunableLayout, stacks: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The stacks of the last rounds, as many as are together no larger than the whole change."""
    kept, left = {}, layout.parameters
    for number in sorted(stacks, key=int, reverse=True):
        left -= sum(factor.numel() for factor in stacks[number].values())
        if left < 0:
            break
        kept[number] = stacks[number]
    return dict(reversed(kept.items()))


def _full_rank(layout: PrunableLayout) -> int:
    """The largest rank that a change of every layer can have."""
    return min(min(site.rows, site.columns) for site in layout.sites)


def _dense_shapes(layout: PrunableLayout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {w_name(site.path): (torch.float16, (site.rows, site.columns)) for site in layout.sites}
