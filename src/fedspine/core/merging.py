"""What becomes of the replies of a round under the fleet's aggregation: for dictionaries of equal
shapes here, for adapters of unequal ranks and shapes in `lm.aggregate`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspine.core.aggregation import Aggregation, Mean, Median, NormClip, TrimmedMean
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.message import Tensors
from fedspine.core.tensors import average, single


@dataclass(frozen=True)
class Weighted:
    """What one device has in a merge: `tensors`, and their weight, its number of rows."""

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
    """The fields named in `before`, merged over the replies as `fleet.aggregation` says, and moved
    as `fleet.server` says; but for the tensors named in `averaged`, such as statistics of batches.

    A method gives for each field of its results, such as `head`, the tensors that the server has
    before the round, of equal names and shapes; replies weigh as `usable` says. What nothing
    can be said of stays as it was: everything, where too few devices replied. That is noted, and so
    is each device whose change was bounded, by field.
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
    """One dictionary of the devices' ones, as `fleet.aggregation` and `fleet.server` say, fp32;
    the latter but for the tensors named in `averaged`.

    `before` holds what devices changed; entries of which nothing can be said stay as there. `what`
    it is stands in the notes and in the server's memory. Raises ValueError where no device has a
    weight.
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
        else Weighted(part.device, part.weight, toward(before, part.tensors, share))
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
    """What each device counts for in each row of a tensor, fp32 [devices, rows]: its weight times
    its share of the row, as `fleet.server` knows it.

    A device of which nothing is known counts alike in all rows; in a row for which no device has a
    share, all count by their weights.
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
    """Of each device's change the share that counts; devices for which it is below 1 are noted.

    Sizes are compared as root mean squares over all entries of a change, so that a device of a
    higher rank, or with fewer units left, is not bounded for that. Of equal shapes that is as
    comparing norms.
    """
    if not isinstance(fleet.aggregation, NormClip):
        return [1.0] * len(devices)
    shares = fleet.aggregation.shares([root_mean_square(change) for change in changes])
    for device, share in zip(devices, shares, strict=True):
        if share < 1:
            fleet.note(device=device, bounded=what, share=share)
    return shares


def root_mean_square(tensors: Tensors) -> float:
    """Over the entries of all tensors; 0 where there are none.

    >>> root_mean_square({"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([0.0, 0.0])})
    2.5
    """
    entries = sum(tensor.numel() for tensor in tensors.values())
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    return (squares / entries) ** 0.5 if entries else 0.0


def toward(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> Tensors:
    """What lies a `share` of the way from `before` to `after`, fp32."""
    return {
        name: before[name].float() + share * (tensor.float() - before[name].float())
        for name, tensor in after.items()
    }


def middle(how: Aggregation, values: Tensor, before: Tensor) -> Tensor:
    """One tensor of the devices', which are the first dimension of `values`, weigh alike and have
    the norms of their values; where nothing can be said, it is `before`.

    >>> middle(Median(), torch.tensor([[1.0], [2.0], [9.0]]), torch.zeros(1))
    tensor([2.])
    """
    if len(values) < how.fewest(len(values)):
        return before
    if trims(how):
        owned = torch.ones_like(values, dtype=torch.bool)
        found, settled = trimmed(how, values, torch.ones(len(values)), owned)
        return torch.where(settled, found, before)
    shares = how.shares([root_mean_square({"": value}) for value in values])
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).mean(0)


def trims(how: Aggregation) -> bool:
    """Whether single entries are left out, so that a sum over devices does not do."""
    return isinstance(how, TrimmedMean | Median)


def trimmed(
    how: Aggregation, values: Tensor, weights: Tensor, owned: Tensor
) -> tuple[Tensor, Tensor]:
    """The trimmed mean or median over devices, the first dimension of `values` and of `owned`, and
    the entries of which it says anything; 0 at the others.

    A value counts where it is owned. `weights` have the first dimension too, and either no other or
    those of `values`. Nothing depends on the order of the devices. Raises ValueError for an
    aggregation that does not trim.

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
        case Mean() | NormClip():
            raise ValueError(f"{how.name} leaves no entries out")


def _change(part: Weighted, before: Tensors) -> Tensors:
    return {name: tensor.float() - before[name].float() for name, tensor in part.tensors.items()}
