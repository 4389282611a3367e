"""One round of split learning, for every method that has one: begin, iterate, end, and average the bottoms.

A device may vanish, or send what is not finite, at any exchange. Its features then leave the merge, the round goes on
with the others, and it is not asked again until the next round; what its exchanges cost has been counted by the fleet.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from fedspine.core.device import DeviceId, Work
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Reply, none_left
from fedspine.core.message import Tensors
from fedspine.core.tensors import finite, single
from fedspine.split import device as on_devices
from fedspine.split.device import Answered, Begin, Ended, Forwarded, Resized, Step
from fedspine.split.server import Outcome, Part, ServerStep
from fedspine.split.wire import Wired, gradient_wired, labels_unwired, unwired


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
    costs: list[Cost] = field(
        default_factory=list
    )  # of each exchange, the first with the weights among them

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
class Staggered:
    """How devices begin and end a round at times of their own, while the others go on. Ours."""

    enough: float  # share of the devices with whose first features the round starts; others join when theirs come
    leaving: Callable[
        [int, Mapping[DeviceId, Progress]], Collection[DeviceId]
    ]  # of these after so many iterations


@dataclass(frozen=True)
class Played:
    """How a round ended: the bottoms of the devices that stayed to the end, and how each of them fared."""

    bottoms: dict[DeviceId, Tensors]
    endings: dict[DeviceId, Tensors]  # U-shape: the last parts of the top, else empty
    progress: dict[DeviceId, Progress]

    @property
    def counted(self) -> dict[DeviceId, int]:
        """Labels of each device over all iterations; 1 each where none counted, so that all weigh alike."""
        each = {device: progress.counted for device, progress in self.progress.items()}
        return each if any(each.values()) else dict.fromkeys(each, 1)

    @property
    def loss(self) -> float:
        """The mean over all labels of the losses of each device's last iteration."""
        weights = self.counted
        weighed = sum(weights[device] * own.losses[-1] for device, own in self.progress.items())
        return weighed / sum(weights.values())


def play(
    fleet: Fleet,
    orders: Mapping[DeviceId, Begin],
    iterations: int,
    server: ServerStep,
    seed: int,
    works: Works = Works(),
    resizing: Resizing | None = None,
    staggered: Staggered | None = None,
) -> Played:
    """One round of these devices: `iterations` steps of the top and of every bottom.

    `resizing` may change batches between iterations; it is for devices without a loss of their own. With `staggered` some
    bottoms make fewer steps. Raises AllLost where no device is left.
    """
    game = Game(fleet, orders, seed)
    forwarded = game.asked(works.begin, orders, staggered.enough if staggered else 1.0)
    for iteration in range(iterations):
        parts = [part_of(reply) for reply in forwarded]
        told = game.counted(parts, server.step(parts, game.seed_of(iteration)))
        if iteration + 1 < iterations:
            if staggered:
                told = game.without(
                    staggered.leaving(iteration + 1, game.progress_of(told)), told, works.end
                )
            forwarded = game.forwarded(works.step, told, iteration + 1, resizing)
        if not forwarded:  # whoever is left has ended
            return game.over(works.end, {})
    return game.over(works.end, told)


class Game:
    """A round under way: who is still in it, and how each fares."""

    def __init__(self, fleet: Fleet, orders: Mapping[DeviceId, Any], seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self._places = {device: place for place, device in enumerate(orders)}
        self._precisions = {device: order.precision for device, order in orders.items()}
        self._progress = {device: Progress() for device in orders}
        self._under_way: set[DeviceId] = set()  # while the others went on
        self._ended: list[Reply[Ended]] = []

    def seed_of(self, iteration: int) -> int:
        """What fixes all that the server draws in an iteration."""
        return int(np.random.SeedSequence([self._seed, iteration]).generate_state(1)[0])

    def progress_of(self, devices: Collection[DeviceId]) -> dict[DeviceId, Progress]:
        """What became of these devices so far."""
        return {device: self._progress[device] for device in devices}

    def asked(
        self, work: Work[Any, Any], orders: Mapping[DeviceId, Any], enough: float = 1.0
    ) -> list[Reply[Any]]:
        """The replies without a flaw of a share `enough` of these devices, and of others that came meanwhile.

        Devices whose replies have one are noted and left out for the rest of the round. Raises AllLost where nobody is left.
        """
        if enough == 1 and not self._under_way:
            replies = self._fleet.ask(work, orders)
        else:
            self._send(work, orders)
            replies = self._heard(orders, math.ceil(enough * len(orders)))
        flaws = self._flaws(replies)
        usable = [reply for reply in replies if flaws[reply.device] is None]
        if not usable and not self._ended:
            raise none_left(len(orders), [flaw for flaw in flaws.values() if flaw is not None])
        return usable

    def without(
        self, leaving: Collection[DeviceId], told: Mapping[DeviceId, Step], end: Work[Step, Ended]
    ) -> dict[DeviceId, Step]:
        """What those are told that go on; the others are sent what ends the round for them."""
        self._send(end, {device: told[device] for device in leaving})
        return {device: own for device, own in told.items() if device not in leaving}

    def forwarded(
        self,
        step: Work[Step, Forwarded],
        told: Mapping[DeviceId, Step],
        done: int,
        resizing: Resizing | None,
    ) -> list[Reply[Forwarded]]:
        """The next features after `done` iterations, from batches as before or of other sizes."""
        resized = resizing and resizing(done, self.progress_of(told), told)
        replies = self.asked(on_devices.resize, resized) if resized else self.asked(step, told)
        self._ended += [reply for reply in replies if isinstance(reply.value, Ended)]
        return [reply for reply in replies if isinstance(reply.value, Forwarded)]

    def _send(self, work: Work[Any, Any], orders: Mapping[DeviceId, Any]) -> None:
        self._fleet.send(work, orders)
        self._under_way.update(orders)

    def _heard(self, wanted: Collection[DeviceId], enough: int) -> list[Reply[Any]]:
        """What comes until so many of the devices wanted have replied, or no reply is under way any more."""
        replies: list[Reply[Any]] = []
        while sum(reply.device in wanted for reply in replies) < enough:
            try:
                reply = self._fleet.next()
            except Idle:  # some were lost
                self._under_way.clear()
                break
            if reply.device in self._under_way:
                self._under_way.remove(reply.device)
                replies.append(reply)
        return sorted(replies, key=lambda reply: self._places[reply.device])

    def _flaws(self, replies: Sequence[Reply[Any]]) -> dict[DeviceId, str | None]:
        """What is wrong with each reply, noted; its cost counts all the same."""
        for reply in replies:
            self._progress[reply.device].costs.append(reply.cost)
        flaws = {reply.device: flaw(reply.value) for reply in replies}
        for device, found in flaws.items():
            if found is not None:
                self._fleet.note(device=device, left_out=found)
        return flaws

    def counted(self, parts: Sequence[Part], outcome: Outcome) -> dict[DeviceId, Step]:
        """Write an iteration of the server down; returns what each device that is still in it is told."""
        for device, why in outcome.left_out.items():
            self._fleet.note(device=device, left_out=why)
        if not outcome.losses:
            raise none_left(len(parts), list(outcome.left_out.values()))
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
            told[device] = Step(
                gradient=None if gradient is None else gradient_wired(gradient, precision)
            )
        return told

    def over(self, end: Work[Step, Ended], told: Mapping[DeviceId, Step]) -> Played:
        """How the round ended: these devices are asked for their bottoms, and whoever is under way is waited for."""
        together = not (self._ended or self._under_way)
        replies = self.asked(end, told) if told else []
        late = self._heard(self._progress, len(self._under_way))
        flaws = self._flaws(late)
        replies += [reply for reply in late if flaws[reply.device] is None]
        for reply in replies:
            if isinstance(reply.value, Forwarded):
                self._fleet.note(
                    device=reply.device, left_out="its first features came after the last step"
                )
        ended = self._ended + [reply for reply in replies if isinstance(reply.value, Ended)]
        if not ended:
            raise AllLost(f"of {len(self._progress)} devices none is left at the round's end")
        if (
            not together
        ):  # whoever left early goes among the others, whose order is that in which they were told
            ended.sort(key=lambda reply: self._places[reply.device])
        endings = {
            reply.device: single(reply.value.ending)
            for reply in ended
            if reply.value.ending is not None
        }
        return Played(
            bottoms={reply.device: single(reply.value.weights) for reply in ended},
            endings=endings,
            progress=self.progress_of([reply.device for reply in ended]),
        )


def part_of(reply: Reply[Forwarded]) -> Part:
    """What the server makes of a device's features."""
    assert reply.value.labels is not None
    return Part(
        device=reply.device,
        features=unwired(reply.value.features),
        labels=labels_unwired(reply.value.labels),
    )


def flaw(value: Forwarded | Answered | Ended) -> str | None:
    """What is wrong with what came from a device, None where nothing is."""
    match value:
        case Ended():
            sound = finite(value.weights) and (value.ending is None or finite(value.ending))
            return None if sound else "weights are not finite"
        case Forwarded():
            return None if _sound(value.features) else "features are not finite"
    if not math.isfinite(value.loss):
        return f"loss is {value.loss}"
    return None if _sound(value.gradient) else "its gradient is not finite"


def _sound(sent: Wired) -> bool:
    return finite(
        {"values": sent.values}
        if sent.scale is None
        else {"values": sent.values, "scale": sent.scale}
    )
