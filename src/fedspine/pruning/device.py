"""Pruning and tuning in turns, the device's part, and what becomes of it: shared by FedSpine and
its baselines; no method.

What the server decides (how far, at which rank, how adapters are merged) is each method's own.
"""

from dataclasses import replace
from math import isfinite
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fedspine.core.checks import Asked, need, tensors_of, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Reply
from fedspine.core.message import Tensors, message
from fedspine.core.reads import Reads
from fedspine.core.tensors import half, single
from fedspine.lm.aggregate import Contribution
from fedspine.lm.base import Model
from fedspine.lm.distillation import Taught, Teacher, Teaching
from fedspine.lm.importance import Scores, ballot, mixed, no_scores, on_wire
from fedspine.lm.importance_sources import ScoringOrder, remembered, tune_and_score
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.lora import on_blocks
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import (
    adapter_shapes,
    check_head,
    check_loss,
    check_rank_of,
    float_of,
    rank_in,
)
from fedspine.lm.structure import (
    Structure,
    StructureKind,
    cut_adapter,
    full,
    grain,
    is_even,
    is_full,
    shrink,
    sparsity,
    widen_adapter,
)
from fedspine.lm.tuning import Tuning


@message
class SpineOrder:
    round: int  # comes back with the result, which may be late
    adapter: Tensors  # fp16, cut to `structure`, of this round's rank
    head: Tensors  # fp16
    structure: Structure  # what the server knows the device to have
    scores: Scores | None  # fp16, the fleet's average importance, where it has a say
    global_importance_weight: float  # of those scores in what goes, 0 to 1
    sparsity: float  # sparsity to prune to before tuning
    target: float  # sparsity to end at
    scale: float
    tuning: Tuning
    scoring: ScoringOrder
    kind: ClassVar[StructureKind] = "free"  # of the structures that it prunes to

    @property
    def reads(self) -> Reads:
        """What the scores rest on: an average that forgets fast is of its last steps alone."""
        steps, batch = self.tuning.steps, self.tuning.batch
        shown = remembered(self.scoring, steps)
        return Reads(steps=steps, batch=batch, lasting=shown, scale=self.scale)

    def pruned(self, layout: PrunableLayout, sparsity: float) -> Self:
        """The order to a device that has pruned its model to this sparsity, by equal scores: what
        its work costs does not depend on which units go.
        """
        votes = Scores(
            heads=torch.from_numpy(np.zeros((layout.layers, layout.heads), np.float32)),
            channels=torch.from_numpy(np.zeros((layout.layers, layout.channels), np.float32)),
        )
        kept = shrink(
            layout,
            self.structure,
            (votes.heads, votes.channels),
            sparsity=sparsity,
            target=self.target,
            kind=self.kind,
        )
        return replace(
            self,
            structure=kept,
            adapter=cut_adapter(self.adapter, layout.sites, kept, within=self.structure),
            scores=on_wire(votes) if self.global_importance_weight else None,
            sparsity=sparsity,
        )

    def check(self, asked: Asked) -> None:
        layout = asked.base.layout
        rank = rank_in(self.adapter)
        check_rank_of(rank, layout)
        dtype = float_of(self.adapter)
        tensors_of("adapter", self.adapter, adapter_shapes(layout, rank, self.structure, dtype))
        check_head(self.head, asked)
        within("global_importance_weight", self.global_importance_weight, 0, 1)
        within("target", self.target, 0, 0.95)
        within("sparsity", self.sparsity, 0, self.target)


@message
class TaughtOrder(SpineOrder):
    """The same with a teacher for a pruned model, which costs no traffic: the device has it."""

    teaching: Teaching

    @property
    def reads(self) -> Reads:
        """With the hidden states as what is minimised beside the loss."""
        how = self.tuning.reads.descent
        how = how and replace(how, penalty=how.penalty + self.teaching.hidden)
        return replace(super().reads, descent=how)


@message
class DepthSpineOrder(SpineOrder):
    """The same where only the adapters from a block on are trained; the others are used as they
    are, and all blocks are pruned.
    """

    lowest: int  # the first block to train, counted from the input

    def check(self, asked: Asked) -> None:
        super().check(asked)
        within("lowest", self.lowest, 0, asked.base.layout.layers - 1)
        tells = not isinstance(self.scoring, Scoring) or self.scoring.of == "activation"
        need(tells or not self.lowest, "gradients tell nothing of blocks that are not trained")


def _lowest_block(order: SpineOrder | None) -> int:
    """The first block that an order trains."""
    return order.lowest if isinstance(order, DepthSpineOrder) else 0


@message
class UniformOrder(SpineOrder):
    """The same for a device that keeps as many units in every layer: its name is all that it
    says.
    """

    kind: ClassVar[StructureKind] = "uniform"


@message
class TaughtUniformOrder(TaughtOrder):
    """Both."""

    kind: ClassVar[StructureKind] = "uniform"


@message
class FewHeadsOrder(SpineOrder):
    """The same for a device that keeps fewer heads and more channels; its name says it, too."""

    kind: ClassVar[StructureKind] = "few_heads"


@message
class TaughtFewHeadsOrder(TaughtOrder):
    """Both."""

    kind: ClassVar[StructureKind] = "few_heads"


ORDERS: dict[StructureKind, tuple[type[SpineOrder], type[TaughtOrder]]] = {
    "free": (SpineOrder, TaughtOrder),
    "uniform": (UniformOrder, TaughtUniformOrder),
    "few_heads": (FewHeadsOrder, TaughtFewHeadsOrder),
}


def completed(order: SpineOrder, teacher: Teacher, structure: StructureKind) -> SpineOrder:
    """The order, with what the teacher of `method.teacher` says to a device, if there is one, and
    for `method.structure`.
    """
    teaching, (plain, taught) = teacher.order, ORDERS[structure]
    if teaching is not None:
        return taught(**vars(order), teaching=teaching)
    return order if structure == "free" else plain(**vars(order))


@message
class SpineResult:
    round: int  # the order's
    adapter: Tensors  # fp16, cut to `structure`
    head: Tensors  # fp16
    structure: Structure
    scores: Scores  # fp16, each layer of unit norm; a dropped unit has zero
    loss: float  # mean over the last steps
    loss_before: float | None  # the same of this device's previous round
    examples: int

    def check(self, asked: Asked) -> None:
        """The structure drops no more than the order's target, and nothing comes back; the adapter
        is the order's cut to it.
        """
        layout, order = asked.base.layout, asked.order
        asked.examples(self.examples)
        check_loss(self.loss)
        if self.loss_before is not None:
            check_loss(self.loss_before, "loss_before")
        check_head(self.head, asked)
        kept, rank = self.structure, rank_in(self.adapter if order is None else order.adapter)
        shapes = adapter_shapes(layout, rank, kept, lowest=_lowest_block(order))
        tensors_of("adapter", self.adapter, shapes)
        for name in ("heads", "channels"):
            dropped = ~getattr(kept, name)
            scored = bool(getattr(self.scores, name)[dropped].any())
            need(not scored, f"scores.{name} has some for units that structure has dropped")
            back = order is not None and bool((~getattr(order.structure, name) & ~dropped).any())
            need(not back, f"structure.{name} keeps some that the order's has dropped")
        if order is not None:
            need(self.round == order.round, f"round is {self.round}, not {order.round}")
            most = order.target + grain(layout)
            found = sparsity(layout, kept)
            need(found <= most, f"structure has sparsity {found:.3g}, but {most:.3g} is the most")
            need(
                order.kind != "uniform" or is_even(kept),
                "structure keeps more units in one layer than in another, but is to be uniform",
            )


@on_device
def prune_and_tune(device: Device, order: SpineOrder) -> SpineResult:
    layout, known = device.base.layout, device.memory.get("scores")
    shown = device.memory.get("shown", known)
    kept: Structure = device.memory.get("kept", order.structure)
    votes = shown
    if order.scores is not None:  # a newcomer has no scores of its own, so the fleet's are its own
        votes = mixed(shown or order.scores, order.scores, order.global_importance_weight)
    if votes is not None and order.sparsity > 0:  # nothing is pruned before its importance is known
        kept = shrink(
            layout,
            kept,
            (votes.heads, votes.channels),
            sparsity=order.sparsity,
            target=order.target,
            kind=order.kind,
        )
    adapter = cut_adapter(single(order.adapter), layout.sites, kept, within=order.structure)
    model = Model(structure=kept, adapter=adapter, head=single(order.head), scale=order.scale)
    taught = None if is_full(kept) else _teacher_for(device, order)
    lowest = _lowest_block(order)
    blocks = tuple(range(lowest, layout.layers)) if lowest else None
    trace = tune_and_score(device, model, order.tuning, order.scoring, known, taught, blocks)
    if isinstance(order, TaughtOrder) and order.teaching.own and is_full(kept):
        device.memory["teacher"] = trace.model
    loss_before = device.memory.get("loss")
    device.memory |= {"kept": kept, "scores": trace.scores}
    shown = _noisy_scores(device, trace.scores or no_scores(layout))
    # what is pruned follows from what has left, and tells no more
    if device.noise is not None and trace.scores is not None:
        device.memory["shown"] = shown
    if isfinite(trace.loss):
        device.memory["loss"] = trace.loss
    return SpineResult(
        round=order.round,
        adapter=half(on_blocks(layout, trace.model.adapter, lowest)),
        head=half(trace.model.head),
        structure=kept,
        scores=ballot(shown, kept),
        loss=trace.loss,
        loss_before=loss_before,
        examples=len(device.data),
    )


def _noisy_scores(device: Device, scores: Scores) -> Scores:
    """The scores as they may leave: a sum over rows, each of which may be its share of it off."""
    one_row = 1 / max(1, device.rows_used)

    def noisy(values: Tensor) -> Tensor:
        return values * device.beside(torch.zeros_like(values), one_row).exp()

    return replace(scores, heads=noisy(scores.heads), channels=noisy(scores.channels))


def _teacher_for(device: Device, order: SpineOrder) -> Taught | None:
    """The teacher that an order asks for: the unpruned base with the adapter and the head that the
    device trained before it pruned, or with what came of them, or alone.
    """
    layout = device.base.layout
    if not isinstance(order, TaughtOrder):
        return None
    if order.teaching.own and "teacher" in device.memory:
        return Taught(device.memory["teacher"], order.teaching)
    adapter = widen_adapter(single(order.adapter), layout.sites, order.structure)
    if order.teaching.own and not device.base.head:
        adapter = {}  # a language model can teach as it came
    teacher = Model(
        structure=full(layout), adapter=adapter, head=single(order.head), scale=order.scale
    )
    return Taught(teacher, order.teaching)


class Deployed(Protocol):
    """The hyper-parameters of what is deployed."""

    sparsity: float
    scale: float
    structure: StructureKind


class Tuned(Protocol):
    """What a state knows of what is deployed; `sparsities` are those asked of the devices."""

    layout: PrunableLayout
    adapter: Tensors
    head: Tensors
    structures: dict[str, Structure]
    sparsities: dict[str, float]


def deployed(
    fields: Deployed, state: Tuned, device: DeviceId | None, *, due: float, votes: Scores | None
) -> Model:
    """The device's own structure, pruned by `votes` where it is behind `due`, and the common
    adapter cut to it.

    None stands for the global model: the whole structure, pruned by `votes`.
    """
    whole = full(state.layout)
    structure = state.structures.get(device, whole) if device else whole
    behind = due > (state.sparsities.get(device, 0.0) if device else 0.0)
    if behind and votes is not None:
        scores = (votes.heads, votes.channels)
        structure = shrink(
            state.layout,
            structure,
            scores,
            sparsity=due,
            target=fields.sparsity,
            kind=fields.structure,
        )
    adapter = cut_adapter(state.adapter, state.layout.sites, structure)
    return Model(structure=structure, adapter=adapter, head=state.head, scale=fields.scale)


def contribution(layout: PrunableLayout, reply: Reply[SpineResult]) -> Contribution:
    """What the device changed: its adapter against the one sent, both cut to what it kept."""
    order, result = reply.order, reply.value
    sent = cut_adapter(
        single(order.adapter), layout.sites, result.structure, within=order.structure
    )
    return Contribution(
        sent=sent,
        back=single(result.adapter),
        structure=result.structure,
        weight=float(reply.weight),
        late=reply.late > 0,
    )
