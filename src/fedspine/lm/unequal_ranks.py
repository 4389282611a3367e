"""Shared by HetLoRA, FlexLoRA and FLoRA, in which every device has a rank of its own. In the first
two a device trains the first directions of one common adapter.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.control.ranks import RankRule, check_rising, one_of_device
from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors, message
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.lora import check_rank, cut_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full
from fedspine.lm.tuning import TOY, LocalTraining, check_tuning


@dataclass(frozen=True)
class UnequalRanks(LocalTraining):
    """The hyper-parameters that these methods share."""

    ranks: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)  # that a device may have, rising
    rank_by: RankRule = "memory"  # declared, or "random"
    # declared memory that earns the largest rank; less earns its share
    largest_rank_gib: float = 32.0
    scale: float = 2.0  # alpha / rank, the same for all ranks

    @classmethod
    def toy(cls) -> Any:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, ranks=(2, 4, 8), rank_by="random")


@message
class RankedState:
    """What the states of HetLoRA and FlexLoRA have."""

    round: int
    rounds: int
    seed: int
    layout: PrunableLayout
    adapter: Tensors  # of the largest rank
    head: Tensors
    ranks: dict[str, int]  # of every device that has replied


def check_ranks(fields: UnequalRanks, task: Task) -> None:
    """Raise BadInput for ranks, memory or training that cannot work on this task."""
    check_rising(fields.ranks)
    if not fields.largest_rank_gib > 0:
        raise BadInput(
            f"method.largest_rank_gib is {fields.largest_rank_gib}, but a positive number is needed"
        )
    check_rank("method.ranks", fields.ranks, task.base.layout)
    check_tuning(fields)


def rank_of_device(fields: UnequalRanks, device: str, memory_bytes: int, seed: int) -> int:
    """The rank of one device, the same whenever and beside whomever it is asked."""
    largest_gib = fields.largest_rank_gib
    return one_of_device(fields.ranks, fields.rank_by, largest_gib, device, memory_bytes, seed)


def first_fields(fields: UnequalRanks, task: Task, rng: np.random.Generator) -> dict[str, Any]:
    """The fields of a first state: a fresh adapter of the largest rank, and no known devices."""
    layout = task.base.layout
    return {
        "round": 0,
        "rounds": task.rounds,
        "layout": layout,
        "adapter": fresh(layout.sites, fields.ranks[-1], rng),
        "head": task.base.initial_head(rng),
        "seed": int(rng.integers(2**31)),
        "ranks": {},
    }


def model_of(fields: UnequalRanks, state: RankedState, device: str | None = None) -> Model:
    """The unpruned model with the adapter cut to the device's rank; at full rank for the global
    model and for a device that has never replied.
    """
    rank = state.ranks.get(device, fields.ranks[-1]) if device else fields.ranks[-1]
    return Model(
        structure=full(state.layout),
        adapter=cut_rank(state.adapter, rank),
        head=state.head,
        scale=fields.scale,
    )
