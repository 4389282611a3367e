"""Forecasts a round's cost at a sparsity and rank that a device has not had yet, from shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.core.fleet import NoMemory
from fedspine.core.message import Tensors
from fedspine.core.method import LeastWork
from fedspine.core.outline import outline
from fedspine.core.task import Task
from fedspine.lm.cost import (
    HALF,
    Extent,
    Ranks,
    adapter_parameters,
    adapter_width,
    expanding_flops,
    teaching_flops,
    training_flops,
    training_memory_bytes,
)
from fedspine.lm.importance import no_scores
from fedspine.lm.importance_sources import ScoringOrder, scoring_cost
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, StructureKind, full, is_full, shrink

USABLE_MEMORY = 0.8  # share of a device's memory that training may take


def ranks_that_fit(
    layout: PrunableLayout,
    structure: Structure,
    ranks: Sequence[int],
    *,
    memory_bytes: int,
    embeddings: int,
    batch: int,
    tokens: int,
    scoring: ScoringOrder,
) -> int:
    """How many of the rising `ranks` a device of this memory can train and score at; the rest as in
    `lm/cost.py`.
    """
    shapes = {"embeddings": embeddings, "batch": batch, "tokens": tokens, "scoring": scoring}
    without, one = (scored_bytes(layout, structure, rank=rank, **shapes) for rank in (0, 1))
    # an adapter's memory is proportional to its rank
    needed = (without + rank * (one - without) for rank in ranks)
    return sum(bytes <= USABLE_MEMORY * memory_bytes for bytes in needed)


def scored_bytes(
    layout: PrunableLayout,
    structure: Structure,
    *,
    rank: int,
    embeddings: int,
    batch: int,
    tokens: int,
    scoring: ScoringOrder,
) -> int:
    """Peak memory of training and scoring at a rank, in bytes."""
    # no bytes of scoring depend on the rank, and one step's are those of any number
    beside = scoring_cost(scoring, layout, structure, rank=1, largest=batch * tokens, steps=1)
    return training_memory_bytes(
        layout,
        structure,
        rank=rank,
        embeddings=embeddings,
        batch=batch,
        tokens=tokens,
        scoring=beside,
    )


def depth_bytes(
    layout: PrunableLayout, rank: Ranks, *, embeddings: int, batch: int, tokens: int
) -> list[int]:
    """Peak memory of training the upper 1, 2, ... blocks of the unpruned model, in bytes."""
    return [
        training_memory_bytes(
            layout,
            full(layout),
            rank=rank,
            embeddings=embeddings,
            batch=batch,
            tokens=tokens,
            first=layout.layers - depth,
        )
        for depth in range(1, layout.layers + 1)
    ]


def depth_traffic(
    layout: PrunableLayout, rank: Ranks, head: Tensors, *, all_down: bool = False
) -> np.ndarray:
    """Bytes that a device sends and receives in a round whose upper 0, 1, ... blocks are trained,
    with the head; `all_down` where it receives the adapters of the others, too.
    """
    numbers = sum(tensor.numel() for tensor in head.values())
    up = np.array(
        [
            adapter_parameters(layout, full(layout), rank, layout.layers - depth)
            for depth in range(layout.layers + 1)
        ]
    )
    down = np.full_like(up, up[-1]) if all_down else up
    return HALF * (2.0 * numbers + up + down)


def depths_hosted(
    fleet: Any,  # a `Fleet`, which the checks of this package's annotations cannot check
    needed: Sequence[int],
) -> dict[str, int]:
    """The largest depth in each device's memory, where depths 1, 2, ... take `needed` bytes; a
    device that hosts none is noted and left out.
    """
    most = {}
    for profile in fleet.devices:
        room = USABLE_MEMORY * profile.memory_bytes
        if depth := sum(bytes <= room for bytes in needed):
            most[profile.id] = depth
        else:
            leave_out(fleet, profile.id)
    return most


def leave_out(fleet: Any, device: str) -> None:
    """Note a device that is not asked, since no depth that its method might ask for fits its
    memory.
    """
    fleet.note(device=device, left_out="no depth fits its memory")


def round_flops(
    layout: PrunableLayout,
    structure: Structure,
    rank: int,
    extent: Extent,
    steps: int,
    scoring: ScoringOrder,
    taught: bool = False,
) -> float:
    """Operations to train and score in a round of `steps` over this much text; where it is `taught`
    a pruned model's teacher reads the text, too, each row taken to be drawn once.
    """
    scored = scoring_cost(scoring, layout, structure, rank=rank, tokens=extent.tokens, steps=steps)
    teacher = teaching_flops(layout, rank, extent) if taught and not is_full(structure) else 0.0
    trained = training_flops(layout, structure, rank, extent)
    return trained + steps * expanding_flops(layout, structure) + scored.flops + teacher


@dataclass(frozen=True)
class Frame:
    """The costs of a round that all plans share: the text it reads, and the bytes beside the
    adapter.
    """

    extent: Extent
    steps: int
    scoring: ScoringOrder
    launches: int
    bytes_down: int
    bytes_up: int
    taught: bool = False  # whether pruned models have a teacher


def frame(
    layout: PrunableLayout,
    order: Any,
    adapter: Tensors,
    *,
    extent: Extent,
    steps: int,
    scoring: ScoringOrder,
    taught: bool = False,
) -> Frame:
    """Measured on an order as it is sent, with `adapter` in it.

    The result is taken to hold as much beside its adapter, and the scores of all units, which is
    right to a kilobyte where the order holds none.
    """
    beside = outline(order).bytes - HALF * sum(tensor.numel() for tensor in adapter.values())
    return Frame(
        extent=extent,
        steps=steps,
        scoring=scoring,
        launches=steps * layout.layers,
        bytes_down=beside,
        bytes_up=beside + HALF * layout.layers * (layout.heads + layout.channels),
        taught=taught,
    )


@dataclass(frozen=True)
class ExchangeCost:
    """The forecast cost of one exchange."""

    flops: float
    launches: int
    bytes_down: int
    bytes_up: int


def forecast(
    layout: PrunableLayout,
    structure: Structure,
    frame: Frame,
    *,
    sparsity: float,
    target: float,
    ranks: Sequence[int],
    load: float = 1.0,
    kind: StructureKind = "free",
) -> list[ExchangeCost]:
    """The cost at each rank for a device that has `structure`, prunes to `sparsity` on the way to
    `target` and tunes.

    `load` is what the device reads, as a share of `frame.extent`. The adapter comes down cut to the
    structure and goes up cut to what is left. How many units go does not depend on their
    importance, so none is needed.
    """
    units = no_scores(layout)
    votes = (units.heads, units.channels)
    left = (
        shrink(layout, structure, votes, sparsity=sparsity, target=target, kind=kind)
        if sparsity > 0
        else structure
    )
    before, after = adapter_width(layout, structure), adapter_width(layout, left)
    return [
        ExchangeCost(
            flops=load
            * round_flops(
                layout, left, rank, frame.extent, frame.steps, frame.scoring, frame.taught
            ),
            launches=frame.launches,
            bytes_down=frame.bytes_down + HALF * rank * before,
            bytes_up=frame.bytes_up + HALF * rank * after,
        )
        for rank in ranks
    ]


def least_work(memory_bytes: int, rank: str = "method.rank") -> LeastWork:
    """The least that an adapter method may ask; `rank` is the setting that says how large adapters
    are.
    """
    return LeastWork(memory_bytes, ("method.batch", rank, "task.max_tokens"))


def least_rank(task: Task, rank: int, *, batch: int, scoring: ScoringOrder) -> LeastWork:
    """The least of a method that chooses ranks, of which this is the lowest: the unpruned model at
    it, with which every device begins.
    """
    needed = scored_bytes(
        task.base.layout,
        full(task.base.layout),
        rank=rank,
        embeddings=task.base.embeddings,
        batch=batch,
        tokens=task.max_tokens,
        scoring=scoring,
    )
    return least_work(needed, "method.ranks")


def no_block_fits(rank: str = "method.rank") -> NoMemory:
    """The error of a round in which no device has the memory to be asked; `rank` is the setting
    that says how large adapters are.
    """
    return NoMemory(
        f"no device has the memory to train even one block; lower method.batch, {rank} or "
        "task.max_tokens"
    )
