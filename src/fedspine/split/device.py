"""The device's side of split learning: one ask per iteration, which applies the last gradient and gives the next features.

`begin` installs a bottom and gives the first features, `step` goes on, `end` applies the last gradient and returns the
bottom. In the U-shape labels never leave: `answer` turns what the server's part gave into its gradient.

Between asks a device remembers weights, optimiser state and which rows are under way, not the graph that a gradient runs
back through: that is computed again, to the same bits, unless this process still has it (`Device.keep`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedspine.core.device import Device, on_device
from fedspine.core.message import Tensors, message
from fedspine.core.tensors import half, single
from fedspine.lm.base import Base
from fedspine.nets.net import Net
from fedspine.split.batches import Budget, drawn
from fedspine.split.cut import halves_of
from fedspine.split.interface import Features, Halves
from fedspine.split.trainable_half import Optimising, Trained
from fedspine.split.wire import Precision, Wired, gradient_wired, labels_wired, unwired, wired

HELD = "split"  # the name in a device's memory
FORWARD = (
    1 / 3
)  # of the operations of a training step; the backward pass takes the rest, when its gradient comes

# a loss of the device's own, of (its weights, its features, the batch), which is added to what the server's gradient says
Local: TypeAlias = Callable[[Tensors, Features, Tensors], Tensor]


@message
class Cutting:
    """Where the model is cut and what its adapters are, for `halves_of`."""

    cut: int
    rank: int = 8
    scale: float = 2.0

    def of(self, base: Base | Net) -> Halves:
        """The halves of this model."""
        return halves_of(base, self.cut, rank=self.rank, scale=self.scale)


@message
class Begin:
    """Install this bottom, take batches of `batch` rows (all of the data where there are fewer), give the first."""

    weights: Tensors  # of the bottom: fp32 with features in fp32, else fp16
    cutting: Cutting
    batch: int | Budget
    optimising: Optimising
    precision: str  # of features and gradients
    ending: "Tensors | None" = (
        None  # U-shape: the last part of the top, which stays here with the labels
    )
    ending_optimising: Optimising | None = None


@message
class Step:
    """The gradient of the mean loss over the batch's labels with respect to its features; None where none is needed."""

    gradient: Wired | None


@message
class Resized:
    """A step, and how many rows the batches after it have, or tokens."""

    step: Step
    batch: int | Budget
    optimising: Optimising | None = None  # from now on, where it changes with the batch


@message
class Forwarded:
    """A batch's features, and its labels unless they stay."""

    features: Wired
    labels: Tensor | None


@message
class Answer:
    """What the server's part gave for the batch under way (U-shape)."""

    features: Wired


@message
class Answered:
    """The gradient of the batch's summed loss with respect to what came, and that loss."""

    gradient: Wired
    loss: float  # mean over the batch's labels
    counted: int  # labels


@message
class Ended:
    """The bottom after the round (U-shape: the last part of the top too)."""

    weights: Tensors
    ending: "Tensors | None"


@message
class Held:
    """What a device remembers within a round."""

    weights: Tensors
    moments: Tensors
    order: Begin  # without weights
    seed: int  # of the round's rows and of what is drawn
    iteration: int  # of the batch under way
    rows: np.ndarray  # int64: that batch
    taken: int  # with `left`, what fixes the next one, as `Drawn` says
    left: np.ndarray
    ending: "Tensors | None" = None
    ending_moments: "Tensors | None" = None


@dataclass
class Live:
    """A held state at work."""

    halves: Halves
    held: Held
    bottom: Trained
    features: Features  # of the batch under way, with their graph
    labels: Tensor
    local: Tensor | None  # the device's own loss of it


@on_device
def begin(device: Device, order: Begin) -> Forwarded:
    return begun(device, order)


@on_device
def step(device: Device, order: Step) -> Forwarded:
    return stepped(device, order)


@on_device
def resize(device: Device, order: Resized) -> Forwarded:
    live = resumed(device, None)
    _apply(device, live, order.step)
    held, bottom = live.held, live.bottom
    optimising = order.optimising or held.order.optimising
    if order.optimising is not None:
        bottom = Trained(bottom.now(), optimising, live.halves.statistics, bottom.moments())
    held = replace(held, order=replace(held.order, batch=order.batch, optimising=optimising))
    return _forward(device, live.halves, _next(device, held), bottom, None)


@on_device
def end(device: Device, order: Step) -> Ended:
    return ended(device, order)


@on_device
def answer(device: Device, order: Answer) -> Answered:
    live = resumed(device, None)
    held = live.held
    assert held.ending is not None
    assert held.order.ending_optimising is not None
    ending = Trained(
        held.ending, held.order.ending_optimising, live.halves.statistics, held.ending_moments
    )
    arrived = unwired(order.features, live.features.mask)
    values = arrived.values.requires_grad_()
    entered = Features(values=values, mask=arrived.mask)
    losses = live.halves.ending(ending.weights, entered, live.labels, seed=_drawing(held))
    # the server weighs all devices' labels alike, so it gets the sum's gradient; the own part learns from the own mean
    gradient, *rest = torch.autograd.grad(losses.total.sum(), [values, *ending.leaves])
    for leaf, found in zip(ending.leaves, rest, strict=True):
        leaf.grad = found / losses.labels
    ending.step()
    live.held = replace(held, ending=ending.now(), ending_moments=ending.moments())
    _remember(device, live)
    sent = gradient_wired(Features(values=gradient, mask=arrived.mask), _precision(held))
    return Answered(
        gradient=sent, loss=float(losses.mean.detach()), counted=int(losses.counted.sum())
    )


# --- the same with a loss of the device's own, for methods that have one ---


def begun(device: Device, order: Begin, local: Local | None = None) -> Forwarded:
    """Do what `begin` does; `local` must be the same function in all asks of a round."""
    halves = order.cutting.of(device.base)
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
    bottom = Trained(single(order.weights), order.optimising, halves.statistics)
    return _forward(device, halves, held, bottom, local)


def stepped(device: Device, order: Step, local: Local | None = None) -> Forwarded:
    """Do what `step` does."""
    live = resumed(device, local)
    _apply(device, live, order)
    return _forward(device, live.halves, _next(device, live.held), live.bottom, local)


def ended(device: Device, order: Step, local: Local | None = None) -> Ended:
    """Do what `end` does."""
    live = resumed(device, local)
    _apply(device, live, order)
    del device.memory[HELD]
    send = _as_sent(_precision(live.held))
    ending = live.held.ending
    return Ended(weights=send(live.bottom.now()), ending=None if ending is None else send(ending))


def resumed(device: Device, local: Local | None) -> Live:
    """The batch under way with its graph: as this process kept it, or computed again."""
    if isinstance(device.kept, Live):
        return device.kept
    held: Held = device.memory[HELD]
    halves = held.order.cutting.of(device.base)
    bottom = Trained(held.weights, held.order.optimising, halves.statistics, held.moments)
    # statistics have seen this batch before
    return _live(device, halves, held, bottom, bottom.without_statistics(), local)


def _forward(
    device: Device, halves: Halves, held: Held, bottom: Trained, local: Local | None
) -> Forwarded:
    """The next batch's features, remembered together with the state that gave them."""
    live = _live(device, halves, held, bottom, bottom.weights, local)
    _remember(device, live)
    rows, tokens = len(live.features), _tokens(live.features)
    device.spend(
        flops=FORWARD * halves.flops("bottom", rows, tokens),
        memory_bytes=halves.memory_bytes("bottom", rows, tokens),
        samples=rows,
    )
    labels = None if held.ending is not None else labels_wired(live.labels)
    return Forwarded(features=wired(live.features, _precision(held)), labels=labels)


def _live(
    device: Device,
    halves: Halves,
    held: Held,
    bottom: Trained,
    weights: Tensors,
    local: Local | None,
) -> Live:
    inputs = device.data.batch(held.rows)
    features = halves.bottom(weights, inputs, seed=_drawing(held))
    own = None if local is None else local(weights, features, inputs)
    return Live(halves, held, bottom, features, inputs["labels"], own)


def _apply(device: Device, live: Live, order: Step) -> None:
    """One step of the bottom with the gradient that came for the batch under way."""
    if order.gradient is not None and live.features.values.requires_grad:
        values = live.features.values
        arrived = unwired(order.gradient, live.features.mask).values.to(values)
        if live.local is None:
            values.backward(arrived)
        else:
            torch.autograd.backward([values, live.local], [arrived, None])
        live.bottom.step()
    rows, tokens = len(live.features), _tokens(live.features)
    device.spend(
        flops=(1 - FORWARD) * live.halves.flops("bottom", rows, tokens),
        launches=live.halves.launches("bottom"),
    )


def _next(device: Device, held: Held) -> Held:
    """What is held of the batch after the one under way."""
    following = drawn(device.data.lengths, held.order.batch, held.seed, held.taken, held.left)
    return replace(
        held,
        iteration=held.iteration + 1,
        rows=following.rows,
        taken=following.taken,
        left=following.left,
    )


def _remember(device: Device, live: Live) -> None:
    live.held = replace(live.held, weights=live.bottom.now(), moments=live.bottom.moments())
    device.memory[HELD] = live.held
    rows, tokens = len(live.features), _tokens(live.features)
    needs = live.halves.memory_bytes
    device.keep(live, max(0, needs("bottom", rows, tokens) - needs("bottom", 0, tokens)))


def _drawing(held: Held) -> int:
    """What fixes the dropout of the batch under way."""
    return int(np.random.SeedSequence([held.seed, held.iteration]).generate_state(1)[0])


def _tokens(features: Features) -> int:
    return 1 if features.mask is None else features.mask.shape[1]


def _precision(held: Held) -> Precision:
    return held.order.precision  # type: ignore[return-value]


def _as_sent(precision: str) -> Callable[[Tensors], Tensors]:
    return (lambda weights: weights) if precision == "fp32" else half
