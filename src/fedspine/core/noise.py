"""Gaussian noise on tensors: beside the size of a change, and of a clipped update of a device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspine.core.draws import Draws
from fedspine.core.message import Tensors
from fedspine.core.privacy import Guard

ROWS = 32  # behind an answer, whose noise has the whole share
LARGEST = float(torch.finfo(torch.float16).max)  # what can cross the wire


def noise_like(tensor: Tensor, draws: Draws) -> Tensor:
    """Standard normal noise, fp32, in the tensor's shape and on its device."""
    drawn = torch.from_numpy(draws.normal(tensor.numel())).float()
    return drawn.view(tensor.shape).to(tensor.device)


def clipped(tensors: Tensors, most: float) -> Tensors:
    """The tensors scaled down so that their joint norm is at most `most`; zeros where it is not
    finite.

    >>> clipped({"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, 1.0)
    {'x': tensor([0.6000]), 'y': tensor([0.8000])}
    """
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {name: tensor * min(1.0, most / max(norm, most)) for name, tensor in tensors.items()}


def noisy_update(before: Tensors, after: Tensors, guard: Guard, multiplier: float) -> Tensors:
    """`before` with the clipped and noisy difference to `after`, all by name and of the same
    shapes.

    Two data sets of a device may move the update from one end of the ball of radius `clip` to the
    other, so its sensitivity is twice the radius.
    """
    update = clipped({name: after[name] - before[name] for name in before}, guard.terms.clip)
    deviation = multiplier * 2 * guard.terms.clip
    return {
        name: (
            before[name] + update[name] + deviation * noise_like(update[name], guard.draws)
        ).clamp(-LARGEST, LARGEST)
        for name in before
    }


@dataclass(frozen=True)
class Noise:
    """What a device adds to the weights that it trained, so that an answer tells less of its rows.

    It promises nothing in numbers, as differential privacy does: docs/leakage.md says what attacks
    find beside it.
    """

    share: float  # of the change, where the answer is about `ROWS` rows
    draws: Draws

    def share_of(self, rows: int) -> float:
        """The share in an answer about so many distinct rows: an answer about more says less of
        each, so it falls with the fourth root of their number. With the root itself, some texts of
        640 rows stood out (docs/leakage.md).

        >>> from fedspine.core.draws import SeededDraws
        >>> Noise(4.0, SeededDraws((1,))).share_of(512)
        2.0
        """
        return self.share * (ROWS / max(rows, 1)) ** 0.25

    def added(self, before: Tensors, after: Tensors, rows: int) -> Tensors:
        """`after` with noise on what differs from `before`, of the same names and shapes; other
        names stay.
        """
        share, released = self.share_of(rows), dict(after)
        for name, sent in before.items():
            if not after[name].numel():
                continue
            noise = share * _sizes(after[name] - sent) * noise_like(after[name], self.draws)
            released[name] = (after[name] + noise).clamp(-LARGEST, LARGEST)
        return released


def _sizes(change: Tensor) -> Tensor:
    """The root mean square of the row or of the column of each entry, whichever is larger, in the
    shape of `change`; of a vector that of all.

    An order that lets only a few rows of a factor learn gathers all of the change there, so beside
    the mean of the whole tensor they would stand out.
    """
    power = change.double().square()
    if change.dim() < 2:
        return power.mean().sqrt().float().expand(change.shape)
    flat = power.flatten(1)
    larger = torch.maximum(flat.mean(1, keepdim=True), flat.mean(0, keepdim=True))
    return larger.sqrt().float().view(change.shape)
