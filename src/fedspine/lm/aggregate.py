"""Aggregates adapters of unequal rank and shape; `lm/factoring.py` cuts the result to any of them.

There are three ways. Factor averaging is FedAvg of A and B, padded with zeros or, in LEGEND, with
the values before, and plain FedAvg if all ranks are equal; HetLoRA uses it with the weights of
`by_norm`. Product averaging, FlexLoRA's, averages the products B A. FedSpine (section 3.1 of the
reconstruction) averages each device's *change* in the coordinates of W. The last two average each
entry over the devices that still own it, and keep the best rank-R factors of the sum; only in the
last are directions that few devices have the rank for not diluted by the others, and a round
without training changes nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedspine.core import merging
from fedspine.core.aggregation import Aggregation, Mean, MultiKrum
from fedspine.core.fleet import Reply
from fedspine.core.message import Tensors
from fedspine.core.process import spread
from fedspine.core.tensors import rebased
from fedspine.lm.lora import a_name, adapter_rank, b_name
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.structure import Structure, cut_adapter, kept_columns, kept_rows

AT_ONCE = 1 << 22  # entries sorted at once, over all devices
A_SUFFIX = a_name("")


@dataclass(frozen=True)
class Contribution:
    """One device's contribution: the adapter `sent` to it and the one that came `back`, both cut to
    `structure`, and its `weight`.

    A `late` one was sent an adapter of an earlier round, so it counts as a change to the current
    one.
    """

    sent: Tensors
    back: Tensors
    structure: Structure
    weight: float
    late: bool = False


def bounded(
    fleet: Any,  # a `Fleet`, a protocol that the checks of this package's annotations cannot check
    layout: PrunableLayout,
    replies: Sequence[Reply[Any]],
    contributions: Sequence[Contribution],
) -> list[Contribution]:
    """The contributions of these replies, with their changes to A and B bounded or left out as
    `fleet.aggregation` says, before any use; `core.merging.bounded` records which were.

    So the change of a product is bounded, too, since those of its factors are. One that is left out
    has no weight.
    """
    sent = [_returned_part(part.back, part.sent) for part in contributions]
    changes: Iterable[Tensors] = (
        {name: tensor.float() - before[name].float() for name, tensor in part.back.items()}
        for part, before in zip(contributions, sent, strict=True)
    )
    if isinstance(fleet.aggregation, MultiKrum):  # which compares entry by entry
        ranks = max((adapter_rank(part.back) for part in contributions), default=0)
        changes = (
            _in_whole(layout, part.structure, ranks, change)
            for part, change in zip(contributions, changes, strict=True)
        )
    devices = [reply.device for reply in replies]
    shares = merging.bounded(fleet, "adapter", devices, changes)
    return [
        part
        if share == 1
        else replace(
            part,
            back=merging.toward(before, part.back, share),
            weight=part.weight if share else 0.0,
        )
        for part, before, share in zip(contributions, sent, shares, strict=True)
    ]


def average_factors(
    layout: PrunableLayout,
    before: Tensors,
    contributions: Sequence[Contribution],
    how: Aggregation = Mean(),
    *,
    padding: Literal["zeros", "before"] = "zeros",
) -> Tensors:
    """FedAvg of A and of B, each padded to the largest rank received, with zeros or with the values
    `before`, and averaged entry by entry over owners.

    A device owns nothing of a site that its adapter lacks. An entry that no device owns keeps its
    value in `before`, and so does a direction beyond every device's rank: zeros in both factors
    could never be trained again. A median or a trimmed mean leaves out devices of a lower rank
    instead of padding them, since otherwise most values could be zeros.
    """
    contributions = [_factors_today(layout, before, part) for part in contributions]
    if merging.trims(how):
        return _trimmed_factors(layout, before, contributions, how)
    merged: Tensors = {}
    for site in layout.sites:
        owners = [part for part in contributions if part.weight and a_name(site.path) in part.back]
        for name, dim, kept in _factors_of(site):
            total, weight = torch.zeros_like(before[name]), torch.zeros_like(before[name])
            most = max((part.back[name].shape[1 - dim] for part in owners), default=0)
            for part in owners:
                factor = part.back[name].float()
                place = _place(kept(site, part.structure), most, dim)
                if padding == "before":
                    rank = factor.shape[1 - dim]
                    rest = before[name][place].narrow(1 - dim, rank, most - rank)
                    factor = torch.cat([factor, rest], 1 - dim)
                total[place] += part.weight * _padded(factor, most, 1 - dim)
                weight[place] += part.weight
            mean = total / torch.where(weight > 0, weight, 1.0)
            merged[name] = torch.where(weight > 0, mean, before[name])
    return merged


def by_norm(contributions: Sequence[Contribution]) -> list[Contribution]:
    """The same contributions, each weighted in proportion to ||B A||_F of the adapter that came
    back, over all sites together.

    Weights sum to 1 and replace the old ones, except those of 0; they are equal if no device has
    learnt anything. Source: HetLoRA, Cho et al. 2024 (arXiv:2401.06432), which weighs by the norm
    and not by rows.
    """
    norms = [product_norm(part.back) if part.weight else 0.0 for part in contributions]
    if not any(norms):  # nobody has learnt anything
        norms = [1.0 if part.weight else 0.0 for part in contributions]
    total = sum(norms) or 1.0
    return [
        replace(part, weight=norm / total) for part, norm in zip(contributions, norms, strict=True)
    ]


def product_norm(adapter: Tensors) -> float:
    """||B A||_F of all sites together, without the scale; from Gram matrices, so no product is
    formed.
    """
    squares = 0.0
    for name, factor in adapter.items():
        if name.endswith(A_SUFFIX):
            a, b = factor.double(), adapter[b_name(name.removesuffix(A_SUFFIX))].double()
            squares += float(((b.T @ b) * (a @ a.T)).sum())  # the trace of (B A)^T (B A), reordered
    return max(squares, 0.0) ** 0.5


def mean_product(
    layout: PrunableLayout,
    before: Tensors,
    contributions: Sequence[Contribution],
    how: Aggregation = Mean(),
) -> Tensors:
    """FlexLoRA's aggregate: the weighted mean of the devices' products B A, dense, by path and
    without the scale.

    An entry is the mean over the devices that own it, or the robust aggregate `how`; without an
    owner it keeps its value in `before`, which has the same form. A late contribution counts as
    `before` + B'A' - BA. Source: Bai et al. 2024 (arXiv:2402.11505), whose devices own everything.
    """
    late = [part for part in contributions if part.late]

    def mean(site: PrunableSite) -> Tensor:
        if merging.trims(how):
            found, settled = _trimmed_products(
                how, site, contributions, _product_factors, before[site.path]
            )
            return torch.where(settled, found, before[site.path])
        total, weight = _sum_over_owners(site, contributions, _product_factors)
        if late:
            total = total + _weight_of_owners(site, late) * before[site.path]
        return torch.where(
            weight > 0, total / torch.where(weight > 0, weight, 1.0), before[site.path]
        )

    return _by_site(layout, mean)


def merge_changes(
    layout: PrunableLayout,
    dense: Tensors,
    contributions: Sequence[Contribution],
    how: Aggregation = Mean(),
) -> Tensors:
    """The dense change of every site's weight, by path and without the scale, after one round of
    contributions.

    Each device's change is B'A' - BA; an entry moves by the weighted mean over the devices that own
    it, or by the robust aggregate `how`, and does not move without an owner.
    """

    def moved(site: PrunableSite) -> Tensor:
        if merging.trims(how):
            found, _ = _trimmed_products(how, site, contributions, change_factors)
            return dense[site.path] + found  # zero where no aggregate can be formed
        total, weight = _sum_over_owners(site, contributions, change_factors)
        # the total of an entry without owners is zero anyway
        return dense[site.path] + total / torch.where(weight > 0, weight, 1.0)

    return _by_site(layout, moved)


def change_factors(
    part: Contribution, site: PrunableSite
) -> tuple[Float[Tensor, "rows ranks"], Float[Tensor, "ranks columns"]]:
    """Factors of B'A' - BA, a device's own change of this site without the scale."""
    a, b = a_name(site.path), b_name(site.path)
    left = torch.cat([part.back[b].float(), -part.sent[b].float()], 1)
    right = torch.cat([part.back[a].float(), part.sent[a].float()], 0)
    return left, right


def _factors_today(layout: PrunableLayout, today: Tensors, part: Contribution) -> Contribution:
    """The contribution; for a late one, the current factors plus its device's change of A and B."""
    if not part.late:
        return part
    cut = cut_adapter(today, layout.sites, part.structure)
    return replace(
        part, back=rebased(part.back, *(_returned_part(part.back, a) for a in (part.sent, cut)))
    )


def _returned_part(back: Tensors, adapter: Tensors) -> Tensors:
    """The part of an adapter that came back: its sites, and the first directions of each."""
    return {name: adapter[name][tuple(map(slice, each.shape))] for name, each in back.items()}


def _in_whole(
    layout: PrunableLayout, structure: Structure, ranks: int, factors: Tensors
) -> Tensors:
    """Factors of a sub-model at their places in those of the whole model at rank `ranks`, NaN
    elsewhere; sites that the adapter lacks stay away.
    """
    found: Tensors = {}
    for site in layout.sites:
        for name, dim, kept in _factors_of(site):
            if name in factors:
                shape = (ranks, site.columns) if dim == 1 else (site.rows, ranks)
                place = _place(kept(site, structure), factors[name].shape[1 - dim], dim)
                found[name] = torch.full(shape, torch.nan)
                found[name][place] = factors[name]
    return found


def _factors_of(site: PrunableSite) -> tuple[tuple[str, int, Callable[..., Tensor | None]], ...]:
    """A and B of a site: the name, the dimension in which it can be cut, and what is kept of it."""
    return (a_name(site.path), 1, kept_columns), (b_name(site.path), 0, kept_rows)


def _place(kept: Tensor | None, ranks: int, dim: int) -> tuple[slice | Tensor, slice | Tensor]:
    """Where a factor of so many `ranks`, cut to the `kept` lines of `dim`, is in the whole one."""
    lines = slice(None) if kept is None else kept
    return (slice(ranks), lines) if dim == 1 else (lines, slice(ranks))


def _by_site(layout: PrunableLayout, function: Callable[[PrunableSite], Tensor]) -> Tensors:
    return dict(
        zip((site.path for site in layout.sites), spread(function, layout.sites), strict=True)
    )


def _product_factors(part: Contribution, site: PrunableSite) -> tuple[Tensor, Tensor]:
    if part.late:
        return change_factors(part, site)
    return part.back[b_name(site.path)].float(), part.back[a_name(site.path)].float()


def _trimmed_factors(
    layout: PrunableLayout,
    before: Tensors,
    contributions: Sequence[Contribution],
    how: Aggregation,
) -> Tensors:
    """A and B merged entry by entry over the devices that own the entry and have its rank."""
    weights = torch.tensor([part.weight for part in contributions])
    found: Tensors = {}
    for site in layout.sites:
        for name, dim, kept in _factors_of(site):
            values = torch.zeros(len(contributions), *before[name].shape)
            owned = torch.zeros(values.shape, dtype=torch.bool)
            for part, value, own in zip(contributions, values, owned, strict=True):
                if name in part.back:
                    factor = part.back[name].float()
                    place = _place(kept(site, part.structure), factor.shape[1 - dim], dim)
                    value[place], own[place] = factor, True
            middle, settled = merging.trimmed(how, values, weights, owned)
            found[name] = torch.where(settled, middle, before[name])
    return found


def _trimmed_products(
    how: Aggregation,
    site: PrunableSite,
    contributions: Sequence[Contribution],
    factors: Callable[[Contribution, PrunableSite], tuple[Tensor, Tensor]],
    today: Float[Tensor, "rows columns"] | None = None,
) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """The products of `factors` merged over the devices that own an entry, as `how` says, and a
    mask of the merged entries; the others are 0. Those of late contributions are changes to
    `today`, if given.

    A block of rows is merged at a time, since every device's product is needed at once.
    """
    weights = torch.tensor([part.weight for part in contributions])
    pairs, owners = [], []
    for part in contributions:
        (left, right), (dim, index) = factors(part, site), _owned_lines(site, part.structure)
        if dim == 0:
            left = torch.zeros(site.rows, left.shape[1]).index_copy_(0, index, left)
        else:
            right = torch.zeros(len(right), site.columns).index_copy_(1, index, right)
        mine = torch.zeros(site.rows, site.columns, dtype=torch.bool).index_fill_(dim, index, True)
        owners.append(mine)
        pairs.append((left, right))
    found, settled = [], []
    for rows in torch.arange(site.rows).split(max(1, AT_ONCE // (len(pairs) * site.columns))):
        values = torch.stack([left[rows] @ right for left, right in pairs])
        for part, value in zip(contributions, values, strict=True):
            if part.late and today is not None:
                value += today[rows]
        owned = torch.stack([mine[rows] for mine in owners])
        middle, known = merging.trimmed(how, values, weights, owned)
        found.append(middle)
        settled.append(known)
    return torch.cat(found), torch.cat(settled)


def _sum_over_owners(
    site: PrunableSite,
    contributions: Sequence[Contribution],
    factors: Callable[[Contribution, PrunableSite], tuple[Tensor, Tensor]],
) -> tuple[Float[Tensor, "rows columns"], Tensor]:
    """The weighted sum of the products of `factors` over the devices, and the weight of each
    entry's owners.
    """
    total = torch.zeros(site.rows, site.columns)
    for part in contributions:
        left, right = factors(part, site)
        total.index_add_(*_owned_lines(site, part.structure), (part.weight * left) @ right)
    return total, _weight_of_owners(site, contributions)


def _weight_of_owners(site: PrunableSite, contributions: Sequence[Contribution]) -> Tensor:
    """The sum of the weights of each entry's owners: one for each row or column that can be cut,
    which broadcasts over the site's entries.
    """
    by_row = site.row_units is not None
    weight = torch.zeros(site.rows if by_row else site.columns)
    for part in contributions:
        _, index = _owned_lines(site, part.structure)
        weight.index_add_(0, index, torch.full((len(index),), part.weight))
    return weight[:, None] if by_row else weight[None, :]


def _owned_lines(site: PrunableSite, structure: Structure) -> tuple[int, Tensor]:
    """The dimension in which a site can be cut, and the rows or columns that are kept."""
    if site.row_units is not None:
        return 0, kept_rows(site, structure)
    return 1, kept_columns(site, structure)


def _padded(factor: Tensor, size: int, dim: int) -> Tensor:
    missing = size - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, torch.zeros(shape)], dim)
