"""The server's side of split learning: how the server model learns from many devices' features.

Merged: one step on all of them (MergeSFL). Weighted: one step on the sum of the devices' own losses
(LocFedMix-SL). In turn: one step per device on one server model, in random order (SplitFed V2) or
in a fixed one (SplitLoRA). Copies: a server model for each device, averaged after every iteration
(AdaSFL) or at the round's end (SplitFed V1).

With logit adjustments, by device [classes], a device's gradient is that of its loss with them added
to its rows' logits. So is the gradient of the server model's first block if it still makes
features; the other blocks learn from the plain loss. A device whose loss is not finite is left out
of the iteration, and the result says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedspine.core.device import DeviceId
from fedspine.core.message import Tensors
from fedspine.core.tensors import average
from fedspine.split.interface import Features, Losses, SplitModel
from fedspine.split.merged_batch import Part, merged, per_device
from fedspine.split.trainable_half import Optimising, TrainableHalf


@dataclass
class StepResult:
    """One iteration's results by device; gradients are of its mean loss, or as `rescale` says."""

    gradients: dict[DeviceId, Features | None] = field(default_factory=dict)
    losses: dict[DeviceId, float] = field(default_factory=dict)  # mean over a device's labels
    counted: dict[DeviceId, int] = field(default_factory=dict)  # labels
    left_out: dict[DeviceId, str] = field(default_factory=dict)  # and why

    def add(self, device: DeviceId, gradient: Features | None, loss: float, counted: int) -> None:
        """The results of one device."""
        self.gradients[device], self.losses[device] = gradient, loss
        self.counted[device] = counted


class ServerStep(Protocol):
    """A server model under training, for one round."""

    def step(self, parts: Sequence[Part], seed: int) -> StepResult:
        """One iteration; `seed` fixes what is drawn."""
        ...

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        """The server model at the round's end; `weights` are those of the client models."""
        ...


# (weights, parts, seed) -> a loss of the server's own, whose gradient stays on the server
ExtraLoss: TypeAlias = Callable[[Tensors, Sequence[Part], int], Tensor]
LogitAdjustments: TypeAlias = "Mapping[DeviceId, Tensor] | None"


class MergedStep:
    """One step of one server model on all features as one batch.

    `rescale`: each device gets the gradient of its own mean loss, whatever else was merged;
    without, that of the merged mean. With no `gradients`, client models train nothing, and nothing
    is sent back.
    """

    def __init__(
        self,
        split_model: SplitModel,
        server_model: Tensors,
        optimising: Optimising,
        *,
        rescale: bool = True,
        gradients: bool = True,
        adjustments: LogitAdjustments = None,
    ) -> None:
        self._split_model, self._rescale, self._gradients, self._adjustments = (
            split_model,
            rescale,
            gradients,
            adjustments,
        )
        self._server_model = TrainableHalf(server_model, optimising, split_model.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> StepResult:
        result = StepResult()
        while parts:
            before = self._server_model.statistics()
            values, losses = _forward(
                self._split_model,
                self._server_model.weights,
                parts,
                seed,
                self._gradients,
                self._adjustments,
            )
            found = _losses_by_part(losses, parts)
            broken = {
                part.device
                for part, (loss, _) in zip(parts, found, strict=True)
                if not np.isfinite(loss)
            }
            if not broken:
                break
            self._server_model.forget(before)
            result.left_out |= dict.fromkeys(broken, "loss is not finite")
            parts = [part for part in parts if part.device not in broken]
        if not parts:
            return result
        gradient = _feature_gradient(self._split_model, losses, values, self._server_model)
        self._server_model.step()
        labels = int(losses.labels)
        gradients = per_device(gradient, parts) if self._gradients else [None] * len(parts)
        for part, gradient, (own, counted) in zip(parts, gradients, found, strict=True):
            if gradient is not None and self._rescale:
                gradient = gradient.times(labels / max(counted, 1))
            result.add(part.device, gradient, own, counted)
        return result

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._server_model.now()


class InTurn:
    """One step of one server model per device, in random order, or in the given order if not
    `shuffled`.
    """

    def __init__(
        self,
        split_model: SplitModel,
        server_model: Tensors,
        optimising: Optimising,
        *,
        gradients: bool = True,
        shuffled: bool = True,
        adjustments: LogitAdjustments = None,
    ) -> None:
        self._split_model, self._gradients, self._shuffled, self._adjustments = (
            split_model,
            gradients,
            shuffled,
            adjustments,
        )
        self._server_model = TrainableHalf(server_model, optimising, split_model.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> StepResult:
        result = StepResult()
        places = (
            np.random.default_rng(seed).permutation(len(parts))
            if self._shuffled
            else range(len(parts))
        )
        for i in places:
            _step_on_one(
                self._split_model,
                self._server_model,
                parts[i],
                seed,
                self._gradients,
                result,
                self._adjustments,
            )
        return result

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._server_model.now()


class WeightedStep:
    """One step of one server model on a weighted sum of the devices' own mean losses.

    `shares` weighs devices; over those of an iteration the weights sum to 1. Each gets the gradient
    of its own mean loss. `extra` is added to the sum; its passes leave the server model's
    statistics alone.
    """

    def __init__(
        self,
        split_model: SplitModel,
        server_model: Tensors,
        optimising: Optimising,
        shares: Mapping[DeviceId, float],
        *,
        gradients: bool = True,
        extra: ExtraLoss | None = None,
    ) -> None:
        self._split_model, self._shares, self._gradients, self._extra = (
            split_model,
            shares,
            gradients,
            extra,
        )
        self._server_model = TrainableHalf(server_model, optimising, split_model.statistics)

    def step(self, parts: Sequence[Part], seed: int) -> StepResult:
        result, sound = StepResult(), []
        for part in parts:
            before = self._server_model.statistics()
            values, losses = _forward(
                self._split_model, self._server_model.weights, [part], seed, self._gradients
            )
            ((loss, counted),) = _losses_by_part(losses, [part])
            if np.isfinite(loss):
                sound.append((part, values, losses.mean, loss, counted))
            else:
                self._server_model.forget(before)
                result.left_out[part.device] = "loss is not finite"
        if not sound:
            return result
        whole = sum(self._shares[part.device] for part, *_ in sound)
        loss = torch.stack(
            [self._shares[part.device] / whole * mean for part, _, mean, *_ in sound]
        ).sum()
        if self._extra is not None:
            loss = loss + self._extra(
                self._server_model.without_statistics(), [part for part, *_ in sound], seed
            )
        _backward(loss, [*(values for _, values, *_ in sound), *self._server_model.leaves])
        self._server_model.step()
        for part, values, _, own, counted in sound:
            (gradient,) = per_device(values.grad, [part])
            if gradient is not None:
                gradient = gradient.times(whole / self._shares[part.device])
            result.add(part.device, gradient, own, counted)
        return result

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        return self._server_model.now()


class Copies:
    """A copy of the server model for each device, trained on the device's own features.

    `every_iteration`: the copies are averaged uniformly after each iteration, and all continue from
    the average with fresh optimisers; else they are averaged at the round's end, with the weights
    of the client models.
    """

    def __init__(
        self,
        split_model: SplitModel,
        server_model: Tensors,
        optimising: Optimising,
        *,
        every_iteration: bool,
        gradients: bool = True,
        adjustments: LogitAdjustments = None,
    ) -> None:
        self._split_model, self._start, self._optimising = split_model, server_model, optimising
        self._every_iteration, self._gradients, self._adjustments = (
            every_iteration,
            gradients,
            adjustments,
        )
        self._copies: dict[DeviceId, TrainableHalf] = {}

    def step(self, parts: Sequence[Part], seed: int) -> StepResult:
        result = StepResult()
        for part in parts:
            if part.device not in self._copies:
                self._copies[part.device] = TrainableHalf(
                    self._start, self._optimising, self._split_model.statistics
                )
            server_model = self._copies[part.device]
            _step_on_one(
                self._split_model,
                server_model,
                part,
                seed,
                self._gradients,
                result,
                self._adjustments,
            )
        if self._every_iteration and result.losses:
            self._start = average((1, self._copies[device].now()) for device in result.losses)
            self._copies.clear()
        return result

    def finish(self, weights: Mapping[DeviceId, float]) -> Tensors:
        if self._every_iteration:
            return self._start
        return average((weight, self._copies[device].now()) for device, weight in weights.items())


def _forward(
    split_model: SplitModel,
    weights: Tensors,
    parts: Sequence[Part],
    seed: int,
    gradients: bool,
    adjustments: LogitAdjustments = None,
) -> tuple[Tensor, Losses]:
    """The merged features, as a leaf that gets a gradient if it is wanted, and their losses."""
    features, labels = merged(parts)
    values = features.values.detach().requires_grad_(gradients)
    entered = Features(values=values, mask=features.mask)
    if adjustments is None or not gradients:
        return values, split_model.server_forward(weights, entered, labels, seed=seed)
    rows = torch.cat([adjustments[part.device].expand(len(part.features), -1) for part in parts])
    return values, split_model.server_forward(weights, entered, labels, seed=seed, adjustments=rows)


def _backward(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    # a frozen server model on features that are not trained has nothing to learn
    if any(leaf.requires_grad for leaf in leaves):
        loss.backward()


def _feature_gradient(
    split_model: SplitModel, losses: Losses, values: Tensor, server_model: TrainableHalf
) -> Tensor | None:
    """Give the server model's leaves their gradients; the features' own is returned, None if it is
    not wanted.
    """
    if losses.adjusted is None:
        _backward(losses.mean, [values, *server_model.leaves])
        return values.grad
    # a first block that makes features gets the adjusted gradient: a plain one for it would cost
    # another pass
    entry = [server_model.weights[name] for name in split_model.entry]
    above = [
        leaf
        for name, leaf in server_model.weights.items()
        if leaf.requires_grad and name not in split_model.entry
    ]
    losses.mean.backward(inputs=above, retain_graph=True)
    (losses.adjusted.sum() / losses.labels).backward(inputs=[values, *entry])
    return values.grad


def _losses_by_part(losses: Losses, parts: Sequence[Part]) -> list[tuple[float, int]]:
    """Each device's mean loss and its count of labels."""
    sizes = [len(part.features) for part in parts]
    totals = [own.sum() for own in losses.total.detach().split(sizes)]
    counts = [int(own.sum()) for own in losses.counted.split(sizes)]
    return [
        (float(total) / max(count, 1), count) for total, count in zip(totals, counts, strict=True)
    ]


def _step_on_one(
    split_model: SplitModel,
    server_model: TrainableHalf,
    part: Part,
    seed: int,
    gradients: bool,
    result: StepResult,
    adjustments: LogitAdjustments = None,
) -> None:
    """One step of a server model on one device's features."""
    before = server_model.statistics()
    values, losses = _forward(
        split_model, server_model.weights, [part], seed, gradients, adjustments
    )
    ((loss, counted),) = _losses_by_part(losses, [part])
    if not np.isfinite(loss):
        server_model.forget(before)
        result.left_out[part.device] = "loss is not finite"
        return
    found = _feature_gradient(split_model, losses, values, server_model)
    server_model.step()
    (gradient,) = per_device(found, [part])
    result.add(part.device, gradient, loss, counted)
