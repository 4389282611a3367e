"""Which units a model keeps, and how the weights of every site are cut to them: slices, never
masks.
"""

from math import ceil
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedspine.control.sparsity import TOLERANCE, counts, layer_targets
from fedspine.core.checks import Asked, need, tensor_of
from fedspine.core.errors import BadInput, unknown
from fedspine.core.message import Tensors, message
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite

HEAD_FLOOR, CHANNEL_FLOOR = (
    2,
    0.25,
)  # never fewer heads, never a smaller share of the channels, if it can be helped

PROTECTED_FROM = 12  # layers of a decoder: of fewer, the last is too large a share to stay whole

# whether layers may differ in how many units they keep; or all keep as many, so that a stock
# configuration can say the sizes; or fewer heads and more channels are kept than otherwise, since a
# head takes more time than its weights
StructureKind: TypeAlias = Literal["free", "uniform", "few_heads"]


@message
class Structure:
    """The heads and channels that are kept, by layer, as units of the unpruned model."""

    heads: Bool[Tensor, "layers heads"]
    channels: Bool[Tensor, "layers channels"]

    def check(self, asked: Asked) -> None:
        """Every layer of the model keeps a head and a channel at least."""
        layout = asked.base.layout
        for name, units in (("heads", layout.heads), ("channels", layout.channels)):
            kept = getattr(self, name)
            tensor_of(f"structure.{name}", kept, torch.bool, (layout.layers, units))
            need(bool(kept.any(1).all()), f"structure.{name} keeps none in some layer")


def full(layout: PrunableLayout) -> Structure:
    """The unpruned structure."""
    return Structure(
        heads=torch.ones(layout.layers, layout.heads, dtype=torch.bool),
        channels=torch.ones(layout.layers, layout.channels, dtype=torch.bool),
    )


def key_of(structure: Structure, layers: int | None = None) -> bytes:
    """The same for two structures exactly when they keep the same units in their first `layers`
    layers (default: all).
    """
    return (
        structure.heads[:layers].numpy().tobytes() + structure.channels[:layers].numpy().tobytes()
    )


def is_full(structure: Structure) -> bool:
    return bool(structure.heads.all() and structure.channels.all())


def is_even(structure: Structure) -> bool:
    """Whether every layer keeps as many heads, and as many channels."""
    return all(len(set(kept.tolist())) == 1 for kept in kept_counts(structure))


def sparsity(layout: PrunableLayout, structure: Structure) -> float:
    """Share of the blocks' linear weights that is pruned, 0 to 1."""
    shape = layout.shape
    heads, channels = (int(kept.sum()) for kept in kept_counts(structure))
    kept = heads * shape.head_parameters + channels * shape.channel_parameters
    return 1 - kept / layout.parameters


def kept_counts(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of heads and of channels that each layer keeps, [layers] each."""
    # row by row, since a sum along an axis turns each of the booleans into an integer first
    heads, channels = (
        np.array([np.count_nonzero(row) for row in units.numpy()])
        for units in (structure.heads, structure.channels)
    )
    return heads, channels


def grain(layout: PrunableLayout) -> float:
    """How far a structure's sparsity may be above what was asked for: a unit in each layer."""
    shape = layout.shape
    return max(shape.head_parameters, shape.channel_parameters, TOLERANCE * shape.parameters) / (
        shape.parameters
    )


def kept_rows(site: PrunableSite, structure: Structure) -> Int[Tensor, " kept"] | None:
    """Indices of the rows of this site's weight that are kept, None where no row is ever cut."""
    return _kept_places(site, structure) if site.row_units else None


def kept_columns(site: PrunableSite, structure: Structure) -> Int[Tensor, " kept"] | None:
    """Indices of the kept columns of this site's weight, None where no column is ever cut."""
    return _kept_places(site, structure) if site.column_units else None


def _kept_places(site: PrunableSite, structure: Structure) -> Int[Tensor, " kept"]:
    units = (
        structure.heads if "heads" in (site.row_units, site.column_units) else structure.channels
    )
    return units[site.layer].repeat_interleave(site.per_unit).nonzero().squeeze(1)


def cut(tensor: Tensor, index: Int[Tensor, " kept"] | None, dim: int) -> Tensor:
    """The kept slices of `tensor` along `dim`; the tensor itself where nothing is cut."""
    if index is None or len(index) == tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, index.to(tensor.device))


def cut_adapter(
    adapter: Tensors,
    sites: tuple[PrunableSite, ...],
    structure: Structure,
    within: Structure | None = None,
) -> Tensors:
    """The adapter of the sub-model `structure`, cut from one of the sub-model `within` (default:
    the full model).
    """
    sliced: Tensors = {}
    for site in sites:
        a, b = adapter[a_name(site.path)], adapter[b_name(site.path)]
        sliced[a_name(site.path)] = cut(a, _position(kept_columns, site, structure, within), 1)
        sliced[b_name(site.path)] = cut(b, _position(kept_rows, site, structure, within), 0)
    return sliced


def widen_adapter(
    adapter: Tensors, sites: tuple[PrunableSite, ...], structure: Structure
) -> Tensors:
    """The adapter of the whole model that is this one, of the sub-model `structure`, where it has
    units, and zero elsewhere: what `cut_adapter` cuts to the same again.
    """
    wide: Tensors = {}
    for site in sites:
        a, b = adapter[a_name(site.path)], adapter[b_name(site.path)]
        columns, rows = kept_columns(site, structure), kept_rows(site, structure)
        if columns is not None:
            a = a.new_zeros(len(a), site.columns).index_copy_(1, columns, a)
        if rows is not None:
            b = b.new_zeros(site.rows, b.shape[1]).index_copy_(0, rows, b)
        wide[a_name(site.path)], wide[b_name(site.path)] = a, b
    return wide


def _position(
    kept, site: PrunableSite, structure: Structure, within: Structure | None
) -> Int[Tensor, " kept"] | None:  # type: ignore[no-untyped-def]
    index = kept(site, structure)
    if index is None or within is None:
        return index
    return torch.searchsorted(kept(site, within), index)


def shrink(
    layout: PrunableLayout,
    structure: Structure,
    scores: tuple[Float[Tensor, "layers heads"], Float[Tensor, "layers channels"]],
    *,
    sparsity: float,
    target: float,
    kind: StructureKind = "free",
) -> Structure:
    """Drop the least important units of every layer, until the model's sparsity is `sparsity` on
    its way to `target`.

    Already dropped units stay dropped; ties go to the lower index. Layers that `final_targets`
    protects keep everything and the others take their share. At `sparsity == target` the sparsity
    is exact to the units' grain. A `kind` of "uniform" keeps as many units in every layer, and so
    many heads as a stock configuration can say; with "few_heads" the share of kept heads is the
    square of that of kept weights. Source: FedSpine (reconstructed), section 2.3.
    """
    finals = final_targets(layout, target, kind)
    heads, channels = structure.heads.clone(), structure.channels.clone()
    for layer, final in enumerate(finals):
        if final == 0:
            continue
        dropped = (int((~heads[layer]).sum()), int((~channels[layer]).sum()))
        wanted = counts(
            layout.shape,
            final * (sparsity / target),
            target=final,
            dropped=dropped,
            **_rules(layout, final, kind),
        )
        _drop(heads[layer], scores[0][layer], wanted[0])
        _drop(channels[layer], scores[1][layer], wanted[1])
    return Structure(heads=heads, channels=channels)


def check_target(layout: PrunableLayout, target: float, kind: str = "free") -> None:
    """Raise BadInput where no structure of this model has the sparsity `target`, and for an unknown
    kind.
    """
    if kind not in get_args(StructureKind):
        raise unknown("method.structure", kind, get_args(StructureKind))
    for final in set(final_targets(layout, target, kind)):
        try:
            counts(layout.shape, final, target=final, **_rules(layout, final, kind))
        except BadInput as error:
            if kind != "uniform":
                raise
            raise BadInput(f'{error}, or set method.structure = "free"') from None


def _rules(layout: PrunableLayout, final: float, kind: StructureKind) -> dict[str, Any]:
    """What `counts` is told of the heads and channels of a layer that ends at `final`."""
    floors = {"keep_heads": HEAD_FLOOR, "keep_channels": CHANNEL_FLOOR}
    match kind:
        case "uniform":
            return floors | {"heads_dropped": layout.heads_dropped}
        case "few_heads":
            return floors | {"heads_target": 1 - (1 - final) ** 2}
    return floors


def final_targets(
    layout: PrunableLayout, target: float, kind: StructureKind = "free"
) -> list[float]:
    """The final sparsity of every layer, so that the model's is `target`.

    Uniform structures, encoders, and decoders of fewer than `PROTECTED_FROM` layers: the same
    everywhere. Other decoders keep the first tenth of their layers and the last one whole, as
    LoRAPrune does, as long as the others can then keep their own floors; else fewer layers are
    protected, the first ones first.
    """
    shape = layout.shape
    floors = shape.sparsity(
        shape.heads - HEAD_FLOOR, shape.channels - ceil(CHANNEL_FLOOR * shape.channels)
    )
    protects = layout.decoder and kind != "uniform" and layout.layers >= PROTECTED_FROM
    choices = ((int(0.1 * layout.layers), 1), (0, 1)) if protects else ()
    for first, last in choices:
        pruned = layout.layers - first - last
        if pruned > 0 and target * layout.layers / pruned <= floors:
            return layer_targets(layout.layers, target, protect_first=first, protect_last=last)
    return [target] * layout.layers


def _drop(kept: Bool[Tensor, " units"], scores: Float[Tensor, " units"], wanted: int) -> None:
    """Mark the `wanted` least important units as dropped, in a row that the caller owns."""
    # dropped ones first, then by score
    order = np.lexsort((np.arange(len(kept)), scores.numpy(), kept.numpy()))
    kept[torch.from_numpy(order[:wanted].copy())] = False
