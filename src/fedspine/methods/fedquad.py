"""FedQuad: each device tunes adapters on as many upper blocks as its speed allows, and makes room
for them by quantising the activations that blocks keep for the backward pass.

Li et al. 2025, "FedQuad: Adaptive Layer-wise LoRA Deployment and Activation Quantization for
Federated Fine-Tuning", arXiv:2506.01001. A reconstruction of its abstract. What is the paper's and
what is ours: docs/methods/fedquad.md.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from fedspine.control.depth import DepthPlan, DepthPlanner
from fedspine.control.device_times import DeviceTimes, timed
from fedspine.core.checks import Asked, need, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.errors import BadInput, check_ranges
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import merged
from fedspine.core.message import message
from fedspine.core.method import LeastWork, method, on_todays, usable
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.base import Model
from fedspine.lm.cost import training_memory_bytes
from fedspine.lm.forecast import (
    USABLE_MEMORY,
    depth_traffic,
    least_work,
    leave_out,
    no_block_fits,
)
from fedspine.lm.lora import check_least_depth, check_rank, fresh, on_blocks
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import model_of
from fedspine.lm.replies import average_replies
from fedspine.lm.stored import Quantised, bits_each
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import TOY, LocalTraining, check_tuning, tuning_at
from fedspine.methods.fedlora import LoraResult, lora_result
from fedspine.methods.legend import DepthOrder, LegendState

BITS = (4, 8)


@message
class QuadOrder(DepthOrder):
    quantised: int  # of the trained blocks, counted from the lowest
    bits: int  # of what they keep for the backward pass

    def check(self, asked: Asked) -> None:
        super().check(asked)
        within("quantised", self.quantised, 0, asked.base.layout.layers - self.lowest)
        need(self.bits in BITS, f"bits is {self.bits}, but 4 or 8 was expected")


@on_device
def tune_quantised(device: Device, order: QuadOrder) -> LoraResult:
    """Train the adapters from block `lowest` on and the head, with gradients from quantised
    activations.
    """
    layout = device.base.layout
    model = model_of(order, layout)
    blocks = tuple(range(order.lowest, order.lowest + order.quantised))
    trace = tune(
        device,
        model,
        order.tuning,
        lowest=order.lowest,
        quantised=Quantised(blocks, order.bits) if blocks else None,
    )
    return lora_result(device, trace, on_blocks(layout, trace.model.adapter, order.lowest))


@message
class FedQuadState(LegendState):
    """Depths and times as LEGEND keeps them."""


@method("fedquad", merges_late=tune_quantised, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedQuad(LocalTraining):
    """LoRA with a depth for each device, in memory freed by quantised activations.

    >>> from fedspine import Recipe
    >>> Recipe(method=FedQuad(bits=8), rounds=5).method.quantise
    'as_needed'
    """

    rank: int = 8
    scale: float = 2.0  # alpha / rank
    bits: int = 4  # or 8, per activation that quantised blocks keep for the backward pass
    # as few blocks as a depth needs to fit the memory, none, or all trained ones
    quantise: Literal["as_needed", "never", "all"] = "as_needed"
    least_depth: int = 1
    coverage: float = 0.1  # share of a round's devices that train each block
    discount: float = 0.8  # weight of earlier exchanges after each new one

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4)

    def check(self, task: Task) -> None:
        check_ranges(self, {"coverage": (0, 1), "discount": (0, 1)})
        check_rank("method.rank", (self.rank,), task.base.layout)
        check_least_depth(self.least_depth, task.base.layout)
        if self.bits not in BITS:
            raise BadInput(f"method.bits is {self.bits}, but 4 or 8 was expected")
        check_tuning(self)

    def least_work(self, task: Task) -> LeastWork:
        """One block, quantised if that is allowed."""
        sizes = (task.base.layout, task.base.embeddings, task.max_tokens)
        return least_work(
            min(self._training_bytes(*sizes, 1, blocks) for blocks in self._allowed(1))
        )

    def start(self, task: Task, rng: np.random.Generator) -> FedQuadState:
        layout = task.base.layout
        return FedQuadState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=layout,
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            adapter=fresh(layout.sites, self.rank, rng),
            head=task.base.initial_head(rng),
            times={},
            depths={},
        )

    def round(self, state: FedQuadState, fleet: Fleet) -> FedQuadState:
        hosted = self._quantised_by_depth(state, fleet)
        plan = self._plan(state, {id: len(counts) for id, counts in hosted.items()})
        orders = {
            id: self._order(state, depth, hosted[id][depth - 1])
            for id, depth in plan.depths.items()
        }
        came = fleet.ask(tune_quantised, orders)
        if not (hosted or came):
            raise no_block_fits()
        replies = on_todays(usable(came, fleet), head=state.head)
        depths = {reply.device: state.layout.layers - reply.order.lowest for reply in replies}
        for reply in replies:
            fleet.note(
                device=reply.device,
                depth=depths[reply.device],
                quantised=reply.order.quantised,
                rank=self.rank,
                sparsity=0.0,
                loss=reply.value.loss,
                expected_seconds=plan.seconds.get(reply.device),  # late: another round's
                seconds=reply.cost.seconds,
            )
        fleet.note(expected_round_seconds=plan.round_seconds)  # of those asked in this round
        return replace(
            state,
            round=state.round + 1,
            adapter=average_replies(fleet, state.layout, state.adapter, replies),
            **merged(replies, fleet, head=state.head),
            times=state.times | {r.device: self._times_after(state, r) for r in replies},
            depths=state.depths | depths,
        )

    def deploy(self, state: FedQuadState, device: DeviceId | None = None) -> Model:
        """The base with the adapters of all blocks, the same for all devices."""
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: FedQuadState) -> Model:
        return self.deploy(state)

    # --- depths, and the blocks quantised for them ---

    def _quantised_by_depth(
        self, state: FedQuadState, fleet: Fleet
    ) -> dict[DeviceId, tuple[int, ...]]:
        """For each device, the number of blocks to quantise at depth 1, 2, ... up to the depth that
        fits its memory; a device that fits none is noted and left out.
        """
        layers, sizes = state.layout.layers, (state.layout, state.embeddings, state.max_tokens)
        needed = {
            (depth, quantised): self._training_bytes(*sizes, depth, quantised)
            for depth in range(1, layers + 1)
            for quantised in self._allowed(depth)
        }
        found = {}
        for profile in fleet.devices:
            room = USABLE_MEMORY * profile.memory_bytes
            counts = []
            for depth in range(1, layers + 1):
                fitting = [q for q in self._allowed(depth) if needed[depth, q] <= room]
                if not fitting:
                    break
                counts.append(fitting[0])
            if counts:
                found[profile.id] = tuple(counts)
            else:
                leave_out(fleet, profile.id)
        return found

    def _allowed(self, depth: int) -> range:
        """The numbers of quantised blocks allowed at this depth, the preferred one first."""
        match self.quantise:
            case "never":
                return range(1)
            case "all":
                return range(depth, depth + 1)
            case "as_needed":
                return range(depth + 1)

    def _training_bytes(
        self, layout: PrunableLayout, embeddings: int, tokens: int, depth: int, quantised: int
    ) -> int:
        return training_memory_bytes(
            layout,
            full(layout),
            rank=self.rank,
            embeddings=embeddings,
            batch=self.batch,
            tokens=tokens,
            first=layout.layers - depth,
            quantised=quantised,
            bits=bits_each(self.bits),
        )

    def _plan(self, state: FedQuadState, most: dict[DeviceId, int]) -> DepthPlan:
        layers = state.layout.layers
        planner = DepthPlanner(
            rule="barrier-floor",
            ranks=(self.rank,) * layers,
            traffic=depth_traffic(state.layout, self.rank, state.head),
            least=self.least_depth,
            coverage=self.coverage,
            fixed=layers,
        )
        return planner.plan(state.times, state.depths, most)

    def _times_after(self, state: FedQuadState, reply: Reply[LoraResult]) -> DeviceTimes:
        return timed(
            state.times.get(reply.device),
            reply.cost,
            depth=state.layout.layers - reply.order.lowest,
            layers=state.layout.layers,
            full_bytes=depth_traffic(state.layout, self.rank, state.head)[-1],
            discount=self.discount,
        )

    def _order(self, state: FedQuadState, depth: int, quantised: int) -> QuadOrder:
        lowest = state.layout.layers - depth
        return QuadOrder(
            adapter=half(on_blocks(state.layout, state.adapter, lowest)),
            head=half(state.head),
            scale=self.scale,
            lowest=lowest,
            tuning=tuning_at(self, state.round, state.rounds, state.turns),
            quantised=quantised,
            bits=self.bits,
        )
