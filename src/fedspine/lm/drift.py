"""What holds local training near the model that the server sent, or near what all devices want.

Each way is a part (`core.parts`) of a recipe, `method.drift`. It adds a term to what a device
minimises, over all that it trains, adapter and head.
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors


@dataclass(frozen=True)
class Free:
    """Nothing: each device goes where its own rows lead."""

    name: ClassVar = "none"

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class FedProx:
    """mu / 2 ||w - w_t||^2, where w_t is what the device received. Li et al. 2020
    (arXiv:1812.06127).
    """

    name: ClassVar = "fedprox"
    mu: float = 0.01

    def check(self) -> None:
        _check_positive("mu", self.mu)


@dataclass(frozen=True)
class FedDyn:
    """alpha / 2 ||w - w_t||^2 - <g, w>, where g is kept on the device and becomes g - alpha
    (w - w_t) after training. Acar et al. 2021 (arXiv:2111.04263), whose server part is
    `core.server_optimiser.Accumulated`. A small alpha leaves the server's sum unopposed, since
    AdamW's steps do not shrink with it.
    """

    name: ClassVar = "feddyn"
    alpha: float = 1.0

    def check(self) -> None:
        _check_positive("alpha", self.alpha)


Drift: TypeAlias = Free | FedProx | FedDyn


def proximal(trained: Tensors, received: Tensors, weight: float) -> Tensor:
    """weight / 2 ||trained - received||^2, over all tensors.

    >>> proximal({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, 0.5)
    tensor(1.)
    """
    gaps = [(trained[name] - tensor).square().sum() for name, tensor in received.items()]
    return 0.5 * weight * torch.stack(gaps).sum()


def along(trained: Tensors, gradient: Tensors) -> Tensor:
    """<gradient, trained>, over all tensors.

    >>> along({"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
    tensor(6.)
    """
    return torch.stack([(trained[name] * g).sum() for name, g in gradient.items()]).sum()


def after_training(gradient: Tensors, trained: Tensors, received: Tensors, alpha: float) -> Tensors:
    """FedDyn's g after a device's training: g - alpha (trained - received)."""
    return {name: g - alpha * (trained[name] - received[name]) for name, g in gradient.items()}


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and isfinite(value)):
        raise BadInput(
            f"method.drift.{name} is {value:g}, but a positive number was expected; for no term "
            'write method.drift.name = "none"'
        )
