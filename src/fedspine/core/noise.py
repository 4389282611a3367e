"""Gaussian noise on tensors: in proportion to a change, and on a device's clipped update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspine.core.draws import Draws
from fedspine.core.message import Tensors
from fedspine.core.privacy import Guard

ROWS = 32  # rows behind an answer at which its noise has the full share
LARGEST = float(torch.finfo(torch.float16).max)  # the largest value that can be sent


def noise_like(tensor: Tensor, draws: Draws) -> Tensor:
    """Standard normal noise, fp32, in the tensor's shape and on its device."""
    drawn = torch.from_numpy(draws.normal(tensor.numel())).float()
    return drawn.view(tensor.shape).to(tensor.device)


def clipped(tensors: Tensors, most: float) -> Tensors:
    """The tensors scaled down so that their joint norm is at most `most`; zeros if the norm is not
    finite.

    >>> clipped({"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, 1.0)
    {'x': tensor([0.6000]), 'y': tensor([0.8000])}
    """
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {name: tensor * min(1.0, most / max(norm, most)) for name, tensor in tensors.items()}


def noisy_update(before: Tensors, after: Tensors, guard: Guard, multiplier: float) -> Tensors:
    """`before` plus the clipped and noisy difference to `after`, by name and with equal shapes.

    Replacing a device's data may move the update from one end of the ball of radius `clip` to the
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
    """The noise that a device adds to trained weights, so that an answer reveals less of its rows.

    It gives no numerical guarantee, unlike differential privacy: docs/leakage.md says what attacks
    find in spite of it.
    """

    share: float  # of the change, for an answer from `ROWS` rows
    draws: Draws

    def share_of(self, rows: int) -> float:
        """The share for an answer from `rows` distinct rows: the more rows, the less an answer
        reveals of each, so it falls with the fourth root of their number. With the square root,
        some texts among 640 rows could be recovered (docs/leakage.md).

        >>> from fedspine.core.draws import SeededDraws
        >>> Noise(4.0, SeededDraws((1,))).share_of(512)
        2.0
        """
        return self.share * (ROWS / max(rows, 1)) ** 0.25

    def added(self, before: Tensors, after: Tensors, rows: int) -> Tensors:
        """`after` with noise on the tensors that are also in `before`, in the same shapes; others
        are unchanged.
        """
        share, released = self.share_of(rows), dict(after)
        for name, sent in before.items():
            if not after[name].numel():
                continue
            noise = share * _sizes(after[name] - sent) * noise_like(after[name], self.draws)
            released[name] = (after[name] + noise).clamp(-LARGEST, LARGEST)
        return released


def _sizes(change: Tensor) -> Tensor:
    """For each entry, the root mean square of its row or of its column, whichever is larger, in the
    shape of `change`; for a vector, that of all entries.

    An order that trains only a few rows of a factor concentrates the change there, so these rows
    would stand out from noise scaled by the mean of the whole tensor.
    """
    power = change.double().square()
    if change.dim() < 2:
        return power.mean().sqrt().float().expand(change.shape)
    flat = power.flatten(1)
    larger = torch.maximum(flat.mean(1, keepdim=True), flat.mean(0, keepdim=True))
    return larger.sqrt().float().view(change.shape)
