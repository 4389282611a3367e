"""One round of split learning, for every method that has one: begin, iterate, end, and average the bottoms.

A device may vanish, or send what is not finite, at any exchange. Its features then leave the merge, the round goes on
with the others, and it is not asked again until the next round; what its exchanges cost has been counted by the fleet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from fedspine.device import DeviceId, Work
from fedspine.fleet import AllLost, Cost, Fleet, Reply
from fedspine.message import Tensors
from fedspine.split import device as on_devices
from fedspine.split.device import Answered, Begin, Ended, Forwarded, Resized, Step
from fedspine.split.server import Outcome, Part, ServerStep
from fedspine.split.wire import Wired, gradient_wired, labels_unwired, unwired
from fedspine.tensors import finite, single


@dataclass(frozen=True)
class Works:
    """What devices are asked to do; a method with a loss of its own on devices brings its own."""

    begin: Work[Begin, Forwarded] = on_devices.begin
    step: Work[Step, Forwarded] = on_devices.step
    end: Work[Step, Ended] = on_devices.end


@dataclass
class Progress:
    """What became of one device in a round."""

    rows: list[int] = field(default_factory=list)  # of each iteration
    tokens: list[int] = field(default_factory=list)  # 1 for each row of arrays
    counted: int = 0  # labels over all iterations
    losses: list[float] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)  # of each exchange, the first with the weights among them

    @property
    def seconds(self) -> list[float]:
        return [cost.seconds for cost in self.costs]

    @property
    def batch(self) -> int:
        """Rows of the last iteration."""
        return self.rows[-1]

    @property
    def row_seconds(self) -> float:
        """Seconds of one row in one iteration, compute and transfer.

        Of the exchanges between the first and the last, which also carry weights, if there are any.
        """
        inner = self.seconds[1:-1]
        return (float(np.mean(inner)) if inner else sum(self.seconds)) / float(np.mean(self.rows))


# what devices are told after so many iterations if their batches are to change, from what became of them and the steps
# that they would be told; None: batches stay as they are
Resizing: TypeAlias = Callable[
    [int, Mapping[DeviceId, Progress], Mapping[DeviceId, Step]], Mapping[DeviceId, Resized] | None
]


@dataclass(frozen=True)
class Played:
    """How a round ended: the bottoms of the devices that stayed to the end, and how each of them fared."""

    bottoms: dict[DeviceId, Tensors]
    endings: dict[DeviceId, Tensors]  # U-shape: the last parts of the top, else empty
    progress: dict[DeviceId, Progress]

    @property
    def loss(self) -> float:
        """The mean over all labels of the last iteration's losses."""
        each = [(p.counted, p.losses[-1]) for p in self.progress.values()]
        return sum(counted * loss for counted, loss in each) / sum(counted for counted, _ in each)


def play(
    fleet: Fleet,
    orders: Mapping[DeviceId, Begin],
    iterations: int,
    server: ServerStep,
    seed: int,
    works: Works = Works(),
    resizing: Resizing | None = None,
) -> Played:
    """One round of these devices: `iterations` steps of the top and of every bottom.

    `resizing` may change batches between iterations; it is for devices without a loss of their own. Raises AllLost
    where no device is left.
    """
    game = Game(fleet, orders, seed)
    forwarded = game.asked(works.begin, orders, sound_features)
    for iteration in range(iterations):
        parts = [part_of(reply) for reply in forwarded]
        gradients = game.counted(parts, server.step(parts, game.seed_of(iteration)))
        if iteration + 1 < iterations:
            forwarded = game.forwarded(works.step, gradients, iteration + 1, resizing)
    return game.over(game.asked(works.end, gradients, sound_weights))


class Game:
    """A round under way: who is still in it, and how each fares."""

    def __init__(self, fleet: Fleet, orders: Mapping[DeviceId, Any], seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self._precisions = {device: order.precision for device, order in orders.items()}
        self._progress = {device: Progress() for device in orders}

    def seed_of(self, iteration: int) -> int:
        """What fixes all that the server draws in an iteration."""
        return int(np.random.SeedSequence([self._seed, iteration]).generate_state(1)[0])

    def asked(
        self, work: Work[Any, Any], orders: Mapping[DeviceId, Any], flaw: Callable[[Any], str | None]
    ) -> list[Reply[Any]]:
        """The replies without a flaw; others are noted and left out for the rest of the round."""
        replies = self._fleet.ask(work, orders)
        for reply in replies:
            self._progress[reply.device].costs.append(reply.cost)
        flaws = {reply.device: flaw(reply.value) for reply in replies}
        for device, found in flaws.items():
            if found is not None:
                self._fleet.note(device=device, left_out=found)
        sound = [reply for reply in replies if flaws[reply.device] is None]
        if not sound:
            raise AllLost(f"of {len(orders)} devices asked, {len(replies)} replied and none can be used")
        return sound

    def forwarded(
        self,
        step: Work[Step, Forwarded],
        told: Mapping[DeviceId, Step],
        done: int,
        resizing: Resizing | None,
    ) -> list[Reply[Forwarded]]:
        """The next features after `done` iterations, from batches as before or of other sizes."""
        resized = resizing and resizing(done, {device: self._progress[device] for device in told}, told)
        if resized:
            return self.asked(on_devices.resize, resized, sound_features)
        return self.asked(step, told, sound_features)

    def counted(self, parts: Sequence[Part], outcome: Outcome) -> dict[DeviceId, Step]:
        """Write an iteration of the server down; returns what each device that is still in it is told."""
        for device, why in outcome.left_out.items():
            self._fleet.note(device=device, left_out=why)
        if not outcome.losses:
            raise AllLost(f"of {len(parts)} devices' features none can be used")
        for part in parts:
            if part.device in outcome.losses:
                self._count(part, outcome)
        return self._told(outcome)

    def _count(self, part: Part, outcome: Outcome) -> None:
        progress = self._progress[part.device]
        progress.rows.append(len(part.features))
        progress.tokens.append(part.features.tokens)
        progress.counted += outcome.counted[part.device]
        progress.losses.append(outcome.losses[part.device])

    def _told(self, outcome: Outcome) -> dict[DeviceId, Step]:
        told = {}
        for device, gradient in outcome.gradients.items():
            precision = self._precisions[device]
            told[device] = Step(gradient=None if gradient is None else gradient_wired(gradient, precision))
        return told

    def over(self, ended: Sequence[Reply[Ended]]) -> Played:
        endings = {reply.device: single(reply.value.ending) for reply in ended if reply.value.ending is not None}
        return Played(
            bottoms={reply.device: single(reply.value.weights) for reply in ended},
            endings=endings,
            progress={reply.device: self._progress[reply.device] for reply in ended},
        )


def part_of(reply: Reply[Forwarded]) -> Part:
    """What the server makes of a device's features."""
    assert reply.value.labels is not None
    return Part(device=reply.device, features=unwired(reply.value.features), labels=labels_unwired(reply.value.labels))


def sound_features(value: Forwarded) -> str | None:
    """What is wrong with the features that came, None where nothing is."""
    return None if _sound(value.features) else "features are not finite"


def sound_weights(value: Ended) -> str | None:
    """What is wrong with the weights that came, None where nothing is."""
    sound = finite(value.weights) and (value.ending is None or finite(value.ending))
    return None if sound else "weights are not finite"


def sound_gradient(value: Answered) -> str | None:
    """What is wrong with a device's answer in the U-shape."""
    if not math.isfinite(value.loss):
        return f"loss is {value.loss}"
    return None if _sound(value.gradient) else "its gradient is not finite"


def _sound(sent: Wired) -> bool:
    return finite({"values": sent.values} if sent.scale is None else {"values": sent.values, "scale": sent.scale})
