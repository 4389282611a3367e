"""The features of several devices as one batch, and results for the batch by device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedspine.core.device import DeviceId
from fedspine.core.task import IGNORED
from fedspine.split.interface import Features


@dataclass(frozen=True)
class Part:
    """One device's share of an iteration."""

    device: DeviceId
    features: Features
    labels: Tensor | None  # int64 [rows] or [rows, tokens]; None where they stay on the device


def merged(parts: Sequence[Part]) -> tuple[Features, Tensor]:
    """All features and labels as one batch, padded to the longest row; the order is that of
    `parts`.
    """
    features = merged_features(parts)
    labels = [part.labels for part in parts if part.labels is not None]
    if features.mask is not None and labels[0].dim() == 2:
        width = features.mask.shape[1]
        labels = [pad(own, (0, width - own.shape[1]), value=IGNORED) for own in labels]
    return features, torch.cat(labels)


def merged_features(parts: Sequence[Part]) -> Features:
    """All features as one batch, padded to the longest row."""
    masks = [part.features.mask for part in parts if part.features.mask is not None]
    if not masks:
        return Features(values=torch.cat([part.features.values for part in parts]))
    width = max(mask.shape[1] for mask in masks)
    values = [pad(p.features.values, (0, 0, 0, width - p.features.values.shape[1])) for p in parts]
    mask = torch.cat([pad(mask, (0, width - mask.shape[1])) for mask in masks])
    return Features(values=torch.cat(values), mask=mask)


def per_device(values: Tensor | None, parts: Sequence[Part]) -> list[Features | None]:
    """Each device's rows of what was computed for the merged batch, without the padding that
    merging added.
    """
    if values is None:
        return [None] * len(parts)
    own = values.split([len(part.features) for part in parts])
    return [
        Features(
            values=rows if part.features.mask is None else rows[:, : part.features.mask.shape[1]],
            mask=part.features.mask,
        )
        for rows, part in zip(own, parts, strict=True)
    ]
