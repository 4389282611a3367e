"""Aggregates adapters of unequal rank and shape, and cuts the result to any rank and shape.

Three ways. Factor averaging is FedAvg of A and B with zero-padding, and plain FedAvg where all
ranks are equal; HetLoRA does it with weights `by_norm`. Product averaging, FlexLoRA's, takes the
mean of the products B A. The way of FedSpine here (section 3.1 of the reconstruction) takes the
mean of what each device *changed* in W's own coordinates. The last two go entry by entry over the
devices that still own the entry and keep the best rank-R factors of the sum; only in the last is a
rank that few devices can carry not diluted by the others, and does nobody training change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedspine.core import merging
from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.fleet import Reply
from fedspine.core.message import Tensors
from fedspine.core.process import spread
from fedspine.core.tensors import rebased
from fedspine.lm.lora import a_name, b_name, fresh_a
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.structure import Structure, cut_adapter, kept_columns, kept_rows

EXACT_BELOW = 96  # matrices with a side up to this are factored by a full SVD
AT_ONCE = 1 << 22  # entries over all devices that are sorted at once
OVERSAMPLING, POWER_STEPS = 10, 2
A_SUFFIX = a_name("")
NEGLIGIBLE = 1e-6  # a singular value below this share of the largest is taken for zero


@dataclass(frozen=True)
class Contribution:
    """One device's contribution: the adapters `sent` and `back`, both cut to `structure`, and its
    `weight`.

    A `late` one was sent an adapter of an earlier round, so it counts as a change on today's.
    """

    sent: Tensors
    back: Tensors
    structure: Structure
    weight: float
    late: bool = False


def bounded(
    fleet: Any,  # a `Fleet`, a protocol that the checks of this package's annotations cannot check
    replies: Sequence[Reply[Any]],
    contributions: Sequence[Contribution],
) -> list[Contribution]:
    """The contributions of these replies, with what they changed in A and in B bounded, as
    `fleet.aggregation` says, before anything is made of them; `core.merging.bounded` notes whose.

    So a product changes by a bounded amount, too: it is that of factors which did.
    """
    sent = [_like(part.back, part.sent) for part in contributions]
    changes = (
        {name: tensor.float() - before[name].float() for name, tensor in part.back.items()}
        for part, before in zip(contributions, sent, strict=True)
    )
    devices = [reply.device for reply in replies]
    shares = merging.bounded(fleet, "adapter", devices, changes)
    return [
        part if share == 1 else replace(part, back=merging.toward(before, part.back, share))
        for part, before, share in zip(contributions, sent, shares, strict=True)
    ]


def average_factors(
    layout: PrunableLayout,
    before: Tensors,
    contributions: Sequence[Contribution],
    how: Aggregation = Mean(),
) -> Tensors:
    """FedAvg of A and of B, each padded with zeros to the largest rank that came and averaged entry
    by entry over owners.

    A device owns nothing of a site that its adapter lacks. An entry that no device owns keeps its
    value in `before`, and so does a direction beyond every device's rank: zeros in both factors
    could never be trained again. A median or a trimmed mean leaves out devices of a lower rank
    instead of padding them, since most values would be zeros.
    """
    contributions = [_factors_today(layout, before, part) for part in contributions]
    if merging.trims(how):
        return _trimmed_factors(layout, before, contributions, how)
    merged: Tensors = {}
    for site in layout.sites:
        owners = [part for part in contributions if a_name(site.path) in part.back]
        for name, dim, kept in (
            (a_name(site.path), 1, kept_columns),
            (b_name(site.path), 0, kept_rows),
        ):
            total, weight = torch.zeros_like(before[name]), torch.zeros(before[name].shape[dim])
            ranks = before[name].shape[1 - dim]
            for part in owners:
                index = kept(site, part.structure)
                index = torch.arange(len(weight)) if index is None else index
                factor = _padded(part.back[name].float(), ranks, 1 - dim)
                total.index_add_(dim, index, part.weight * factor)
                weight.index_add_(0, index, torch.full((len(index),), part.weight))
            held = torch.arange(ranks) < max(
                (part.back[name].shape[1 - dim] for part in owners), default=0
            )
            lines, directions = ((-1, 1), (1, -1)) if dim == 0 else ((1, -1), (-1, 1))
            owned = (weight > 0).view(lines) & held.view(directions)
            mean = total / torch.where(weight > 0, weight, 1.0).view(lines)
            merged[name] = torch.where(owned, mean, before[name])
    return merged


def by_norm(contributions: Sequence[Contribution]) -> list[Contribution]:
    """The same contributions, each with a weight proportional to ||B A||_F of what came back, over
    all sites at once.

    Weights sum to 1 and replace the old ones; they are equal where no device has learnt anything.
    Source: HetLoRA, Cho et al. 2024 (arXiv:2401.06432), which weighs by the norm and not by rows.
    """
    norms = [product_norm(part.back) for part in contributions]
    total = sum(norms)
    shares = [norm / total if total > 0 else 1 / len(norms) for norm in norms]
    return [replace(part, weight=share) for part, share in zip(contributions, shares, strict=True)]


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

    An entry is the mean over the devices that own it, or what `how` says in its place, and keeps
    its value in `before`, of the same form, where none does. Of a late contribution it is B'A' - BA
    on `before`. Source: Bai et al. 2024 (arXiv:2402.11505), whose devices own everything.
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
    it, or by what `how` says in its place, and stays where none does.
    """

    def moved(site: PrunableSite) -> Tensor:
        if merging.trims(how):
            found, _ = _trimmed_products(how, site, contributions, change_factors)
            return dense[site.path] + found  # which is zero where nothing can be said
        total, weight = _sum_over_owners(site, contributions, change_factors)
        # where nobody owns an entry, its total is zero anyway
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


def factor(
    layout: PrunableLayout, dense: Tensors, rank: int, before: Tensors, seed: int
) -> Tensors:
    """The best factors of `rank` for every dense change, with the singular values shared evenly
    between B and A.

    Where the change has a lower rank, A gets fresh rows and B zeros, so that training can use them.
    `before`, the last factors, starts the search for the new ones. Source: section 3.1; randomised
    SVD after Halko et al. 2011.
    """
    rngs = np.random.default_rng(seed).spawn(len(layout.sites))

    def factors(part: tuple[PrunableSite, np.random.Generator]) -> Tensors:
        site, rng = part
        left, values, right = _truncated_svd(dense[site.path], rank, before[a_name(site.path)], rng)
        used = values > NEGLIGIBLE * values.max().clamp_min(1e-30)
        root = torch.where(used, values, 0.0).sqrt()
        a, b = torch.zeros(rank, site.columns), torch.zeros(site.rows, rank)
        a[: len(values)] = root[:, None] * right
        b[:, : len(values)] = left * root
        unused = torch.ones(rank, dtype=torch.bool)
        unused[: len(values)] = ~used
        a[unused] = fresh_a(rng, rank, site.columns)[unused]
        return {a_name(site.path): a, b_name(site.path): b}

    pairs = spread(factors, zip(layout.sites, rngs, strict=True))
    return {name: tensor for pair in pairs for name, tensor in pair.items()}


def hand_out(layout: PrunableLayout, adapter: Tensors, structure: Structure, rank: int) -> Tensors:
    """The best adapter of `rank` for the sub-model `structure`, out of a wider one (section 3.2).

    Thin decompositions of the cut factors give the SVD of their product at the cost of small square
    matrices. Nothing is lost where `rank` is at least the adapter's.
    """
    sliced = cut_adapter(adapter, layout.sites, structure)
    if rank >= sliced[a_name(layout.sites[0].path)].shape[0]:
        return sliced
    paths = [site.path for site in layout.sites]
    # all sites share the small dimension, so their cores are decomposed in one batch
    gram_b = torch.stack([(b := sliced[b_name(path)].double()).T @ b for path in paths])
    gram_a = torch.stack([(a := sliced[a_name(path)].double()) @ a.T for path in paths])
    root_b, inverse_b = _roots(gram_b)
    root_a, inverse_a = _roots(gram_a)
    left, values, right = torch.linalg.svd(root_b @ root_a)
    root = values[:, :rank].sqrt()
    to_b = inverse_b @ (left[:, :, :rank] * root[:, None, :])
    to_a = (root[:, :, None] * right[:, :rank]) @ inverse_a
    small: Tensors = {}
    for i, path in enumerate(paths):
        small[b_name(path)] = (sliced[b_name(path)].double() @ to_b[i]).float()
        small[a_name(path)] = (to_a[i] @ sliced[a_name(path)].double()).float()
        _revive(small, path, values[i, :rank], sliced[a_name(path)])
    return small


def change_spectra(layout: PrunableLayout, part: Contribution) -> Float[Tensor, "sites ranks"]:
    """Singular values of B'A' - BA for every site, largest first, without the scale."""
    gram_left, gram_right = [], []
    for site in layout.sites:
        left, right = change_factors(part, site)
        gram_left.append(left.double().T @ left.double())
        gram_right.append(right.double() @ right.double().T)
    root, _ = _roots(torch.stack(gram_left))
    squares = torch.linalg.eigvalsh(root @ torch.stack(gram_right) @ root)
    return squares.clamp_min(0).sqrt().flip(1).float()


def effective_rank(spectra: Float[Tensor, "sites ranks"]) -> float:
    """exp of the entropy of each site's energy shares, averaged over sites; 0 where nothing
    changed.
    """
    energy = spectra.double().square()
    total = energy.sum(1)
    shares = energy[total > 0] / total[total > 0, None]
    if not len(shares):
        return 0.0
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1)
    return float(entropy.exp().mean())


def _factors_today(layout: PrunableLayout, today: Tensors, part: Contribution) -> Contribution:
    """The contribution; of a late one what its device changed in A and in B, on today's factors."""
    if not part.late:
        return part
    cut = cut_adapter(today, layout.sites, part.structure)
    return replace(part, back=rebased(part.back, *(_like(part.back, a) for a in (part.sent, cut))))


def _like(back: Tensors, adapter: Tensors) -> Tensors:
    """The part of an adapter that came back: its sites, and the first directions of each."""
    return {name: adapter[name][tuple(map(slice, each.shape))] for name, each in back.items()}


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
        for name, dim, kept in (
            (a_name(site.path), 1, kept_columns),
            (b_name(site.path), 0, kept_rows),
        ):
            values = torch.zeros(len(contributions), *before[name].shape)
            owned = torch.zeros(values.shape, dtype=torch.bool)
            for part, value, own in zip(contributions, values, owned, strict=True):
                if name in part.back:
                    index, factor = kept(site, part.structure), part.back[name].float()
                    lines = slice(None) if index is None else index
                    ranks = slice(factor.shape[1 - dim])
                    place = (ranks, lines) if dim == 1 else (lines, ranks)
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
    """The products of `factors` merged over the devices that own an entry, as `how` says, and where
    it says anything; 0 elsewhere. Those of late contributions are changes of `today`, if given.

    It takes some rows at a time, since every device's product is needed at once.
    """
    weights = torch.tensor([part.weight for part in contributions])
    pairs, owners = [], []
    for part in contributions:
        (left, right), (dim, index) = factors(part, site), _owned(site, part.structure)
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
        total.index_add_(*_owned(site, part.structure), (part.weight * left) @ right)
    return total, _weight_of_owners(site, contributions)


def _weight_of_owners(site: PrunableSite, contributions: Sequence[Contribution]) -> Tensor:
    """The sum of the weights of each entry's owners: one for every row or column of the site that
    can be cut, which broadcasts over its entries.
    """
    by_row = site.row_units is not None
    weight = torch.zeros(site.rows if by_row else site.columns)
    for part in contributions:
        _, index = _owned(site, part.structure)
        weight.index_add_(0, index, torch.full((len(index),), part.weight))
    return weight[:, None] if by_row else weight[None, :]


def _owned(site: PrunableSite, structure: Structure) -> tuple[int, Tensor]:
    """The dimension in which a site can be cut, and the rows or columns that are left of it."""
    if site.row_units is not None:
        return 0, kept_rows(site, structure)
    return 1, kept_columns(site, structure)


def _revive(
    small: Tensors, path: str, values: Float[Tensor, " rank"], rows: Float[Tensor, "wide columns"]
) -> None:
    """Fill zero directions with the wide adapter's own rows, so that they can be trained."""
    dead = values <= NEGLIGIBLE * values.max().clamp_min(1e-30)
    if dead.any():
        small[a_name(path)][dead] = (
            rows[: len(values)][dead] if values.max() == 0 else rows[-int(dead.sum()) :]
        )
        small[b_name(path)][:, dead] = 0.0


def _roots(gram: Float[Tensor, "sites n n"]) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of Gram matrices, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    root = values.sqrt()
    alive = values > 1e-14 * values.amax(1, keepdim=True).clamp_min(1e-300)
    inverse = torch.where(alive, 1 / root.clamp_min(1e-150), 0.0)
    transposed = vectors.transpose(1, 2)
    return (vectors * root[:, None, :]) @ transposed, (vectors * inverse[:, None, :]) @ transposed


def _truncated_svd(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    guess: Float[Tensor, "rank columns"],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    if min(matrix.shape) <= EXACT_BELOW:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    extra = torch.from_numpy(
        rng.standard_normal((OVERSAMPLING, matrix.shape[1])).astype(np.float32)
    )
    basis = torch.linalg.qr(matrix @ torch.cat([guess, extra]).T).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner[:, :rank], values[:rank], right[:rank]


def _padded(factor: Tensor, size: int, dim: int) -> Tensor:
    missing = size - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, torch.zeros(shape)], dim)
