"""FedLoRA that prunes as a schedule says, the same for every device: what the pruning baselines
share; no method.

A device does exactly what it does under FedSpine (`prune_and_tune`), so a comparison with FedSpine
tells apart what the server decides and nothing else. Adapters are averaged as FedLoRA does it,
entry by entry over the devices that still own the entry.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedspine.control.plan import cubic_floor
from fedspine.core.device import DeviceId
from fedspine.core.errors import check_ranges
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import on_todays, usable
from fedspine.core.parts import quiet
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.aggregate import average_factors, bounded
from fedspine.lm.base import Model
from fedspine.lm.distillation import NoTeacher, Teacher
from fedspine.lm.importance import Scores, on_wire, tally
from fedspine.lm.importance_sources import ScoringOrder
from fedspine.lm.lora import check_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import (
    Structure,
    StructureKind,
    check_target,
    cut_adapter,
    full,
    sparsity,
)
from fedspine.lm.tuning import TOY, LocalTraining, check_tuning, tuning_at
from fedspine.pruning.device import (
    SpineOrder,
    SpineResult,
    completed,
    contribution,
    prune_and_tune,
)

_RANGES = {"sparsity": (0, 0.95), "global_importance_weight": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class ScheduledPruning(LocalTraining):
    """The hyper-parameters that these methods share."""

    sparsity: float = 0.5  # share of the blocks' weights that every device gives up
    rank: int = 8
    scale: float = 2.0  # alpha / rank
    global_importance_weight: float = 0.0  # of the fleet's average in what a device drops
    teacher: Teacher = quiet(NoTeacher())  # who teaches a pruned model beside the labels
    structure: StructureKind = quiet("free")  # whether layers may keep unequally many units


@dataclass(frozen=True, kw_only=True)
class CubicPruning(ScheduledPruning):
    """Pruning on a cubic schedule, which begins and ends at these parts of the run."""

    warmup: float = 0.05  # as a share of the rounds: nothing is pruned before
    until: float = 0.7  # everything is pruned after

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, rank=4, warmup=0.1, until=0.6)


@message
class PruningState:
    round: int
    rounds: int
    layout: PrunableLayout
    adapter: Tensors
    head: Tensors
    scores: Scores | None  # the fleet's average importance
    structures: dict[str, Structure]  # of every device that has replied
    sparsities: dict[str, float]  # the sparsity it was asked for


def check_pruning(fields: ScheduledPruning, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    check_ranges(fields, _RANGES)
    check_target(task.base.layout, fields.sparsity, fields.structure)
    check_rank("method.rank", (fields.rank,), task.base.layout)
    check_tuning(fields)
    fields.teacher.check(task)


def begin(fields: ScheduledPruning, task: Task, rng: np.random.Generator) -> PruningState:
    """The first state: the adapter and the head that FedLoRA would begin with."""
    layout = task.base.layout
    return PruningState(
        round=0,
        rounds=task.rounds,
        layout=layout,
        adapter=fresh(layout.sites, fields.rank, rng),
        head=task.base.initial_head(rng),
        scores=None,
        structures={},
        sparsities={},
    )


def cubic(fields: CubicPruning, round: int, rounds: int) -> float:
    """The sparsity of every device in `round`, counted from 0: cubic from the warm-up's end to
    `until`; 0 before 0.
    """
    if round < 0:
        return 0.0
    return cubic_floor(
        round, rounds, fields.sparsity, warmup=fields.warmup, until=fields.until, share=1.0
    )


def cubic_reached(fields: CubicPruning, state: PruningState) -> float:
    """The sparsity that the schedule had come to in the last round; the target after the last of
    all.
    """
    return (
        fields.sparsity
        if state.round >= state.rounds
        else cubic(fields, state.round - 1, state.rounds)
    )


def prune_and_average(
    fields: ScheduledPruning,
    state: PruningState,
    fleet: Fleet,
    *,
    target: float,
    scoring: ScoringOrder,
) -> tuple[PruningState, list[Reply[SpineResult]]]:
    """One round in which every device prunes to `target`, then tunes; the next state, and the
    replies it rests on.

    A device prunes by its own importance, mixed with the fleet's by `global_importance_weight`; one
    that has never replied has none yet.
    """
    orders = {
        profile.id: _order(fields, state, profile.id, target, scoring) for profile in fleet.devices
    }
    came = usable(fleet.ask(prune_and_tune, orders), fleet)
    replies = on_todays(came, head=state.head)
    changed = [contribution(state.layout, reply) for reply in replies]
    parts = bounded(fleet, state.layout, replies, changed)
    for reply in replies:
        kept = sparsity(state.layout, reply.value.structure)
        fleet.note(device=reply.device, rank=fields.rank, sparsity=kept, loss=reply.value.loss)
    after = replace(
        state,
        round=state.round + 1,
        adapter=fleet.server.step(
            "adapter",
            state.adapter,
            average_factors(state.layout, state.adapter, parts, fleet.aggregation),
        ),
        **merged(replies, fleet, head=state.head),
        scores=tally(state.scores, [reply.value.scores for reply in replies], fleet.aggregation),
        structures=state.structures | {reply.device: reply.value.structure for reply in replies},
        sparsities=state.sparsities | {reply.device: reply.order.sparsity for reply in replies},
    )
    return after, replies


def dense(fields: ScheduledPruning, state: PruningState) -> Model:
    """What was learnt, on the whole base."""
    return Model(
        structure=full(state.layout), adapter=state.adapter, head=state.head, scale=fields.scale
    )


def _order(
    fields: ScheduledPruning,
    state: PruningState,
    device: DeviceId,
    target: float,
    scoring: ScoringOrder,
) -> SpineOrder:
    structure = state.structures.get(device, full(state.layout))
    # nothing is pruned before its importance is known
    now = target if device in state.structures else 0.0
    advised = now > 0 and fields.global_importance_weight > 0 and state.scores is not None
    order = SpineOrder(
        round=state.round,
        adapter=half(cut_adapter(state.adapter, state.layout.sites, structure)),
        head=half(state.head),
        structure=structure,
        scores=on_wire(state.scores) if advised else None,
        global_importance_weight=fields.global_importance_weight,
        sparsity=now,
        target=fields.sparsity,
        scale=fields.scale,
        tuning=tuning_at(fields, state.round, state.rounds),
        scoring=scoring,
    )
    return completed(order, fields.teacher, fields.structure)
