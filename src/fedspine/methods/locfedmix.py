"""LocFedMix-SL: a local reconstruction loss on devices, mixup of their features on the server.

Oh, Park, Vepakomma, Baek, Raskar, Bennis and Kim 2022, "LocFedMix-SL: Localize, Federate, and Mix
for Improved Scalability, Convergence, and Latency in Split Learning", WWW. Departures:
docs/methods/locfedmix.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedspine.core.checks import Asked, Terms, tensors_of, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet, weights_of
from fedspine.core.message import Tensors, message
from fedspine.core.method import method
from fedspine.core.reads import Reads
from fedspine.core.task import IGNORED, Task
from fedspine.lm.received import check_settings
from fedspine.split.auxiliary import DECODER, DecodedCutting, bare, decoder
from fedspine.split.baseline import (
    TOY,
    RoundSetup,
    SplitState,
    SplitTraining,
    batch_caps,
    check_split,
    cutting_of,
    first_state,
    note_devices,
    set_up_round,
    weighted_mean,
)
from fedspine.split.device import HELD, LocalLoss, begun, ended, stepped
from fedspine.split.interface import Features, SplitModel
from fedspine.split.merged_batch import Part
from fedspine.split.messages import Begin, Ended, Forwarded, Step
from fedspine.split.protocol import DeviceWork, run_round
from fedspine.split.received import Agreed, as_sent
from fedspine.split.server import ExtraLoss, WeightedStep

DECODER_WIDTH, MOST_WIDTH = 16, 4096  # channels inside a decoder, and the most that are accepted
MIXING = 501  # the purpose of this random stream


@message
class ReadingOrder:
    """Begin, with the decoder's weights beside the client model's."""

    begin: Begin
    width: int  # of the decoder inside
    weight: float  # of the reconstruction loss

    def check(self, asked: Asked) -> None:
        """The decoder has the shapes of its width."""
        within("width", self.width, 1, MOST_WIDTH)
        check_settings(weight=self.weight)
        cutting = DecodedCutting(cutting=self.begin.cutting, width=self.width, weight=self.weight)
        dtype = as_sent(self.begin.precision)
        specified = {
            name: (dtype, tuple(tensor.shape))
            for name, tensor in cutting.of(asked.base).start(np.random.default_rng(0)).items()
        }
        tensors_of("decoder", decoder(self.begin.weights), specified)

    def agreed(self, before: Agreed | None, terms: Terms) -> Agreed:
        """As for `begin`."""
        return self.begin.agreed(before, terms)

    @property
    def precision(self) -> str:
        return self.begin.precision

    @property
    def reads(self) -> Reads:
        return Reads(names=tuple(sorted(DECODER)))


@on_device
def begin_reading(device: Device, order: ReadingOrder) -> Forwarded:
    cutting = DecodedCutting(cutting=order.begin.cutting, width=order.width, weight=order.weight)
    return begun(device, replace(order.begin, cutting=cutting), reading(device, cutting))


@on_device
def step_reading(device: Device, order: Step) -> Forwarded:
    return stepped(device, order, reading(device, device.memory[HELD].order.cutting))


@on_device
def end_reading(device: Device, order: Step) -> Ended:
    return ended(device, order, reading(device, device.memory[HELD].order.cutting))


def reading(device: Device, cutting: DecodedCutting) -> LocalLoss:
    """The reconstruction loss, weighted."""
    decoded = cutting.of(device.base)
    return lambda weights, features, inputs: (
        cutting.weight * decoded.loss(weights, features, inputs)
    )


def mixup(split_model: SplitModel, shares: Mapping[DeviceId, float], alpha: float) -> ExtraLoss:
    """Every device's features mixed with another one's, lam ~ Beta(alpha, alpha), weighed by the
    device's share; Eq. 5, 6.

    The features are leaves without gradients, so that nothing of this loss leaves the server.
    """

    def loss(weights: Tensors, parts: Sequence[Part], seed: int) -> Tensor:
        rng, losses = np.random.default_rng([seed, MIXING]), [torch.zeros(())]
        whole = sum(shares[part.device] for part in parts)
        for place, part in enumerate(parts):
            if len(parts) > 1:
                other = parts[(place + int(rng.integers(1, len(parts)))) % len(parts)]
                lam = float(rng.beta(alpha, alpha))
                features, own, theirs = blended(part, other, lam)
                mixed = lam * split_model.server_forward(weights, features, own, seed=seed).mean
                mixed = (
                    mixed
                    + (1 - lam)
                    * split_model.server_forward(weights, features, theirs, seed=seed).mean
                )
                losses.append(shares[part.device] / whole * mixed.cpu())
        return torch.stack(losses).sum()

    return loss


def blended(one: Part, other: Part, lam: float) -> tuple[Features, Tensor, Tensor]:
    """lam times the features of one device and 1 - lam times another's, row by row, with the labels
    of both.

    As many rows as both have; texts as long as the longer row, with zeros where the shorter one has
    ended.
    """
    rows = min(len(one.features), len(other.features))
    masks = [part.features.mask for part in (one, other)]
    values = [part.features.values[:rows] for part in (one, other)]
    labels = [part.labels[:rows] for part in (one, other)]
    if masks[0] is None or masks[1] is None:
        return Features(values=lam * values[0] + (1 - lam) * values[1]), labels[0], labels[1]
    width = max(mask.shape[1] for mask in masks if mask is not None)
    longer = [pad(each, (0, 0, 0, width - each.shape[1])) for each in values]
    inside = [pad(mask[:rows], (0, width - mask.shape[1])) for mask in masks if mask is not None]
    if labels[0].dim() == 2:
        labels = [pad(each, (0, width - each.shape[1]), value=IGNORED) for each in labels]
    mixed = Features(values=lam * longer[0] + (1 - lam) * longer[1], mask=inside[0] | inside[1])
    return mixed, labels[0], labels[1]


@message
class LocFedMixState(SplitState):
    decoder: Tensors  # of all devices, on the devices only while they train


@method("locfedmix")
@dataclass(frozen=True)
class LocFedMix(SplitTraining):
    """Split learning with a reconstruction loss on devices and a server model that also learns from
    mixed features.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    # weight of the decoder's loss in the device's loss; 0: no decoder
    reconstruction: float = 1.0
    mixup: float = 1.0  # alpha of the Beta distribution of lam; 0: nothing is mixed

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY)

    def check(self, task: Task) -> None:
        check_split(self, task)
        for name in ("reconstruction", "mixup"):
            if not 0 <= getattr(self, name) < np.inf:
                raise BadInput(
                    f"method.{name} is {getattr(self, name)}, but it cannot be negative or infinite"
                )

    def start(self, task: Task, rng: np.random.Generator) -> LocFedMixState:
        first = first_state(self, task, rng)
        decoded = self._decoded_cutting(task.base).of(task.base)
        return LocFedMixState(**vars(first), decoder=decoded.start(rng))

    def round(self, state: LocFedMixState, fleet: Fleet) -> LocFedMixState:
        now = set_up_round(self, state, fleet)
        rows = weights_of(fleet, [profile.id for profile in fleet.devices])
        extra = mixup(now.split_model, rows, self.mixup) if self.mixup else None
        server_model = WeightedStep(
            now.split_model,
            now.server_model,
            now.optimising,
            rows,
            gradients=bool(now.client_model),
            extra=extra,
        )
        if (
            self.reconstruction and now.client_model
        ):  # reconstruction does not help a frozen client model
            orders, works = (
                self._reading_orders(now, state, fleet),
                DeviceWork(begin_reading, step_reading, end_reading),
            )
        else:
            batches = batch_caps(fleet, now.split_model, self.batch, state.longest)
            orders, works = (
                {device: now.begin(batch) for device, batch in batches.items()},
                DeviceWork(),
            )
        result = run_round(fleet, orders, self.steps, server_model, now.seed, works)
        note_devices(fleet, result)
        weights = weighted_mean(result.client_models, weights_of(fleet, result.client_models))
        return replace(
            state,
            round=state.round + 1,
            model=now.split_model.join(bare(weights), server_model.finish(rows)),
            decoder=state.decoder | decoder(weights),
        )

    def deploy(self, state: LocFedMixState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: LocFedMixState) -> Any:
        return state.model

    def _reading_orders(
        self, now: RoundSetup, state: LocFedMixState, fleet: Fleet
    ) -> dict[DeviceId, ReadingOrder]:
        batches = batch_caps(
            fleet, self._decoded_cutting(fleet.base).of(fleet.base), self.batch, state.longest
        )
        weights = now.client_model | state.decoder
        return {
            device: ReadingOrder(
                begin=now.begin(batch, weights),
                width=DECODER_WIDTH,
                weight=self.reconstruction,
            )
            for device, batch in batches.items()
        }

    def _decoded_cutting(self, base: Any) -> DecodedCutting:
        return DecodedCutting(
            cutting=cutting_of(self, base), width=DECODER_WIDTH, weight=self.reconstruction
        )
