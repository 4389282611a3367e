"""How much each head and channel matters, read off the gradients that LoRA training produces anyway.

Source: FedSpine (reconstructed), section 2.2, after LoRAPrune (arXiv:2305.18403).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.lm.anatomy import Anatomy
from fedspine.lm.base import Base, Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import Structure, kept_columns, kept_rows
from fedspine.message import message

FLEET_KEEP = 0.9  # of the fleet's average when a round's ballots come in


@message
class Scores:
    """Smoothed importance of every unit of the unpruned model; a dropped unit keeps its last value."""

    heads: Float[Tensor, "layers heads"]
    channels: Float[Tensor, "layers channels"]


@dataclass(frozen=True)
class Criterion:
    """How an entry's importance follows from the gradient estimate and the weight."""

    square: bool = False  # LoRAPrune's paper squares, its released code does not
    cross: float = 0.0  # eta: weight of the second-order term gB @ gA
    normalise: bool = False  # divide each site's scores by their L2 norm before adding sites


def score_units(base: Base, model: Model, criterion: Criterion = Criterion()) -> Scores:
    """Importance of every kept unit after one backward pass through `model`; zero for dropped ones.

    The gradient of W + scale * B @ A is estimated from those of A and B as gB @ A + B @ gA. Gradients must be those
    of the unscaled loss, before the optimiser's step.
    """
    scores = no_scores(base.anatomy)
    for site in base.anatomy.sites:
        entries = _entries(base, model, site.path, criterion)
        by_line = entries.sum(1) if site.row_units else entries.sum(0)
        if criterion.normalise:
            by_line = by_line / by_line.norm().clamp_min(1e-12)
        kept = kept_rows(site, model.structure) if site.row_units else kept_columns(site, model.structure)
        target = scores.heads if "heads" in (site.row_units, site.column_units) else scores.channels
        target[site.layer].index_add_(0, kept // site.per_unit, by_line)
    return scores


def no_scores(anatomy: Anatomy) -> Scores:
    """Zero for every unit."""
    return Scores(
        heads=torch.zeros(anatomy.layers, anatomy.heads), channels=torch.zeros(anatomy.layers, anatomy.channels)
    )


def _entries(base: Base, model: Model, path: str, criterion: Criterion) -> Float[Tensor, "rows columns"]:
    a, b = model.adapter[a_name(path)], model.adapter[b_name(path)]
    grad_a, grad_b = a.grad, b.grad
    if grad_a is None or grad_b is None:
        raise ValueError(f"{path} has no gradients; score units after a backward pass")
    weight, _ = base.slice(path, model.structure)
    with torch.no_grad():
        gradient = torch.cat([grad_b, b], 1) @ torch.cat([a, grad_a], 0)
        if criterion.cross:
            gradient -= criterion.cross * (grad_b @ grad_a)
        effective = torch.addmm(weight.float(), b, a, alpha=model.scale)
        entries = gradient.mul_(effective)
        return entries.square_() if criterion.square else entries.abs_()


def smooth(before: Scores | None, now: Scores, keep: float) -> Scores | None:
    """The moving average of scores; `now` itself at the start, `before` where `now` holds a NaN.

    Units that score exactly zero were not there, so they keep their last value.
    """
    if not all(bool(torch.isfinite(score).all()) for score in (now.heads, now.channels)):
        return before
    if before is None:
        return now

    def mix(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(new == 0, old, keep * old + (1 - keep) * new)

    return Scores(heads=mix(before.heads, now.heads), channels=mix(before.channels, now.channels))


def normalised(scores: Scores) -> Scores:
    """Scores divided by each layer's norm, so that devices with larger gradients do not outvote the others."""

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)

    return Scores(heads=unit(scores.heads), channels=unit(scores.channels))


def ballot(scores: Scores, kept: Structure) -> Scores:
    """A device's scores as it sends them: of unit norm by layer, zero for what it has dropped, fp16."""
    return on_wire(normalised(Scores(heads=scores.heads * kept.heads, channels=scores.channels * kept.channels)))


def on_wire(scores: Scores) -> Scores:
    """The same scores in fp16."""
    return Scores(heads=scores.heads.half(), channels=scores.channels.half())


def mixed(own: Scores, fleet: Scores, say: float) -> Scores:
    """A device's scores and the fleet's, each layer of unit norm, the fleet's with weight `say`."""
    own, fleet = normalised(own), normalised(Scores(heads=fleet.heads.float(), channels=fleet.channels.float()))
    return Scores(
        heads=(1 - say) * own.heads + say * fleet.heads, channels=(1 - say) * own.channels + say * fleet.channels
    )


def tally(before: Scores | None, ballots: Sequence[Scores]) -> Scores:
    """The fleet's average: a moving average over rounds of their mean, in which a dropped unit is zero."""

    def mix(old: Tensor | None, votes: list[Tensor]) -> Tensor:
        mean = torch.stack(votes).float().mean(0)
        return mean if old is None else FLEET_KEEP * old + (1 - FLEET_KEEP) * mean

    return Scores(
        heads=mix(before.heads if before else None, [vote.heads for vote in ballots]),
        channels=mix(before.channels if before else None, [vote.channels for vote in ballots]),
    )
