"""One round of split learning, for every method that has one: begin, iterate, end.

A device may vanish, or send what cannot be used, at any exchange. Its features then leave the
merge, the round goes on with the others, and it is not asked again until the next round. The fleet
counts what its exchanges cost.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from fedspine.core.device import DeviceId, Work
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Reply, none_left
from fedspine.core.message import Tensors
from fedspine.core.tensors import single
from fedspine.split import device as on_devices
from fedspine.split.interface import seed_at
from fedspine.split.merged_batch import Part
from fedspine.split.messages import Begin, Ended, Forwarded, Resized, Step
from fedspine.split.server import ServerStep, StepResult
from fedspine.split.wire import gradient_wired, labels_unwired, unwired


@dataclass(frozen=True)
class DeviceWork:
    """What devices are asked to do; a method with a local loss brings its own."""

    begin: Work[Begin, Forwarded] = on_devices.begin
    step: Work[Step, Forwarded] = on_devices.step
    end: Work[Step, Ended] = on_devices.end


@dataclass
class Progress:
    """What one device has done in a round."""

    rows: list[int] = field(default_factory=list)  # of each iteration
    tokens: list[int] = field(default_factory=list)  # 1 for each row of arrays
    counted: int = 0  # labels over all iterations
    losses: list[float] = field(default_factory=list)
    # of each exchange; the first and the last one carry weights too
    costs: list[Cost] = field(default_factory=list)

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

        From the exchanges that carry no weights, if there are any.
        """
        inner = self.seconds[1:-1]
        return (float(np.mean(inner)) if inner else sum(self.seconds)) / float(np.mean(self.rows))


# (iterations done, progress of these devices, their next steps) -> the steps with new batch sizes;
# None: no change
Resizing: TypeAlias = Callable[
    [int, Mapping[DeviceId, Progress], Mapping[DeviceId, Step]], Mapping[DeviceId, Resized] | None
]


@dataclass(frozen=True)
class Staggered:
    """Devices begin and end a round at their own times, while the others go on. Ours."""

    quorum: (
        float  # share of the devices with whose first features the round starts; others join later
    )
    # (iterations done, progress) -> the devices that end the round now
    leaving: Callable[[int, Mapping[DeviceId, Progress]], Collection[DeviceId]]


@dataclass(frozen=True)
class RoundResult:
    """The result of a round: one entry for each device that completed it."""

    client_models: dict[DeviceId, Tensors]
    endings: dict[DeviceId, Tensors]  # U-shape: the last parts of the server model, else empty
    progress: dict[DeviceId, Progress]

    @property
    def counted(self) -> dict[DeviceId, int]:
        """Labels of each device over all iterations; 1 each where none counted, so that all weigh
        alike.
        """
        each = {device: progress.counted for device, progress in self.progress.items()}
        return each if any(each.values()) else dict.fromkeys(each, 1)

    @property
    def loss(self) -> float:
        """The mean over all labels of the losses of each device's last iteration."""
        weights = self.counted
        weighed = sum(weights[device] * own.losses[-1] for device, own in self.progress.items())
        return weighed / sum(weights.values())


def run_round(
    fleet: Fleet,
    orders: Mapping[DeviceId, Begin],
    iterations: int,
    server: ServerStep,
    seed: int,
    work: DeviceWork = DeviceWork(),
    resizing: Resizing | None = None,
    staggered: Staggered | None = None,
) -> RoundResult:
    """One round of these devices: `iterations` steps of the server model and of every client model.

    `resizing` may change batch sizes between iterations; it is for devices without a local loss.
    With `staggered` some client models make fewer steps. Raises AllLost where no device is left.
    """
    current = SplitRound(fleet, orders, seed)
    replies = current.ask(work.begin, orders, staggered.quorum if staggered else 1.0)
    for iteration in range(iterations):
        parts = [part_of(reply) for reply in replies]
        steps = current.record(parts, server.step(parts, current.seed_of(iteration)))
        done = iteration + 1
        if done < iterations:
            if staggered:
                leaving = staggered.leaving(done, current.progress_of(steps))
                steps = current.end_early(leaving, steps, work.end)
            replies = current.next_features(work.step, steps, done, resizing)
        if not replies:  # all devices that are left have ended
            return current.finish(work.end, {})
    return current.finish(work.end, steps)


class SplitRound:
    """A round in progress: which devices take part, and what each has done."""

    def __init__(self, fleet: Fleet, orders: Mapping[DeviceId, Any], seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self._places = {device: place for place, device in enumerate(orders)}
        self._precisions = {device: order.precision for device, order in orders.items()}
        self._progress = {device: Progress() for device in orders}
        self._pending: set[DeviceId] = set()  # asked, without a reply yet, while the others go on
        self._ended: list[Reply[Ended]] = []

    def seed_of(self, iteration: int) -> int:
        """The seed of all random draws of the server in an iteration."""
        return seed_at(self._seed, iteration)

    def progress_of(self, devices: Collection[DeviceId]) -> dict[DeviceId, Progress]:
        """What these devices have done so far."""
        return {device: self._progress[device] for device in devices}

    def ask(
        self, work: Work[Any, Any], orders: Mapping[DeviceId, Any], quorum: float = 1.0
    ) -> list[Reply[Any]]:
        """The replies of a share `quorum` of these devices, and others that arrived meanwhile.

        A device without a usable reply is left out for the rest of the round. Raises AllLost where
        nobody is left.
        """
        if quorum == 1 and not self._pending:
            replies = self._fleet.ask(work, orders)
        else:
            self._send(work, orders)
            replies = self._collect(orders, math.ceil(quorum * len(orders)))
        self._count_costs(replies)
        if not replies and not self._ended:
            unusable = self._fleet.unusable
            raise none_left(len(orders), [unusable[id] for id in orders if id in unusable])
        return replies

    def end_early(
        self, leaving: Collection[DeviceId], steps: Mapping[DeviceId, Step], end: Work[Step, Ended]
    ) -> dict[DeviceId, Step]:
        """Send the last step to devices that leave; returns the steps of the others."""
        self._send(end, {device: steps[device] for device in leaving})
        return {device: own for device, own in steps.items() if device not in leaving}

    def next_features(
        self,
        step: Work[Step, Forwarded],
        steps: Mapping[DeviceId, Step],
        done: int,
        resizing: Resizing | None,
    ) -> list[Reply[Forwarded]]:
        """The next features after `done` iterations, from batches of the same or of new sizes."""
        resized = resizing and resizing(done, self.progress_of(steps), steps)
        replies = self.ask(on_devices.resize, resized) if resized else self.ask(step, steps)
        self._ended += [reply for reply in replies if isinstance(reply.value, Ended)]
        return [reply for reply in replies if isinstance(reply.value, Forwarded)]

    def record(self, parts: Sequence[Part], result: StepResult) -> dict[DeviceId, Step]:
        """Record one iteration of the server; returns the next step of each device that is still in
        the round.
        """
        for device, why in result.left_out.items():
            self._fleet.note(device=device, left_out=why)
        if not result.losses:
            raise none_left(len(parts), list(result.left_out.values()))
        for part in parts:
            if part.device in result.losses:
                progress = self._progress[part.device]
                progress.rows.append(len(part.features))
                progress.tokens.append(part.features.tokens)
                progress.counted += result.counted[part.device]
                progress.losses.append(result.losses[part.device])
        return {
            device: Step(
                gradient=None
                if gradient is None
                else gradient_wired(gradient, self._precisions[device])
            )
            for device, gradient in result.gradients.items()
        }

    def finish(self, end: Work[Step, Ended], steps: Mapping[DeviceId, Step]) -> RoundResult:
        """Ask these devices for their client models, and wait for all replies that are still
        pending.
        """
        together = not (self._ended or self._pending)
        replies = self.ask(end, steps) if steps else []
        late = self._collect(self._progress, len(self._pending))
        self._count_costs(late)
        replies += late
        for reply in replies:
            if isinstance(reply.value, Forwarded):
                self._fleet.note(
                    device=reply.device, left_out="its first features arrived after the last step"
                )
        ended = self._ended + [reply for reply in replies if isinstance(reply.value, Ended)]
        if not ended:
            raise AllLost(
                f"none of the {len(self._progress)} devices is left at the end of the round"
            )
        if not together:  # devices that left early take their place in the order of the orders
            ended.sort(key=lambda reply: self._places[reply.device])
        return RoundResult(
            client_models={reply.device: single(reply.value.weights) for reply in ended},
            endings={
                reply.device: single(reply.value.ending)
                for reply in ended
                if reply.value.ending is not None
            },
            progress=self.progress_of([reply.device for reply in ended]),
        )

    def _send(self, work: Work[Any, Any], orders: Mapping[DeviceId, Any]) -> None:
        self._fleet.send(work, orders)
        self._pending.update(orders)

    def _collect(self, wanted: Collection[DeviceId], enough: int) -> list[Reply[Any]]:
        """The replies that arrive until enough of the wanted devices have replied, or none is
        pending.
        """
        replies: list[Reply[Any]] = []
        while sum(reply.device in wanted for reply in replies) < enough:
            try:
                reply = self._fleet.next()
            except Idle:  # some were lost
                self._pending.clear()
                break
            if reply.device in self._pending:
                self._pending.remove(reply.device)
                replies.append(reply)
        return sorted(replies, key=lambda reply: self._places[reply.device])

    def _count_costs(self, replies: Sequence[Reply[Any]]) -> None:
        for reply in replies:
            self._progress[reply.device].costs.append(reply.cost)


def part_of(reply: Reply[Forwarded]) -> Part:
    """A device's part of an iteration, from its reply; without labels in the U-shape."""
    labels = reply.value.labels
    return Part(
        device=reply.device,
        features=unwired(reply.value.features),
        labels=None if labels is None else labels_unwired(labels),
    )
