"""The U-shape of split learning: labels and the last part of the model stay on the devices, the
server has the middle.

An iteration takes two exchanges. Features go up and the middle's output comes down; then the
gradient of the devices' losses goes up and that of their features comes down. AdhocSL adds this to
MergeSFL; here the head is trained on each device and averaged as client models are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.message import Tensors
from fedspine.split.device import answer, begin, end, step
from fedspine.split.interface import Features, SplitModel
from fedspine.split.merged_batch import Part, merged_features, per_device
from fedspine.split.messages import Answer, Answered, Begin
from fedspine.split.protocol import Resizing, RoundResult, SplitRound, part_of
from fedspine.split.server import StepResult
from fedspine.split.trainable_half import Optimising, TrainableHalf
from fedspine.split.wire import gradient_wired, unwired


@dataclass(frozen=True)
class ForwardPass:
    """The middle's forward pass: its input and its output, with the graph between."""

    parts: Sequence[Part]
    entered: Tensor
    left: Features

    def of_devices(self) -> dict[DeviceId, Features]:
        """The middle's output, by device."""
        each = per_device(self.left.values.detach(), self.parts)
        return {
            part.device: own for part, own in zip(self.parts, each, strict=True) if own is not None
        }


class MergedMiddle:
    """The middle of a model under training for one round, on all features as one batch, as in
    `MergedStep` but without labels.
    """

    def __init__(
        self,
        split_model: SplitModel,
        middle: Tensors,
        optimising: Optimising,
        *,
        rescale: bool = True,
        gradients: bool = True,
    ) -> None:
        self._split_model, self._rescale, self._gradients = split_model, rescale, gradients
        self._middle = TrainableHalf(middle, optimising, split_model.statistics)

    def forward(self, parts: Sequence[Part], seed: int) -> ForwardPass:
        """All features as one batch through the middle."""
        features = merged_features(parts)
        entered = features.values.detach().requires_grad_(self._gradients)
        left = self._split_model.middle_forward(
            self._middle.weights, Features(values=entered, mask=features.mask), seed=seed
        )
        return ForwardPass(parts, entered, left)

    def step(self, forward_pass: ForwardPass, answers: Mapping[DeviceId, Answered]) -> StepResult:
        """One step with the gradients that came back; the rows of devices that did not answer leave
        the mean.
        """
        result, labels = StepResult(), max(1, sum(own.counted for own in answers.values()))
        gradient = torch.zeros_like(forward_pass.left.values)
        for part, place in zip(
            forward_pass.parts, per_device(gradient, forward_pass.parts), strict=True
        ):
            if part.device in answers and place is not None:
                own = unwired(answers[part.device].gradient, part.features.mask).values
                place.values.copy_(own / labels)
        if forward_pass.left.values.requires_grad:
            forward_pass.left.values.backward(gradient)
        self._middle.step()
        found = per_device(forward_pass.entered.grad, forward_pass.parts)
        for part, own in zip(forward_pass.parts, found, strict=True):
            if part.device in answers:
                said = answers[part.device]
                if own is not None and self._rescale:
                    own = own.times(labels / max(said.counted, 1))
                result.add(part.device, own, said.loss, said.counted)
        return result

    def finish(self) -> Tensors:
        """The middle at the round's end."""
        return self._middle.now()


def run_u_shape_round(
    fleet: Fleet,
    orders: Mapping[DeviceId, Begin],
    iterations: int,
    server: MergedMiddle,
    seed: int,
    resizing: Resizing | None = None,
) -> RoundResult:
    """One round of these devices, as `run_round`; raises AllLost where no device is left."""
    current = SplitRound(fleet, orders, seed)
    replies = current.ask(begin, orders)
    for iteration in range(iterations):
        parts = [part_of(reply) for reply in replies]
        forward_pass = server.forward(parts, current.seed_of(iteration))
        answered = current.ask(answer, _answers(forward_pass, orders))
        result = server.step(forward_pass, {reply.device: reply.value for reply in answered})
        steps = current.record(parts, result)
        if iteration + 1 < iterations:
            replies = current.next_features(step, steps, iteration + 1, resizing)
    return current.finish(end, steps)


def _answers(forward_pass: ForwardPass, orders: Mapping[DeviceId, Begin]) -> dict[DeviceId, Answer]:
    return {
        device: Answer(features=gradient_wired(own, orders[device].precision))
        for device, own in forward_pass.of_devices().items()
    }
