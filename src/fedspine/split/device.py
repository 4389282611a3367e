"""The device's side of split learning: each ask applies the last gradient and returns the next
features.

`begin` installs a client model and returns the first features, `step` goes on, `end` applies the
last gradient and returns the client model. In the U-shape labels never leave: `answer` returns the
gradient of the middle's output.

Between asks a device remembers weights, optimiser state and the rows of the current batch, but no
graph. The graph is computed again, to the same bits, unless this process still has it
(`Device.keep`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedspine.core.checks import Unusable, need
from fedspine.core.device import Device, on_device
from fedspine.core.message import Tensors, message
from fedspine.core.tensors import single
from fedspine.split.batches import drawn
from fedspine.split.interface import Features, SplitModel, seed_at
from fedspine.split.messages import Answer, Answered, Begin, Ended, Forwarded, Resized, Step
from fedspine.split.trainable_half import TrainableHalf
from fedspine.split.wire import (
    Wired,
    WirePrecision,
    gradient_wired,
    labels_wired,
    unwired,
    weights_wired,
    wired,
)

HELD = "split"  # the name in a device's memory
# of the operations of a training step; the backward pass takes the rest, once its gradient arrives
FORWARD = 1 / 3

# (weights, features, batch) -> a loss whose gradient is added to the server's
LocalLoss: TypeAlias = Callable[[Tensors, Features, Tensors], Tensor]


@message
class Held:
    """What a device remembers within a round."""

    weights: Tensors
    moments: Tensors
    order: Begin  # without weights
    seed: int  # of the round's rows and of what is drawn
    iteration: int  # of the current batch
    rows: np.ndarray  # int64: that batch
    taken: int  # with `left`, what fixes the next one, as `Drawn` says
    left: np.ndarray
    ending: "Tensors | None" = None
    ending_moments: "Tensors | None" = None


@dataclass
class ActiveBatch:
    """The current batch with its graph."""

    split_model: SplitModel
    held: Held
    client_model: TrainableHalf
    features: Features  # with their graph
    labels: Tensor
    local_loss: Tensor | None  # the device's own loss of it


@on_device
def begin(device: Device, order: Begin) -> Forwarded:
    return begun(device, order)


@on_device
def step(device: Device, order: Step) -> Forwarded:
    return stepped(device, order)


@on_device
def resize(device: Device, order: Resized) -> Forwarded:
    active = resumed(device, None)
    _apply_gradient(device, active, order.step)
    held, client_model = active.held, active.client_model
    optimising = order.optimising or held.order.optimising
    if order.optimising is not None:
        client_model = TrainableHalf(
            client_model.now(), optimising, active.split_model.statistics, client_model.moments()
        )
    held = replace(held, order=replace(held.order, batch=order.batch, optimising=optimising))
    return _forward(device, active.split_model, _next_batch(device, held), client_model, None)


@on_device
def end(device: Device, order: Step) -> Ended:
    return ended(device, order)


@on_device
def answer(device: Device, order: Answer) -> Answered:
    active = resumed(device, None)
    held = active.held
    device.uses(held.rows)
    if held.ending is None or held.order.ending_optimising is None:
        raise Unusable("got the middle's output, but labels and ending are not on this device")
    ending = TrainableHalf(
        held.ending,
        held.order.ending_optimising,
        active.split_model.statistics,
        held.ending_moments,
    )
    arrived = _arrived_features(order.features, active.features)
    values = arrived.values.requires_grad_()
    entered = Features(values=values, mask=arrived.mask)
    losses = active.split_model.ending_forward(
        ending.weights, entered, active.labels, seed=_dropout_seed(held)
    )
    # the server weighs all labels alike, so it gets the sum's gradient; the own part learns from
    # the own mean
    gradient, *rest = torch.autograd.grad(losses.total.sum(), [values, *ending.leaves])
    for leaf, found in zip(ending.leaves, rest, strict=True):
        leaf.grad = found / losses.labels
    ending.step()
    active.held = replace(held, ending=ending.now(), ending_moments=ending.moments())
    _remember(device, active)
    sent = gradient_wired(Features(values=gradient, mask=arrived.mask), _precision(held))
    return Answered(
        gradient=sent, loss=float(losses.mean.detach()), counted=int(losses.counted.sum())
    )


# --- the same with a local loss, for methods that have one ---


def begun(device: Device, order: Begin, local_loss: LocalLoss | None = None) -> Forwarded:
    """Do what `begin` does; `local_loss` must be the same function in all asks of a round."""
    split_model = order.cutting.of(device.base)
    seed = int(device.rng.integers(2**31))
    first = drawn(device.data.lengths, order.batch, seed)
    held = Held(
        weights={},
        moments={},
        order=replace(order, weights={}, ending=None),
        seed=seed,
        iteration=0,
        rows=first.rows,
        taken=first.taken,
        left=first.left,
        ending=None if order.ending is None else single(order.ending),
    )
    client_model = TrainableHalf(single(order.weights), order.optimising, split_model.statistics)
    return _forward(device, split_model, held, client_model, local_loss)


def stepped(device: Device, order: Step, local_loss: LocalLoss | None = None) -> Forwarded:
    """Do what `step` does."""
    active = resumed(device, local_loss)
    _apply_gradient(device, active, order)
    return _forward(
        device,
        active.split_model,
        _next_batch(device, active.held),
        active.client_model,
        local_loss,
    )


def ended(device: Device, order: Step, local_loss: LocalLoss | None = None) -> Ended:
    """Do what `end` does."""
    active = resumed(device, local_loss)
    device.uses(active.held.rows)
    _apply_gradient(device, active, order)
    del device.memory[HELD]
    precision, ending = _precision(active.held), active.held.ending
    return Ended(
        weights=weights_wired(active.client_model.now(), precision),
        ending=None if ending is None else weights_wired(ending, precision),
    )


def resumed(device: Device, local_loss: LocalLoss | None) -> ActiveBatch:
    """The current batch with its graph: as this process kept it, or computed again."""
    if isinstance(device.kept, ActiveBatch):
        return device.kept
    held: Held | None = device.memory.get(HELD)
    if held is None:
        raise Unusable("got a step before the first order of a round")
    split_model = held.order.cutting.of(device.base)
    client_model = TrainableHalf(
        held.weights, held.order.optimising, split_model.statistics, held.moments
    )
    # statistics have seen this batch before
    return _compute_batch(
        device, split_model, held, client_model, client_model.without_statistics(), local_loss
    )


def _forward(
    device: Device,
    split_model: SplitModel,
    held: Held,
    client_model: TrainableHalf,
    local_loss: LocalLoss | None,
) -> Forwarded:
    """The next batch's features, remembered together with the state that gave them."""
    device.uses(held.rows)
    active = _compute_batch(
        device, split_model, held, client_model, client_model.weights, local_loss
    )
    _remember(device, active)
    rows, tokens = len(active.features), _tokens(active.features)
    device.spend(
        flops=FORWARD * split_model.flops("client", rows, tokens),
        memory_bytes=split_model.memory_bytes("client", rows, tokens),
        samples=rows,
    )
    labels = None if held.ending is not None else labels_wired(active.labels)
    return Forwarded(features=wired(active.features, _precision(held)), labels=labels)


def _compute_batch(
    device: Device,
    split_model: SplitModel,
    held: Held,
    client_model: TrainableHalf,
    weights: Tensors,
    local_loss: LocalLoss | None,
) -> ActiveBatch:
    inputs = device.data.batch(held.rows)
    features = split_model.client_forward(weights, inputs, seed=_dropout_seed(held))
    own = None if local_loss is None else local_loss(weights, features, inputs)
    return ActiveBatch(split_model, held, client_model, features, inputs["labels"], own)


def _apply_gradient(device: Device, active: ActiveBatch, order: Step) -> None:
    """One step of the client model with the gradient that came for the current batch."""
    if order.gradient is not None and active.features.values.requires_grad:
        values = active.features.values
        arrived = _arrived_features(order.gradient, active.features).values.to(values)
        if active.local_loss is None:
            values.backward(arrived)
        else:
            torch.autograd.backward([values, active.local_loss], [arrived, None])
        active.client_model.step()
    rows, tokens = len(active.features), _tokens(active.features)
    device.spend(
        flops=(1 - FORWARD) * active.split_model.flops("client", rows, tokens),
        launches=active.split_model.launches("client"),
    )


def _arrived_features(sent: Wired, of: Features) -> Features:
    """What arrived for these features, in their shape; raises Unusable if it has other rows or
    tokens.
    """
    there = len(of.values) if of.mask is None else int(of.mask.sum())
    need(len(sent.values) == there, f"expected {there} rows or tokens, got {len(sent.values)}")
    need(sent.mask is None, "got a mask for a batch that has one already")
    return unwired(sent, of.mask)


def _next_batch(device: Device, held: Held) -> Held:
    """The memory with the next batch."""
    following = drawn(device.data.lengths, held.order.batch, held.seed, held.taken, held.left)
    return replace(
        held,
        iteration=held.iteration + 1,
        rows=following.rows,
        taken=following.taken,
        left=following.left,
    )


def _remember(device: Device, active: ActiveBatch) -> None:
    active.held = replace(
        active.held, weights=active.client_model.now(), moments=active.client_model.moments()
    )
    device.memory[HELD] = active.held
    rows, tokens = len(active.features), _tokens(active.features)
    needs = active.split_model.memory_bytes
    device.keep(active, max(0, needs("client", rows, tokens) - needs("client", 0, tokens)))


def _dropout_seed(held: Held) -> int:
    """The seed of the current batch's dropout."""
    return seed_at(held.seed, held.iteration)


def _tokens(features: Features) -> int:
    return 1 if features.mask is None else features.mask.shape[1]


def _precision(held: Held) -> WirePrecision:
    return held.order.precision  # type: ignore[return-value]
