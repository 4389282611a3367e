"""The U-shape of split learning: labels and the last part of the top stay on the devices, the server has the middle.

An iteration takes two exchanges: features up and what the server makes of all of them down; the gradient of the devices'
losses up and that of their features down. What AdhocSL adds to MergeSFL, with the head trained on each device and
averaged as bottoms are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.message import Tensors
from fedspine.split.device import Answer, Answered, Begin, Forwarded, answer, begin, end, step
from fedspine.split.interface import Features, Halves
from fedspine.split.protocol import Game, Played, Resizing
from fedspine.split.server import Outcome, Part, merged_features, parted
from fedspine.split.trainable_half import Optimising, Trained
from fedspine.split.wire import gradient_wired, unwired


@dataclass(frozen=True)
class UnderWay:
    """An iteration between its two exchanges: what entered the middle and left it, with the graph between."""

    parts: Sequence[Part]
    entered: Tensor
    left: Features

    def of_devices(self) -> dict[DeviceId, Features]:
        """What left the middle, by device."""
        each = parted(self.left.values.detach(), self.parts)
        return {
            part.device: own for part, own in zip(self.parts, each, strict=True) if own is not None
        }


class MergedBody:
    """The middle of a model under training for one round, on all features as one batch: `Merged` without labels."""

    def __init__(
        self,
        halves: Halves,
        body: Tensors,
        optimising: Optimising,
        *,
        rescale: bool = True,
        gradients: bool = True,
    ) -> None:
        self._halves, self._rescale, self._gradients = halves, rescale, gradients
        self._body = Trained(body, optimising, halves.statistics)

    def forward(self, parts: Sequence[Part], seed: int) -> UnderWay:
        """All features as one batch through the middle."""
        features = merged_features(parts)
        entered = features.values.detach().requires_grad_(self._gradients)
        left = self._halves.middle(
            self._body.weights, Features(values=entered, mask=features.mask), seed=seed
        )
        return UnderWay(parts, entered, left)

    def step(self, under_way: UnderWay, answers: Mapping[DeviceId, Answered]) -> Outcome:
        """One step with the gradients that came back; the rows of devices that did not answer leave the mean."""
        outcome, labels = Outcome(), max(1, sum(own.counted for own in answers.values()))
        gradient = torch.zeros_like(under_way.left.values)
        for part, place in zip(under_way.parts, parted(gradient, under_way.parts), strict=True):
            if part.device in answers and place is not None:
                own = unwired(answers[part.device].gradient, part.features.mask).values
                place.values.copy_(own / labels)
        if under_way.left.values.requires_grad:
            under_way.left.values.backward(gradient)
        self._body.step()
        found = parted(under_way.entered.grad, under_way.parts)
        for part, own in zip(under_way.parts, found, strict=True):
            if part.device in answers:
                self._put(outcome, part.device, own, answers[part.device], labels)
        return outcome

    def finish(self) -> Tensors:
        """The middle at the round's end."""
        return self._body.now()

    def _put(
        self, outcome: Outcome, device: DeviceId, own: Features | None, said: Answered, labels: int
    ) -> None:
        if own is not None and self._rescale:
            own = Features(values=own.values * (labels / max(said.counted, 1)), mask=own.mask)
        outcome.gradients[device], outcome.losses[device], outcome.counted[device] = (
            own,
            said.loss,
            said.counted,
        )


def play_around(
    fleet: Fleet,
    orders: Mapping[DeviceId, Begin],
    iterations: int,
    server: MergedBody,
    seed: int,
    resizing: Resizing | None = None,
) -> Played:
    """One round of these devices, as `play`; raises AllLost where no device is left."""
    game = Game(fleet, orders, seed)
    forwarded = game.asked(begin, orders)
    for iteration in range(iterations):
        parts = [_part(reply) for reply in forwarded]
        under_way = server.forward(parts, game.seed_of(iteration))
        answered = game.asked(answer, _told(under_way, orders))
        outcome = server.step(under_way, {reply.device: reply.value for reply in answered})
        gradients = game.counted(parts, outcome)
        if iteration + 1 < iterations:
            forwarded = game.forwarded(step, gradients, iteration + 1, resizing)
    return game.over(end, gradients)


def _part(reply: Reply[Forwarded]) -> Part:
    return Part(device=reply.device, features=unwired(reply.value.features), labels=None)


def _told(under_way: UnderWay, orders: Mapping[DeviceId, Begin]) -> dict[DeviceId, Any]:
    return {
        device: Answer(features=gradient_wired(own, orders[device].precision))
        for device, own in under_way.of_devices().items()
    }
