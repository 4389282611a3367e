"""Merges the replies of a round by the fleet's aggregation, for dictionaries of equal shapes;
`lm.aggregate` does the same for adapters of unequal ranks and shapes.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.core.aggregation import Aggregation, Mean, Median, MultiKrum, NormClip, TrimmedMean
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.message import Tensors
from fedspine.core.tensors import average, single


@dataclass(frozen=True)
class Weighted:
    """One device's part of a merge: its tensors, and their weight, usually its number of rows."""

    device: DeviceId
    weight: int | float
    tensors: Tensors


def merged(
    replies: Sequence[Reply[Any]],
    fleet: Fleet,
    *,
    averaged: Collection[str] = (),
    **before: Tensors,
) -> dict[str, Tensors]:
    """The fields named in `before`, merged over the replies by `fleet.aggregation` and then moved
    by `fleet.server`; fp32.

    For each field of its results, such as `head`, a method gives the server's tensors before the
    round, of equal names and shapes. Replies have the weights of `core.method.usable`. Tensors
    named in `averaged`, such as batch statistics, take no server step. Entries with too few owners
    stay as they were; so do all if too few devices replied, which is noted. Each device whose
    change was bounded is noted by field.
    """
    how = fleet.aggregation
    if len(replies) < how.fewest(len(replies)):
        needed = how.fewest(len(replies))
        fleet.note(not_merged=f"{how.name} needs {needed} replies, got {len(replies)}")
    return {
        field: combined(
            fleet,
            field,
            [Weighted(r.device, r.weight, getattr(r.value, field)) for r in replies],
            now,
            averaged,
        )
        for field, now in before.items()
    }


def combined(
    fleet: Fleet,
    what: str,
    parts: Sequence[Weighted],
    before: Tensors,
    averaged: Collection[str] = (),
) -> Tensors:
    """The devices' dictionaries, merged by `fleet.aggregation` and moved by `fleet.server`, fp32.

    `before` holds the tensors before the devices changed them, with equal names and shapes; entries
    with too few owners keep its values. Tensors named in `averaged` take no server step. `what`
    names the merged tensors in notes and in the server's memory. Raises ValueError if no device has
    a positive weight.
    """
    if 0 < len(parts) < fleet.aggregation.fewest(len(parts)):
        return single(before)
    return fleet.server.step(what, before, _combined(fleet, what, parts, before), averaged)


def _combined(fleet: Fleet, what: str, parts: Sequence[Weighted], before: Tensors) -> Tensors:
    how = fleet.aggregation
    shares = bounded(
        fleet, what, [part.device for part in parts], (_change(part, before) for part in parts)
    )
    parts = [
        part
        if share == 1
        else Weighted(part.device, part.weight if share else 0, toward(before, part.tensors, share))
        for part, share in zip(parts, shares, strict=True)
    ]
    by_row = {name for shares in fleet.server.row_shares.values() for name in shares}
    if not trims(how):
        mean = average((part.weight, part.tensors) for part in parts)
        return mean | {name: _mean_by_row(fleet, name, parts) for name in mean if name in by_row}
    found = {}
    for name, tensor in before.items():
        values = torch.stack([part.tensors[name].float() for part in parts])
        owned = torch.ones_like(values, dtype=torch.bool)
        weights = (
            weights_by_row(fleet, name, parts)
            if name in by_row
            else torch.tensor([float(part.weight) for part in parts])
        )
        mean, settled = trimmed(how, values, weights, owned)
        found[name] = torch.where(settled, mean, tensor.float())
    return found


def weights_by_row(fleet: Fleet, name: str, parts: Sequence[Weighted]) -> Tensor:
    """The weight of each device in each row of a tensor, fp32 [devices, rows]: the device's weight
    times its share of the row in `fleet.server.row_shares`.

    A device without known shares has equal shares in all rows. In a row in which no device has a
    share, all devices have their plain weights.
    """
    rows = len(parts[0].tensors[name])
    even = torch.full((rows,), 1 / rows)
    known = fleet.server.row_shares
    weights = torch.tensor([float(part.weight) for part in parts])[:, None]
    shares = [known.get(part.device, {}).get(name, even) for part in parts]
    by_row = weights * torch.stack(shares)
    return torch.where(by_row.sum(0) > 0, by_row, weights)


def _mean_by_row(fleet: Fleet, name: str, parts: Sequence[Weighted]) -> Tensor:
    values = torch.stack([part.tensors[name].float() for part in parts])
    weights = weights_by_row(fleet, name, parts)
    weights = weights.view(*weights.shape, *([1] * (values.ndim - 2)))
    return (weights * values).sum(0) / weights.sum(0)


def bounded(
    fleet: Fleet, what: str, devices: Sequence[DeviceId], changes: Iterable[Tensors]
) -> list[float]:
    """The share of each device's change that counts, 0 to 1; a device whose share is 0 has no
    weight either. Devices with a share below 1 are noted.

    For `MultiKrum` changes are aligned, with NaN where a device owns nothing of a tensor. Sizes are
    root mean squares over all entries of a change, so a higher rank or fewer units do not make a
    change larger. For equal shapes this equals comparing norms.
    """
    shares = shares_of(fleet.aggregation, len(devices), changes)
    for device, share in zip(devices, shares, strict=True):
        if share < 1:
            fleet.note(device=device, bounded=what, share=share)
    return shares


def shares_of(how: Aggregation, count: int, changes: Iterable[Tensors]) -> list[float]:
    """The share of each of `count` changes that counts by the aggregation, all 1 where it judges
    entries alone.
    """
    match how:
        case NormClip():
            return how.shares([root_mean_square(change) for change in changes])
        case MultiKrum() if count < how.fewest(count):
            return [0.0] * count
        case MultiKrum():
            return [float(kept) for kept in how.kept(distances(list(changes)).tolist())]
        case Mean() | TrimmedMean() | Median():
            return [1.0] * count


def distances(changes: Sequence[Tensors]) -> Float[Tensor, "devices devices"]:
    """The mean squared difference of every two changes over the entries that both own, fp64.

    An entry that a device does not own is NaN, or its tensor is missing. Two devices that share no
    entry are as far apart as the farthest two that do.

    >>> distances([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, torch.nan])}])[0]
    tensor([0., 4.], dtype=torch.float64)
    """
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    shared = torch.zeros_like(total)
    for name in dict.fromkeys(name for change in changes for name in change):
        shape = next(change[name].shape for change in changes if name in change)
        missing = torch.full(shape, torch.nan)
        values = torch.stack([change.get(name, missing).double().flatten() for change in changes])
        owned = (~values.isnan()).double()
        values = values.nan_to_num(0.0)
        squares = values.square() @ owned.T
        total += squares + squares.T - 2 * values @ values.T
        shared += owned @ owned.T
    found = (total / shared.clamp_min(1)).clamp_min(0)
    return torch.where(shared > 0, found, found.max()).fill_diagonal_(0)


def root_mean_square(tensors: Tensors) -> float:
    """The root mean square over the entries of all tensors; 0 if there are none.

    >>> root_mean_square({"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([0.0, 0.0])})
    2.5
    """
    entries = sum(tensor.numel() for tensor in tensors.values())
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    return (squares / entries) ** 0.5 if entries else 0.0


def toward(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> Tensors:
    """The tensors at a `share` of the way from `before` to `after`, fp32."""
    return {
        name: before[name].float() + share * (tensor.float() - before[name].float())
        for name, tensor in after.items()
    }


def middle(how: Aggregation, values: Tensor, before: Tensor) -> Tensor:
    """The devices' tensors, merged with equal weights; devices are the first dimension of `values`.

    `NormClip` and `MultiKrum` judge the values themselves, not their change. Entries with too few
    devices are those of `before`.

    >>> middle(Median(), torch.tensor([[1.0], [2.0], [9.0]]), torch.zeros(1))
    tensor([2.])
    """
    if len(values) < how.fewest(len(values)):
        return before
    if trims(how):
        owned = torch.ones_like(values, dtype=torch.bool)
        found, settled = trimmed(how, values, torch.ones(len(values)), owned)
        return torch.where(settled, found, before)
    shares = shares_of(how, len(values), ({"": value} for value in values))
    kept = [share * value for share, value in zip(shares, values, strict=True) if share]
    return torch.stack(kept).mean(0)


def trims(how: Aggregation) -> bool:
    """Whether the aggregation leaves out single entries, so that a sum over devices does not
    suffice.
    """
    return isinstance(how, TrimmedMean | Median)


def trimmed(
    how: Aggregation, values: Tensor, weights: Tensor, owned: Tensor
) -> tuple[Tensor, Tensor]:
    """The trimmed mean or median over devices, and a mask of the entries for which it exists; the
    other entries are 0.

    Devices are the first dimension of `values` and of `owned`, a mask of the values that count.
    `weights` are [devices], or have further dimensions of `values`. The result does not depend on
    the order of the devices. Raises ValueError for an aggregation that does not trim.

    >>> values, weights = torch.tensor([[1.0], [2.0], [9.0]]), torch.ones(3)
    >>> trimmed(Median(), values, weights, torch.ones(3, 1, dtype=torch.bool))
    (tensor([2.]), tensor([True]))
    """
    weights = weights.float().view(
        len(weights), *weights.shape[1:], *([1] * (values.ndim - weights.ndim))
    )
    # equal values in the order of their weights, else which of them is left out would be chance
    first = weights.expand_as(values).argsort(0)
    values, weights, owned = (
        each.expand_as(values).gather(0, first) for each in (values, weights, owned)
    )
    ordered, order = torch.where(owned, values, torch.inf).sort(dim=0, stable=True)
    owners = owned.sum(0)
    cut = _cut(how, len(values), owners)
    place = torch.arange(len(values)).view(-1, *([1] * (values.ndim - 1)))
    kept = (place >= cut) & (place < owners - cut)
    counted = torch.where(kept, weights.gather(0, order), 0.0)
    total = counted.sum(0)
    settled = total > 0
    mean = (counted * torch.where(kept, ordered, 0.0)).sum(0) / torch.where(settled, total, 1.0)
    # rounding must not carry a mean past what it is the mean of
    lowest = torch.where(kept, ordered, torch.inf).amin(0)
    highest = torch.where(kept, ordered, -torch.inf).amax(0)
    return torch.where(settled, mean.clamp(lowest, highest), 0.0), settled


def _cut(how: Aggregation, replies: int, owners: Tensor) -> Tensor:
    """How many values of each entry are left out at each end."""
    match how:
        case TrimmedMean():
            return torch.full_like(owners, how.cut(replies))
        case Median():
            enough = owners >= how.fewest(replies)
            return torch.where(enough, (owners - 1) // 2, owners)
        case Mean() | MultiKrum() | NormClip():
            raise ValueError(f"{how.name} leaves no entries out")


def _change(part: Weighted, before: Tensors) -> Tensors:
    return {name: tensor.float() - before[name].float() for name, tensor in part.tensors.items()}
