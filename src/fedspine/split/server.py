"""The server's side of split learning: what becomes of the top in one iteration, from the features of many devices.

Merged: one step on all of them (MergeSFL). Weighted: one step on the sum of the devices' own losses (LocFedMix-SL).
In turn: one step per device on one top, in random order (SplitFed V2), or always the same (SplitLoRA).
Copies: a top for each device, averaged after every iteration (AdaSFL) or at the round's end (SplitFed V1).
With `shifts`, by device [classes], a device's gradient is that of its loss with them added to its rows' logits, and so is
that of the top's first block, where it still makes features; the rest of the top learns from the plain loss.
A device whose loss is not finite is left out of the iteration, and says so in the outcome.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedspine.core.device import DeviceId
from fedspine.core.message import Tensors
from fedspine.core.task import IGNORED
from fedspine.core.tensors import average
from fedspine.split.interface import Features, Halves, Losses
from fedspine.split.trainable_half import Optimising, Trained


@dataclass(frozen=True)
class Part:
    """One device's share of an iteration."""

    device: DeviceId
    features: Features
    labels: Tensor | None  # int64 [rows] or [rows, tokens]; None where they stay on the device


@dataclass
class Outcome:
    """What one iteration gives: `gradients` are those of each device's mean loss (or as `rescale` says), by device."""

    gradients: dict[DeviceId, Features | None] = field(default_factory=dict)
    losses: dict[DeviceId, float] = field(default_factory=dict)  # mean over a device's labels
    counted: dict[DeviceId, int] = field(default_factory=dict)  # labels
    left_out: dict[DeviceId, str] = field(default_factory=dict)  # and why


class ServerStep(Protocol):
    """A top under training, for one round."""

    def step(self, parts: Sequence[Part], seed: int) -> Outcome:
        """One iteration; `seed` fixes what is drawn."""
        ...

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        """The top at the round's end; `weights` are those by which the bottoms of the devices that stayed are averaged."""
        ...


# a loss of the server's own on what came, whose gradient stays with the top: (weights, parts, seed) -> loss
Extra: TypeAlias = Callable[[Tensors, Sequence[Part], int], Tensor]
Shifts: TypeAlias = "Mapping[DeviceId, Tensor] | None"


class Merged:
    """One step of one top on all features as one batch.

    `rescale`: each device gets the gradient of its own mean loss, whatever else was merged; without, that of the merged
    mean. With no `gradients`, bottoms train nothing, and nothing is sent back.
    """

    def __init__(
        self,
        halves: Halves,
        top: Tensors,
        optimising: Optimising,
        *,
        rescale: bool = True,
        gradients: bool = True,
        shifts: Shifts = None,
    ) -> None:
        self._halves, self._rescale, self._gradients, self._shifts = (
            halves,
            rescale,
            gradients,
            shifts,
        )
        self._top = Trained(top, optimising, halves.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> Outcome:
        outcome = Outcome()
        while parts:
            before = self._top.statistics()
            values, losses = _forward(
                self._halves, self._top.weights, parts, seed, self._gradients, self._shifts
            )
            found = _by_part(losses, parts)
            broken = {
                part.device
                for part, (loss, _) in zip(parts, found, strict=True)
                if not np.isfinite(loss)
            }
            if not broken:
                break
            self._top.forget(before)
            outcome.left_out |= dict.fromkeys(broken, "loss is not finite")
            parts = [part for part in parts if part.device not in broken]
        if not parts:
            return outcome
        gradient = _learnt(self._halves, losses, values, self._top)
        self._top.step()
        labels = int(losses.labels)
        gradients = parted(gradient, parts) if self._gradients else [None] * len(parts)
        for part, gradient, (own, counted) in zip(parts, gradients, found, strict=True):
            if gradient is not None and self._rescale:
                scaled = gradient.values * (labels / max(counted, 1))
                gradient = Features(values=scaled, mask=gradient.mask)
            _put(outcome, part, gradient, own, counted)
        return outcome

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._top.now()


class InTurn:
    """One step of one top per device, in an order drawn from the iteration's seed, or in theirs if not `shuffled`."""

    def __init__(
        self,
        halves: Halves,
        top: Tensors,
        optimising: Optimising,
        *,
        gradients: bool = True,
        shuffled: bool = True,
        shifts: Shifts = None,
    ) -> None:
        self._halves, self._gradients, self._shuffled, self._shifts = (
            halves,
            gradients,
            shuffled,
            shifts,
        )
        self._top = Trained(top, optimising, halves.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> Outcome:
        outcome = Outcome()
        places = (
            np.random.default_rng(seed).permutation(len(parts))
            if self._shuffled
            else range(len(parts))
        )
        for i in places:
            _alone(self._halves, self._top, parts[i], seed, self._gradients, outcome, self._shifts)
        return outcome

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._top.now()


class Weighted:
    """One step of one top on a weighted sum of the devices' own mean losses, each from a forward pass of its own.

    `shares` weighs devices; over those of an iteration the weights sum to 1. Each gets the gradient of its own mean
    loss. `extra` is added to the sum; its passes leave the top's statistics alone.
    """

    def __init__(
        self,
        halves: Halves,
        top: Tensors,
        optimising: Optimising,
        shares: Mapping[DeviceId, float],
        *,
        gradients: bool = True,
        extra: Extra | None = None,
    ) -> None:
        self._halves, self._shares, self._gradients, self._extra = halves, shares, gradients, extra
        self._top = Trained(top, optimising, halves.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> Outcome:
        outcome, sound = Outcome(), []
        for part in parts:
            before = self._top.statistics()
            values, losses = _forward(
                self._halves, self._top.weights, [part], seed, self._gradients
            )
            ((loss, counted),) = _by_part(losses, [part])
            if np.isfinite(loss):
                sound.append((part, values, losses.mean, loss, counted))
            else:
                self._top.forget(before)
                outcome.left_out[part.device] = "loss is not finite"
        if not sound:
            return outcome
        whole = sum(self._shares[part.device] for part, *_ in sound)
        loss = torch.stack(
            [self._shares[part.device] / whole * mean for part, _, mean, *_ in sound]
        ).sum()
        if self._extra is not None:
            loss = loss + self._extra(
                self._top.without_statistics(), [part for part, *_ in sound], seed
            )
        _backward(loss, [*(values for _, values, *_ in sound), *self._top.leaves])
        self._top.step()
        for part, values, _, own, counted in sound:
            (gradient,) = parted(values.grad, [part])
            if gradient is not None:
                scaled = gradient.values * (whole / self._shares[part.device])
                gradient = Features(values=scaled, mask=gradient.mask)
            _put(outcome, part, gradient, own, counted)
        return outcome

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._top.now()


class Copies:
    """A copy of the top for each device, trained side by side on its own features.

    `every_iteration`: the copies are averaged uniformly after each iteration, and all go on from there with fresh
    optimisers; else at the round's end, by the weights that the bottoms have.
    """

    def __init__(
        self,
        halves: Halves,
        top: Tensors,
        optimising: Optimising,
        *,
        every_iteration: bool,
        gradients: bool = True,
        shifts: Shifts = None,
    ) -> None:
        self._halves, self._start, self._optimising = halves, top, optimising
        self._every_iteration, self._gradients, self._shifts = every_iteration, gradients, shifts
        self._copies: dict[DeviceId, Trained] = {}

    def step(self, parts: Sequence[Part], seed: int) -> Outcome:
        outcome = Outcome()
        for part in parts:
            if part.device not in self._copies:
                self._copies[part.device] = Trained(
                    self._start, self._optimising, self._halves.statistics
                )
            top = self._copies[part.device]
            _alone(self._halves, top, part, seed, self._gradients, outcome, self._shifts)
        if self._every_iteration and outcome.losses:
            self._start = average((1, self._copies[device].now()) for device in outcome.losses)
            self._copies.clear()
        return outcome

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        if self._every_iteration:
            return self._start
        return average((weight, self._copies[device].now()) for device, weight in weights.items())


def merged(parts: Sequence[Part]) -> tuple[Features, Tensor]:
    """All features and labels as one batch, padded to the longest row; the order is that of `parts`."""
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


def parted(values: Tensor | None, parts: Sequence[Part]) -> list[Features | None]:
    """Each device's rows of what was computed for the merged batch, without the padding that merging added."""
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


def _forward(
    halves: Halves,
    weights: Tensors,
    parts: Sequence[Part],
    seed: int,
    gradients: bool,
    shifts: Shifts = None,
) -> tuple[Tensor, Losses]:
    """The merged features, as a leaf that gets a gradient if it is wanted, and their losses."""
    features, labels = merged(parts)
    values = features.values.detach().requires_grad_(gradients)
    entered = Features(values=values, mask=features.mask)
    if shifts is None or not gradients:
        return values, halves.top(weights, entered, labels, seed=seed)
    rows = torch.cat([shifts[part.device].expand(len(part.features), -1) for part in parts])
    return values, halves.top(weights, entered, labels, seed=seed, shifts=rows)


def _backward(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    if any(
        leaf.requires_grad for leaf in leaves
    ):  # a frozen top of features that nobody trains has nothing to learn
        loss.backward()


def _learnt(halves: Halves, losses: Losses, values: Tensor, top: Trained) -> Tensor | None:
    """Give the top's leaves their gradients; the features' own is returned, None if it is not wanted."""
    if losses.shifted is None:
        _backward(losses.mean, [values, *top.leaves])
        return values.grad
    # a first block that makes features goes with them: to carry the plain gradient down to it is as costly as a pass
    entry = [top.weights[name] for name in halves.entry]
    above = [
        leaf
        for name, leaf in top.weights.items()
        if leaf.requires_grad and name not in halves.entry
    ]
    losses.mean.backward(inputs=above, retain_graph=True)
    (losses.shifted.sum() / losses.labels).backward(inputs=[values, *entry])
    return values.grad


def _by_part(losses: Losses, parts: Sequence[Part]) -> list[tuple[float, int]]:
    """Each device's mean loss and its count of labels."""
    sizes = [len(part.features) for part in parts]
    totals = [own.sum() for own in losses.total.detach().split(sizes)]
    counts = [int(own.sum()) for own in losses.counted.split(sizes)]
    return [
        (float(total) / max(count, 1), count) for total, count in zip(totals, counts, strict=True)
    ]


def _alone(
    halves: Halves,
    top: Trained,
    part: Part,
    seed: int,
    gradients: bool,
    outcome: Outcome,
    shifts: Shifts = None,
) -> None:
    """One step of a top on one device's features."""
    before = top.statistics()
    values, losses = _forward(halves, top.weights, [part], seed, gradients, shifts)
    ((loss, counted),) = _by_part(losses, [part])
    if not np.isfinite(loss):
        top.forget(before)
        outcome.left_out[part.device] = "loss is not finite"
        return
    found = _learnt(halves, losses, values, top)
    top.step()
    (gradient,) = parted(found, [part])
    _put(outcome, part, gradient, loss, counted)


def _put(
    outcome: Outcome, part: Part, gradient: Features | None, loss: float, counted: int
) -> None:
    outcome.gradients[part.device] = gradient
    outcome.losses[part.device] = loss
    outcome.counted[part.device] = counted
