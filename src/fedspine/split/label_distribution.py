"""The label distribution of each device: asked once, to choose devices and to adjust logits."""

from collections.abc import Mapping

import numpy as np
import torch

from fedspine.control.labels import class_log_ratios, distribution, reference
from fedspine.core.checks import Asked, need, tensor_of
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import AllLost, Fleet, none_left
from fedspine.core.message import Tensors, message
from fedspine.core.reads import Reads

LENGTHS = 10  # buckets of text length, which stand for labels where there are none


@message
class LabelQuery:
    """Ask for the share of each class in a device's rows."""

    classes: int  # 0: the task has none, so count lengths, up to `longest` tokens
    longest: int

    @property
    def reads(self) -> Reads:
        return Reads(classes=self.classes)  # all rows

    def check(self, asked: Asked) -> None:
        classes = asked.terms.classes
        need(self.classes == classes, f"classes is {self.classes}, but the task has {classes}")
        need(self.longest >= 1, f"longest is {self.longest}, but at least 1 is needed")


@message
class LabelDistribution:
    shares: np.ndarray  # float64 [classes]: V_i; at a site 0 for a class of too few rows

    def check(self, asked: Asked) -> None:
        """Shares of all classes, which sum to 1 but for rounding."""
        tensor_of("shares", self.shares, np.float64, (asked.terms.classes or LENGTHS,))
        need(bool((self.shares >= 0).all()), "shares has a negative one")
        total = float(self.shares.sum())
        # each share is rounded up to three times, and so is each of the sums
        close = abs(total - 1) <= 4 * len(self.shares) * 2.0**-53
        need(close, f"shares sum to {total:.6g}, but 1 was expected")


@on_device
def label_distribution(device: Device, order: LabelQuery) -> LabelDistribution:
    labels, classes = device.data.labels, order.classes
    if not classes:
        classes = LENGTHS
        labels = np.minimum(device.data.lengths * LENGTHS // (order.longest + 1), LENGTHS - 1)
    device.uses(np.arange(len(device.data)))
    shares = distribution(labels, classes)
    if not (device.fewest_rows or device.noise):
        return LabelDistribution(shares=shares)
    counts = torch.from_numpy(np.bincount(labels, minlength=classes))
    reported = device.counts_beside(counts).numpy()
    even = np.full(classes, 1 / classes)
    return LabelDistribution(shares=reported / reported.sum() if reported.any() else even)


def known_labels(
    known: Mapping[DeviceId, np.ndarray], fleet: Fleet, *, classes: int, longest: int
) -> dict[DeviceId, np.ndarray]:
    """V_i of all devices known; those of the fleet that were never asked before are asked now.

    Raises AllLost where none of the fleet's devices is known.
    """
    unknown = [profile.id for profile in fleet.devices if profile.id not in known]
    order = LabelQuery(classes=classes, longest=longest)
    someone = len(unknown) < len(fleet.devices)
    try:
        replies = fleet.ask(label_distribution, dict.fromkeys(unknown, order)) if unknown else []
    except AllLost:  # too few of the new ones, without which the others go on
        if not someone:
            raise
        replies = []
    if not (replies or someone):
        raise none_left(len(unknown), list(fleet.unusable.values()))
    return {**known} | {reply.device: reply.value.shares for reply in replies}


def logit_adjustments(labels: Mapping[DeviceId, np.ndarray], share: float) -> Tensors:
    """What to add to the logits of each device's rows, fp32 [classes]: logit adjustment by its
    label skew.

    With it, features gain nothing by revealing their device. `share` of the skew is removed, from 0
    to below 1. Menon et al. 2021 (arXiv:2007.07314); FedLC, Zhang et al. 2022 (arXiv:2209.00189).
    """
    known = np.stack(list(labels.values()))
    return dict(
        zip(
            labels,
            torch.from_numpy(class_log_ratios(known, reference(known), share)).float(),
            strict=True,
        )
    )
