"""Gaussian noise on tensors, and the clipped and noisy update of a device."""

import math

import torch
from torch import Tensor

from fedspine.core.draws import Draws
from fedspine.core.message import Tensors
from fedspine.core.privacy import Guard

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
