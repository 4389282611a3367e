"""What a device keeps from one training to the next, in its memory, and what holds its training
near what it received.

Everything here is fp32, by parameter name, and charged to the device's peak memory where it is more
than training takes anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedspine.core.device import Device
from fedspine.core.message import Tensors, message
from fedspine.core.tensors import moved
from fedspine.lm.base import Model
from fedspine.lm.cost import SINGLE
from fedspine.lm.drift import after_training, along, proximal

# the names in a device's memory
OPTIMISER, GRADIENT, HEAD = "optimiser", "drift", "head"
Penalty = Callable[[Tensors], Tensor]


@message
class AdamMoments:
    """The state of a device's AdamW after a training."""

    first: Tensors
    second: Tensors
    steps: int  # that led to it


@runtime_checkable
class HoldingSettings(Protocol):
    """What of a training's settings this is about."""

    @property
    def proximal(self) -> float: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def keep_optimiser(self) -> bool: ...
    @property
    def personal_head(self) -> bool: ...


@dataclass(frozen=True)
class HeldState:
    """What one training of a device begins with, beside what it received."""

    model: Model  # that is trained
    gradient: dict[str, Tensor] | None = None  # FedDyn's g
    moments: AdamMoments | None = None
    extra_bytes: int = 0  # of memory while it trains
    step_flops: float = 0.0  # of each step


def begun(device: Device, received: Model, how: HoldingSettings) -> HeldState:
    """What the device has kept, and the received model with the device's own head where it has
    one.
    """
    model = received
    if how.personal_head:
        model = replace(received, head=device.memory.get(HEAD, received.head))
    weights = model.adapter | model.head
    numbers = sum(tensor.numel() for tensor in weights.values())
    gradient = None
    if how.dynamic:
        zero = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        gradient = device.memory.get(GRADIENT, zero)
    copies = int(how.proximal > 0) + int(how.dynamic)
    return HeldState(
        model=model,
        gradient=gradient,
        moments=device.memory.get(OPTIMISER) if how.keep_optimiser else None,
        extra_bytes=copies * SINGLE * numbers,
        # a difference, a product and a sum for each number of the pull, the last of g
        step_flops=numbers * (3.0 * int(how.proximal > 0) + 1.0 * int(how.dynamic)),
    )


def penalty_of(
    held: HeldState, how: HoldingSettings, own: Penalty | None, to: torch.device
) -> Penalty | None:
    """What is added to what the device minimises: `own`, which its method asks for, and the terms
    of `method.drift`.
    """
    if not how.proximal and held.gradient is None:
        return own
    received = moved(held.model.adapter | held.model.head, to)
    gradient = None if held.gradient is None else moved(held.gradient, to)

    def penalty(trained: Tensors) -> Tensor:
        total = proximal(trained, received, how.proximal)
        if gradient is not None:
            total = total - along(trained, gradient)
        return total if own is None else total + own(trained)

    return penalty


def remember(
    device: Device,
    held: HeldState,
    how: HoldingSettings,
    trained: Model,
    moments: AdamMoments | None,
) -> None:
    """Keep in the device's memory what the next training begins with."""
    if how.personal_head:
        device.memory[HEAD] = trained.head
    if how.keep_optimiser:
        device.memory[OPTIMISER] = moments
    if held.gradient is not None:
        device.memory[GRADIENT] = after_training(
            held.gradient,
            trained.adapter | trained.head,
            held.model.adapter | held.model.head,
            how.proximal,
        )
