"""LEGEND: each device tunes adapters on as many of the upper blocks as it has time for, with ranks
that rise towards the output.

Liu et al. 2024, "Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices",
arXiv:2412.20004. A reconstruction: the paper's listing is not public. What is the paper's and what
is ours: docs/methods/legend.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from fedspine.control.depth import DepthPlan, DepthPlanner, DepthRule, check_fixed, rising_ranks
from fedspine.control.device_times import DeviceTimes, timed
from fedspine.core.checks import Asked, within
from fedspine.core.device import Device, DeviceId, on_device, returns_sent_weights
from fedspine.core.errors import BadInput, check_ranges
from fedspine.core.fleet import AllLost, Fleet, Reply
from fedspine.core.merging import Weighted, combined
from fedspine.core.message import Tensors, message
from fedspine.core.method import LeastWork, method, on_todays, usable
from fedspine.core.parts import quiet
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.base import Model
from fedspine.lm.forecast import (
    depth_bytes,
    depth_traffic,
    depths_hosted,
    least_work,
    no_block_fits,
)
from fedspine.lm.lora import (
    check_depth,
    check_least_depth,
    check_rank,
    cut_blocks,
    fresh,
    on_blocks,
)
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_adapter, check_head, model_of
from fedspine.lm.replies import average_replies
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import TOY, LocalTraining, Tuning, check_tuning, tuning_at
from fedspine.methods.fedlora import LoraResult, lora_result
from fedspine.pruning.head_start import HeadWeights, Start, check_head_start, prepared_head


@message
class DepthOrder:
    adapter: Tensors  # fp16, of the blocks that the device trains; of all where it uses all
    head: Tensors  # fp16
    scale: float
    lowest: int  # the first block to train, counted from the input
    tuning: Tuning

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale)

    def check(self, asked: Asked) -> None:
        check_adapter(self.adapter, asked.base.layout)
        check_head(self.head, asked)
        within("lowest", self.lowest, 0, asked.base.layout.layers - 1)

    def returned(self, asked: Asked) -> dict[str, Tensors]:
        """What was trained."""
        return {"adapter": on_blocks(asked.base.layout, self.adapter, self.lowest)}


@on_device
def tune_top(device: Device, order: DepthOrder) -> LoraResult:
    """Train the adapters from block `lowest` on and the head; send back what was trained."""
    layout = device.base.layout
    model = model_of(order, layout)
    trace = tune(device, model, order.tuning, lowest=order.lowest)
    return lora_result(device, trace, on_blocks(layout, trace.model.adapter, order.lowest))


@returns_sent_weights
@on_device
def probe_top(device: Device, order: DepthOrder) -> LoraResult:
    """The same, only to measure its time: the weights are returned as they were sent, and the
    device keeps nothing.
    """
    before = dict(device.memory)
    sent = on_blocks(device.base.layout, order.adapter, order.lowest)
    result = replace(tune_top(device, order), adapter=half(sent), head=half(order.head))
    device.memory = before
    return result


@message
class LegendState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    layout: PrunableLayout
    embeddings: int  # parameters outside the blocks, for the memory bound
    max_tokens: int
    adapter: Tensors
    head: Tensors
    times: dict[str, DeviceTimes]  # what exchanges took
    depths: dict[str, int]  # of every device that has replied


@method("legend", merges_late=tune_top, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class Legend(LocalTraining):
    """LoRA depth for each device, and ranks that rise towards the output.

    >>> from fedspine import Recipe
    >>> Recipe(method=Legend(rank=8, rank_difference=0.5), rounds=5).method.depth_rule
    'barrier-floor'
    """

    rank: int = 8  # mean over the blocks
    rank_difference: float = 1.0  # lambda: between a block and the one below it
    rank_mode: Literal["global", "per_device"] = "global"  # the same for all, or fitted to links
    # what an adapter is worth grows with its ranks to this power; for ranks of a device's own
    rank_worth: float = 0.5
    scale: float = 2.0  # alpha / mean rank, the same for all blocks
    depth_rule: DepthRule = "barrier-floor"  # how LCD chooses depths
    depth: int = 0  # of all devices where the rule is "fixed"; 0: all blocks
    least_depth: int = 2  # k_min
    coverage: float = 0.1  # c_min: share of a round's devices that train each block
    discount: float = 0.8  # rho: what an old exchange still counts after a new one
    # of a new device at each of two depths, to learn its speed; 0: it counts as the fleet's average
    probe_batches: int = 0
    # adapters of blocks that a device does not train are neither sent nor used there
    skip_inactive: bool = True
    weigh_by: Literal["examples", "equal"] = "examples"
    head_start: Start = "random"  # the initial task head
    head_weights: HeadWeights = quiet("rows")  # what devices count by in the classifier

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4, least_depth=1, probe_batches=2)

    def check(self, task: Task) -> None:
        layers = task.base.layout.layers
        check_ranges(self, {"coverage": (0, 1), "discount": (0, 1), "rank_worth": (0, 1)})
        check_rank("method.rank", (self.rank,), task.base.layout)
        check_depth(self.depth, task.base.layout)
        check_fixed("method.depth", self.depth, "method.depth_rule", self.depth_rule)
        if self.rank_mode == "global" and self.rank_worth != Legend.rank_worth:
            raise BadInput(
                f"method.rank_worth is {self.rank_worth}, but with method.rank_mode = global all "
                "devices have the same ranks; leave it out, or set method.rank_mode to per_device"
            )
        check_least_depth(self.least_depth, task.base.layout)
        if self.probe_batches < 0:
            raise BadInput(
                f"method.probe_batches is {self.probe_batches}, but it cannot be negative"
            )
        lowest_rank = self.rank - abs(self.rank_difference) * (layers - 1) / 2
        if lowest_rank < 1:
            raise BadInput(
                f"method.rank_difference is {self.rank_difference}, so that with method.rank = "
                f"{self.rank} the lowest of {layers} blocks has rank {lowest_rank:g}; for ranks of "
                f"at least 1, lower it to {2 * (self.rank - 1) / max(1, layers - 1):.3g}, or raise "
                "method.rank"
            )
        check_rank("method.rank_difference", self._ranks(layers), task.base.layout)
        check_tuning(self)
        check_head_start(self, task)

    def least_work(self, task: Task) -> LeastWork:
        base = task.base
        return least_work(self._memory_by_depth(base.layout, base.embeddings, task.max_tokens)[0])

    def start(self, task: Task, rng: np.random.Generator) -> LegendState:
        layout = task.base.layout
        ranks = self._ranks(layout.layers)
        adapter: Tensors = {}
        for site in layout.sites:
            adapter |= fresh([site], ranks[site.layer], rng)
        return LegendState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=layout,
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            adapter=adapter,
            head=task.base.initial_head(rng),
            times={},
            depths={},
        )

    def round(self, state: LegendState, fleet: Fleet) -> LegendState:
        state = replace(state, head=prepared_head(self, state, fleet))
        hosted = self._largest_depths(state, fleet)
        times, silent = self._probe_new_devices(state, fleet, hosted)
        state = replace(state, times=times)
        most = {id: depth for id, depth in hosted.items() if id not in silent}
        plan = self._plan(state, most)
        orders = {id: self._order(state, d, plan.ranks.get(id)) for id, d in plan.depths.items()}
        came = fleet.ask(tune_top, orders)
        if not (hosted or came):
            raise no_block_fits()
        replies = on_todays(usable(came, fleet), head=state.head)
        depths = {reply.device: state.layout.layers - reply.order.lowest for reply in replies}
        times = state.times
        for reply in replies:
            depth = depths[reply.device]
            times = times | {
                reply.device: self._times_after(state, times, reply, self.steps, depth)
            }
            fleet.note(
                device=reply.device,
                depth=depth,
                sparsity=0.0,
                loss=reply.value.loss,
                expected_seconds=plan.seconds.get(reply.device),  # of a late one, another round's
                seconds=reply.cost.seconds,
            )
        fleet.note(expected_round_seconds=plan.round_seconds)  # of those asked in this round
        return replace(
            state,
            round=state.round + 1,
            adapter=average_replies(fleet, state.layout, state.adapter, replies, self._weight),
            head=combined(
                fleet,
                "head",
                [Weighted(r.device, self._weight(r), r.value.head) for r in replies],
                state.head,
            ),
            times=times,
            depths=state.depths | depths,
        )

    def deploy(self, state: LegendState, device: DeviceId | None = None) -> Model:
        """The base with the adapters of all blocks, the same for all devices."""
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: LegendState) -> Model:
        return self.deploy(state)

    def _ranks(self, layers: int) -> tuple[int, ...]:
        return rising_ranks(layers, layers * self.rank, self.rank_difference)

    # --- depths and ranks ---

    def _largest_depths(self, state: LegendState, fleet: Fleet) -> dict[DeviceId, int]:
        """The largest depth in each device's memory; one that hosts none is noted and not asked."""
        needed = self._memory_by_depth(state.layout, state.embeddings, state.max_tokens)
        return depths_hosted(fleet, needed)

    def _memory_by_depth(self, layout: PrunableLayout, embeddings: int, tokens: int) -> list[int]:
        """Bytes of memory at depths 1, 2, ..."""
        return depth_bytes(
            layout,
            self._ranks(layout.layers),
            embeddings=embeddings,
            batch=self.batch,
            tokens=tokens,
        )

    def _probe_new_devices(
        self, state: LegendState, fleet: Fleet, most: Mapping[DeviceId, int]
    ) -> tuple[dict[str, DeviceTimes], set[DeviceId]]:
        """The times, with those of new devices, which train a few batches at two depths only to
        measure their speed; and the devices that did not answer, which are not asked in this round.
        """
        times, new = state.times, [id for id in most if id not in state.times]
        if not self.probe_batches or self.depth_rule == "fixed" or not new:
            return times, set()
        batches, probed = min(self.probe_batches, self.steps), new
        for factor in (1, 2):
            depths = {id: min(factor * self.least_depth, most[id]) for id in probed}
            orders = {id: self._order(state, depth, steps=batches) for id, depth in depths.items()}
            try:
                replies = fleet.ask(probe_top, orders)
            except AllLost:  # too few of the new ones, without which the others go on
                if len(new) == len(most):
                    raise
                replies = []
            for reply in replies:
                seen = self._times_after(state, times, reply, batches, depths[reply.device])
                times = times | {reply.device: seen}
            probed = [reply.device for reply in replies]
        return times, set(new) - set(probed)

    def _times_after(
        self,
        state: LegendState,
        times: Mapping[str, DeviceTimes],
        reply: Reply[LoraResult],
        steps: int,
        depth: int,
    ) -> DeviceTimes:
        return timed(
            times.get(reply.device),
            reply.cost,
            depth=depth,
            layers=state.layout.layers,
            full_bytes=self._traffic_by_depth(state)[-1],
            discount=self.discount,
            work=steps / self.steps,
        )

    def _plan(self, state: LegendState, most: Mapping[DeviceId, int]) -> DepthPlan:
        layers = state.layout.layers
        planner = DepthPlanner(
            rule=self.depth_rule,
            ranks=self._ranks(layers),
            traffic=self._traffic_by_depth(state),
            least=self.least_depth,
            coverage=self.coverage,
            fixed=self.depth or layers,
            rank_worth=self.rank_worth if self.rank_mode == "per_device" else None,
        )
        return planner.plan(state.times, state.depths, most)

    def _traffic_by_depth(self, state: LegendState) -> np.ndarray:
        """Bytes that a device of each depth sends and receives in a round, [0 to layers]."""
        ranks = self._ranks(state.layout.layers)
        return depth_traffic(state.layout, ranks, state.head, all_down=not self.skip_inactive)

    # --- messages ---

    def _order(
        self,
        state: LegendState,
        depth: int,
        ranks: tuple[int, ...] | None = None,
        steps: int | None = None,
    ) -> DepthOrder:
        """What a device of this depth gets; `ranks` from its lowest block up where they are its
        own.
        """
        layout = state.layout
        lowest = layout.layers - depth
        adapter = state.adapter
        if self.skip_inactive:
            adapter = on_blocks(layout, adapter, lowest)
        if ranks is not None:
            adapter = adapter | cut_blocks(layout, adapter, lowest, ranks)
        tuning = tuning_at(self, state.round, state.rounds, state.turns)
        return DepthOrder(
            adapter=half(adapter),
            head=half(state.head),
            scale=self.scale,
            lowest=lowest,
            tuning=tuning if steps is None else replace(tuning, steps=steps),
        )

    def _weight(self, reply: Reply[LoraResult]) -> float:
        return float(reply.weight) if self.weigh_by == "examples" else 1.0
