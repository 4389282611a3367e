"""Shared by HetLoRA and FlexLoRA, in which each device trains the first directions of one adapter,
up to its own rank; FLoRA uses the settings of the toy task.
"""

from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedspine.core.message import Tensors
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.lora import cut_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full

# with which a tiny model learns a toy task in a few rounds
TOY = MappingProxyType(
    {
        "ranks": (2, 4, 8),
        "rank_by": "random",
        "steps": 8,
        "batch": 16,
        "learning_rate": 2e-2,
        "head_lr_multiplier": 1.0,
    }
)


@runtime_checkable
class Ranked(Protocol):
    """The settings that these methods share; `ranks` are ascending."""

    @property
    def ranks(self) -> tuple[int, ...]: ...

    @property
    def scale(self) -> float: ...


@runtime_checkable
class RankedState(Protocol):
    """What their states have in common."""

    layout: PrunableLayout
    adapter: Tensors  # of the largest rank
    head: Tensors
    ranks: dict[str, int]  # of every device that has replied


def first_fields(fields: Ranked, task: Task, rng: np.random.Generator) -> dict[str, Any]:
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


def model_of(fields: Ranked, state: RankedState, device: str | None = None) -> Model:
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
