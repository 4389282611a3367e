"""Fed-HeLLo: each device trains adapters on as many blocks as its resources allow; a geometric
pattern decides on which.

Zhang et al. 2025, "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous
LoRA Allocation", IEEE TNNLS, arXiv:2506.12213. What is the paper's and what is ours:
docs/methods/fed_hello.md.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Self

import numpy as np

from fedspine.control.patterns import Pattern, blocks_of_device
from fedspine.control.ranks import RankRule, one_of_device
from fedspine.core.checks import Asked, need
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import LeastWork, method, on_todays, usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.base import Model
from fedspine.lm.forecast import depth_bytes, depths_hosted, least_work, no_block_fits
from fedspine.lm.lora import check_rank, fresh, of_blocks
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_adapter, check_head, model_of
from fedspine.lm.replies import average_replies
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import TOY, LocalTraining, Tuning, check_tuning, tuning_at
from fedspine.methods.fedlora import LoraResult, lora_result


@message
class BlocksOrder:
    adapter: Tensors  # fp16, of all blocks
    head: Tensors  # fp16
    scale: float
    blocks: tuple[int, ...]  # to train, ascending, counted from the input
    tuning: Tuning

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale)

    def check(self, asked: Asked) -> None:
        layout = asked.base.layout
        check_adapter(self.adapter, layout)
        check_head(self.head, asked)
        known = len(self.blocks) <= layout.layers and set(self.blocks) <= set(range(layout.layers))
        need(bool(self.blocks) and known, f"blocks are not some of the model's {layout.layers}")
        need(list(self.blocks) == sorted(set(self.blocks)), "blocks do not rise")

    def returned(self, asked: Asked) -> dict[str, Tensors]:
        """The trained adapters."""
        return {"adapter": of_blocks(asked.base.layout, self.adapter, self.blocks)}


@on_device
def tune_blocks(device: Device, order: BlocksOrder) -> LoraResult:
    """Train the head and the adapters of some blocks; those of the other blocks are frozen."""
    layout = device.base.layout
    model = model_of(order, layout)
    trace = tune(device, model, order.tuning, blocks=order.blocks)
    return lora_result(device, trace, of_blocks(layout, trace.model.adapter, order.blocks))


@message
class FedHelloState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    seed: int
    layout: PrunableLayout
    embeddings: int  # parameters outside the blocks, for the memory bound
    max_tokens: int
    adapter: Tensors
    head: Tensors


@method("fed-hello", merges_late=tune_blocks, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedHello(LocalTraining):
    """LoRA on some blocks per device, in a pattern over the fleet.

    >>> from fedspine import Recipe
    >>> Recipe(method=FedHello(pattern="inverted"), rounds=5).method.shares
    (0.5, 0.75, 1.0)
    """

    pattern: Pattern = "bottleneck"  # which blocks most devices train
    randomised: bool = False  # draw blocks in each round, with the pattern's probabilities
    shares: tuple[float, ...] = (0.5, 0.75, 1.0)  # shares of the blocks that a device may train
    share_by: RankRule = "memory"  # declared, or "random"
    # declared memory that earns the largest share; less earns its part
    largest_share_gib: float = 32.0
    rank: int = 8
    scale: float = 2.0  # alpha / rank

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4, share_by="random")

    def check(self, task: Task) -> None:
        check_rank("method.rank", (self.rank,), task.base.layout)
        rising = bool(self.shares) and list(self.shares) == sorted(set(self.shares))
        if not (rising and self.shares[0] > 0 and self.shares[-1] <= 1):
            raise BadInput(
                f"method.shares is {list(self.shares)}, but rising shares of the blocks, above 0 "
                "and up to 1, were expected"
            )
        if not self.largest_share_gib > 0:
            raise BadInput(
                f"method.largest_share_gib is {self.largest_share_gib}, but a positive number is "
                "needed"
            )
        check_tuning(self)

    def least_work(self, task: Task) -> LeastWork:
        base = task.base
        return least_work(self._memory_by_depth(base.layout, base.embeddings, task.max_tokens)[0])

    def start(self, task: Task, rng: np.random.Generator) -> FedHelloState:
        layout = task.base.layout
        return FedHelloState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=layout,
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            adapter=fresh(layout.sites, self.rank, rng),
            head=task.base.initial_head(rng),
            seed=int(rng.integers(2**31)),
        )

    def round(self, state: FedHelloState, fleet: Fleet) -> FedHelloState:
        orders = self._orders(state, fleet)
        came = fleet.ask(tune_blocks, orders)
        if not (orders or came):
            raise no_block_fits()
        replies = on_todays(usable(came, fleet), head=state.head)
        for reply in replies:
            fleet.note(
                device=reply.device,
                blocks=list(reply.order.blocks),
                rank=self.rank,
                sparsity=0.0,
                loss=reply.value.loss,
            )
        return replace(
            state,
            round=state.round + 1,
            adapter=average_replies(fleet, state.layout, state.adapter, replies),
            **merged(replies, fleet, head=state.head),
        )

    def deploy(self, state: FedHelloState, device: DeviceId | None = None) -> Model:
        """The base with the adapters of all blocks, the same for all devices."""
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def unpruned(self, state: FedHelloState) -> Model:
        return self.deploy(state)

    def _orders(self, state: FedHelloState, fleet: Fleet) -> dict[DeviceId, BlocksOrder]:
        layers = state.layout.layers
        needed = self._memory_by_depth(state.layout, state.embeddings, state.max_tokens)
        hosted = depths_hosted(fleet, needed)
        adapter, head = half(state.adapter), half(state.head)
        tuning = tuning_at(self, state.round, state.rounds, state.turns)
        counts = tuple(sorted({ceil(share * layers - 1e-9) for share in self.shares}))
        orders = {}
        for profile in fleet.devices:
            if profile.id in hosted:
                count = one_of_device(
                    counts,
                    self.share_by,
                    self.largest_share_gib,
                    profile.id,
                    profile.memory_bytes,
                    state.seed,
                )
                blocks = blocks_of_device(
                    self.pattern,
                    layers,
                    count,
                    profile.id,
                    state.seed,
                    lowest=layers - hosted[profile.id],
                    round=state.round if self.randomised else None,
                )
                orders[profile.id] = BlocksOrder(
                    adapter=adapter, head=head, scale=self.scale, blocks=blocks, tuning=tuning
                )
        return orders

    def _memory_by_depth(self, layout: PrunableLayout, embeddings: int, tokens: int) -> list[int]:
        """Bytes of memory at depths 1, 2, ..."""
        return depth_bytes(
            layout, self.rank, embeddings=embeddings, batch=self.batch, tokens=tokens
        )
