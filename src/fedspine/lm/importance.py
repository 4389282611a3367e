"""The importance of each head and channel, from the gradients that LoRA training produces anyway.

Source: FedSpine (reconstructed), section 2.2, after LoRAPrune (arXiv:2305.18403). Magnitude and
chance are its controls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedspine.core import merging
from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.checks import Asked, need, no_larger, tensor_of
from fedspine.core.message import Tensors, message
from fedspine.lm.base import Base, Model
from fedspine.lm.frozen import Frozen, expanded
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.structure import Structure, kept_columns, kept_rows

FLEET_KEEP = 0.9  # of the fleet's average when a round's ballots come in


@message
class Scores:
    """Smoothed importance of each unit of the unpruned model; a dropped unit keeps its last one."""

    heads: Float[Tensor, "layers heads"]
    channels: Float[Tensor, "layers channels"]
    updates: int = 1  # that went into a moving average

    def check(self, asked: Asked) -> None:
        """In a message scores are fp16, each layer of unit norm at most, so no entry is above 1."""
        layout = asked.base.layout
        for name, units in (("heads", layout.heads), ("channels", layout.channels)):
            own = getattr(self, name)
            tensor_of(f"scores.{name}", own, torch.float16, (layout.layers, units))
            no_larger(f"scores.{name}", own, 1.0, least=0.0)
        need(self.updates >= 0, f"scores.updates is {self.updates}, but it cannot be negative")


@dataclass(frozen=True)
class Criterion:
    """How an entry's importance follows from the gradient estimate and the weight."""

    square: bool = False  # LoRAPrune's paper squares, its released code does not
    cross: float = 0.0  # eta: weight of the second-order term gB @ gA
    normalise: bool = False  # divide each site's scores by their L2 norm before adding sites


def score_units(base: Base, model: Model, criterion: Criterion = Criterion()) -> Scores:
    """Importance of every kept unit after one backward pass through `model`; zero for dropped ones.

    The gradient of W + scale * B @ A is estimated from those of A and B as gB @ A + B @ gA.
    Gradients must be those of the unscaled loss, before the optimiser's step.
    """
    weights = {site.path: base.slice(site.path, model.structure)[0] for site in base.layout.sites}
    return score_stack(
        base.layout, [model.structure], weights, model.adapter, model.scale, criterion
    )[0]


def score_stack(
    layout: PrunableLayout,
    structures: Sequence[Structure],
    weights: Mapping[str, Frozen],
    adapter: Tensors,
    scale: float,
    criterion: Criterion,
) -> list[Scores]:
    """`score_units` of several models at once.

    `weights` by path and `adapter` are stacked along a first dimension, but weights that all models
    share; of one model they are as they are. Padding lies behind what a model has.
    """
    lines = []
    for site in layout.sites:
        entries = _entry_scores(expanded(weights[site.path]), adapter, site.path, scale, criterion)
        by_line = entries.sum(-1) if site.row_units else entries.sum(-2)
        if criterion.normalise:
            by_line = by_line / by_line.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        lines.append(by_line.view(len(structures), -1))
    # one transfer from a GPU
    by_site = torch.cat(lines, 1).cpu().split([line.shape[1] for line in lines], 1)
    scores = [no_scores(layout) for _ in structures]
    for site, by_line in zip(layout.sites, by_site, strict=True):
        for i, structure in enumerate(structures):
            _add_lines(scores[i], site, structure, by_line[i])
    return scores


def unit_roots(layout: PrunableLayout, structure: Structure, lines: Tensors) -> Scores:
    """The root of the sum over each kept unit's columns, by path of the sites whose columns are
    units; each layer of unit norm, dropped units zero.
    """
    sums = no_scores(layout)
    for site in (site for site in layout.sites if site.column_units):
        _add_lines(sums, site, structure, lines[site.path].cpu())
    return normalised(Scores(heads=sums.heads.sqrt_(), channels=sums.channels.sqrt_()))


def geometric_mean(one: Scores, other: Scores) -> Scores:
    """The geometric mean of two importances, unit by unit."""
    return Scores(
        heads=(one.heads * other.heads).sqrt_(), channels=(one.channels * other.channels).sqrt_()
    )


def magnitude_scores(base: Base, model: Model) -> Scores:
    """L2 norm of each kept unit's entries of W + scale * B @ A; zero for dropped ones.

    It takes no gradient and no data. Biases do not count, as they do not in a model's sparsity.
    """
    energy = no_scores(base.layout)
    for site in base.layout.sites:
        entries = _effective_weight(base, model, site.path).square_()
        _add_lines(
            energy, site, model.structure, entries.sum(1) if site.row_units else entries.sum(0)
        )
    return Scores(heads=energy.heads.sqrt_(), channels=energy.channels.sqrt_())


def random_scores(layout: PrunableLayout, structure: Structure, rng: np.random.Generator) -> Scores:
    """A uniform draw from (0, 1] for every kept unit, zero for dropped ones: the control that knows
    nothing.
    """

    def draw(kept: Bool[Tensor, "layers units"]) -> Float[Tensor, "layers units"]:
        return torch.from_numpy((1 - rng.random(kept.shape)).astype(np.float32)) * kept

    return Scores(heads=draw(structure.heads), channels=draw(structure.channels))


def no_scores(layout: PrunableLayout) -> Scores:
    """Zero for every unit."""
    return Scores(
        heads=torch.zeros(layout.layers, layout.heads),
        channels=torch.zeros(layout.layers, layout.channels),
    )


def _add_lines(
    scores: Scores, site: PrunableSite, structure: Structure, by_line: Float[Tensor, " lines"]
) -> None:
    """Add the scores of a site's kept rows or columns, which come first, to those of their units,
    in place.
    """
    kept = kept_rows(site, structure) if site.row_units else kept_columns(site, structure)
    target = scores.heads if "heads" in (site.row_units, site.column_units) else scores.channels
    target[site.layer].index_add_(0, kept // site.per_unit, by_line[: len(kept)])


def _effective_weight(base: Base, model: Model, path: str) -> Float[Tensor, "rows columns"]:
    """W + scale * B @ A of one site in fp32, cut to the model's structure; a tensor of its own."""
    weight = base.slice(path, model.structure)[0].cpu()
    a, b = model.adapter.get(a_name(path)), model.adapter.get(b_name(path))
    if a is None or b is None:
        return weight.to(torch.float32, copy=True)
    with torch.no_grad():
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=model.scale)


def _entry_scores(
    weight: Tensor, adapter: Tensors, path: str, scale: float, criterion: Criterion
) -> Float[Tensor, "*models rows columns"]:
    a, b = adapter[a_name(path)], adapter[b_name(path)]
    grad_a, grad_b = a.grad, b.grad
    if grad_a is None or grad_b is None:
        raise ValueError(f"{path} has no gradients; score units after a backward pass")
    with torch.no_grad():
        gradient = torch.cat([grad_b, b], -1) @ torch.cat([a, grad_a], -2)
        if criterion.cross:
            gradient -= criterion.cross * (grad_b @ grad_a)
        entries = gradient.mul_((b @ a).mul_(scale).add_(weight))
        return entries.square_() if criterion.square else entries.abs_()


def kept_share(keep: float, updates: int) -> float:
    """What the average of so many updates keeps when one more comes in, the bias of its start
    corrected.

    As Adam corrects it (Kingma & Ba 2014, arXiv:1412.6980, section 3): an average that begins at 0
    and is divided by 1 - keep**n after n updates. The newest then weighs (1 - keep) / (1 -
    keep**n), a share 1/n for a keep of 1.

    >>> round(kept_share(0.9, 1), 6), kept_share(1.0, 3)
    (0.473684, 0.75)
    """
    n = updates + 1
    return 1 - 1 / n if keep == 1 else (keep - keep**n) / (1 - keep**n)


def smooth(before: Scores | None, now: Scores, keep: float) -> Scores | None:
    """The moving average of scores without the bias of its start; `now` itself at the start,
    `before` where `now` holds a NaN.

    Units that score exactly zero were not there, so they keep their last value.
    """
    if not all(bool(torch.isfinite(score).all()) for score in (now.heads, now.channels)):
        return before
    if before is None:
        return now
    old_share = kept_share(keep, before.updates)
    return Scores(
        heads=_smoothed(before.heads, now.heads, old_share),
        channels=_smoothed(before.channels, now.channels, old_share),
        updates=before.updates + 1,
    )


def _smoothed(old: Tensor, new: Tensor, old_share: float) -> Tensor:
    return torch.where(new == 0, old, old_share * old + (1 - old_share) * new)


def normalised(scores: Scores) -> Scores:
    """Scores divided by each layer's norm, so that devices with larger gradients do not outvote the
    others.
    """
    return Scores(heads=_of_unit_norm(scores.heads), channels=_of_unit_norm(scores.channels))


def _of_unit_norm(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def ballot(scores: Scores, kept: Structure) -> Scores:
    """A device's scores for the wire: unit norm per layer, zero for dropped units, fp16."""
    return on_wire(
        normalised(
            Scores(heads=scores.heads * kept.heads, channels=scores.channels * kept.channels)
        )
    )


def on_wire(scores: Scores) -> Scores:
    """The same scores in fp16."""
    return Scores(heads=scores.heads.half(), channels=scores.channels.half())


def off_wire(scores: Scores) -> Scores:
    """The same scores in fp32."""
    return Scores(heads=scores.heads.float(), channels=scores.channels.float())


def mixed(own: Scores, fleet: Scores, say: float) -> Scores:
    """A device's scores and the fleet's, each layer of unit norm, the fleet's with weight `say`."""
    own, fleet = normalised(off_wire(own)), normalised(off_wire(fleet))
    return Scores(
        heads=(1 - say) * own.heads + say * fleet.heads,
        channels=(1 - say) * own.channels + say * fleet.channels,
    )


def tally(before: Scores | None, ballots: Sequence[Scores], how: Aggregation = Mean()) -> Scores:
    """The fleet's average: a moving average over rounds of their mean, in which a dropped unit is
    zero; `how` says what stands in the mean's place, and where it says nothing, all stays.

    It has no bias of its start: after n rounds the first weighs FLEET_KEEP**(n - 1) of the newest.
    """
    updates = before.updates + 1 if before else 1
    old_share = kept_share(FLEET_KEEP, before.updates) if before else 0.0

    def mix(old: Tensor | None, votes: list[Tensor]) -> Tensor:
        stacked = torch.stack(votes).float()
        mean = merging.middle(how, stacked, torch.zeros_like(stacked[0]) if old is None else old)
        return mean if old is None else old_share * old + (1 - old_share) * mean

    return Scores(
        heads=mix(before.heads if before else None, [vote.heads for vote in ballots]),
        channels=mix(before.channels if before else None, [vote.channels for vote in ballots]),
        updates=updates,
    )
