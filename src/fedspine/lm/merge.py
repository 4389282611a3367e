"""FedSpine's server: from contributions to the common adapter, from it to a device's, and the size
of a device's change.

`delta-product` is the reconstruction's way (sections 3.1 to 3.3); the others replace it to be
compared with: plain zero-padding, HetLoRA's weights, FlexLoRA's mean of products. Sources:
`lm/aggregate.py`.
"""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.message import Tensors
from fedspine.core.server_optimiser import Server
from fedspine.lm.aggregate import (
    Contribution,
    average_factors,
    by_norm,
    mean_product,
    merge_changes,
)
from fedspine.lm.base import Base
from fedspine.lm.factoring import change_spectra, effective_rank, factor, hand_out
from fedspine.lm.frozen import expanded
from fedspine.lm.lora import cut_rank
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, cut_adapter, kept_columns, kept_rows

RankMerging: TypeAlias = Literal["delta-product", "zeropad", "hetlora", "flexlora"]
FACTORS = ("zeropad", "hetlora")  # the ways that average factors


def no_change(how: RankMerging, layout: PrunableLayout) -> Tensors:
    """The dense change of every weight before the first round; none is kept where factors are
    averaged.
    """
    if how in FACTORS:
        return {}
    return {site.path: torch.zeros(site.rows, site.columns) for site in layout.sites}


def merge(
    how: RankMerging,
    layout: PrunableLayout,
    before: tuple[Tensors, Tensors],
    parts: list[Contribution],
    *,
    rank: int,
    seed: int,
    aggregation: Aggregation = Mean(),
    server: Server | None = None,
) -> tuple[Tensors, Tensors]:
    """The dense change of every weight, without the scale, and the adapter of `rank`, from both
    `before`.

    The two ways that average factors leave the dense change alone. `how` says what is merged,
    `aggregation` whether by its mean, `server` what becomes of it (default: it is taken as it is).
    """
    dense, adapter = before
    server = server or Server()
    match how:
        case "zeropad":
            mean = average_factors(layout, adapter, parts, aggregation)
            return dense, server.step("adapter", adapter, mean)
        case "hetlora":
            mean = average_factors(layout, adapter, by_norm(parts), aggregation)
            return dense, server.step("adapter", adapter, mean)
        case "flexlora":
            merged = mean_product(layout, dense, parts, aggregation)
        case "delta-product":
            merged = merge_changes(layout, dense, parts, aggregation)
    dense = server.step("products", dense, merged)
    return dense, factor(layout, dense, rank, adapter, seed)


def share(
    how: RankMerging, layout: PrunableLayout, adapter: Tensors, structure: Structure, rank: int
) -> Tensors:
    """A device's adapter: the first directions where factors are averaged, the best ones where
    products are.
    """
    if how in FACTORS:
        return cut_rank(cut_adapter(adapter, layout.sites, structure), rank)
    return hand_out(layout, adapter, structure, rank)


def change(
    layout: PrunableLayout, energy: Tensors, part: Contribution, scale: float
) -> tuple[float, float]:
    """How much a device changed, over the weights it owns, and over how many directions (section
    3.3).

    `energy` holds the base's squared norms by line, as `line_energy` gives them.
    """
    spectra = scale * change_spectra(layout, part)
    norms = site_norms(layout, energy, part.structure)
    return float((spectra.norm(dim=1) / norms).mean()), effective_rank(spectra)


def line_energy(base: Base) -> Tensors:
    """Squared norms of the rows (or columns, where those are cut) of every site's unpruned weight,
    by path.
    """
    return {
        site.path: expanded(base.weights[site.path][0])
        .float()
        .square()
        .sum(1 if site.row_units else 0)
        .cpu()
        for site in base.layout.sites
    }


def site_norms(
    layout: PrunableLayout, energy: Tensors, structure: Structure
) -> Float[Tensor, " sites"]:
    """Frobenius norm of every site's weight cut to `structure`, from `line_energy`."""
    sums = []
    for site in layout.sites:
        kept = kept_rows(site, structure) if site.row_units else kept_columns(site, structure)
        sums.append(energy[site.path][kept].sum())
    return torch.stack(sums).sqrt()
