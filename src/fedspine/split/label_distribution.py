"""What labels a device holds, which the server asks once, to choose devices by them and to calibrate their gradients."""

from collections.abc import Mapping

import numpy as np
import torch

from fedspine.control.labels import distribution, label_shifts, reference
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.message import Tensors, message

LENGTHS = 10  # buckets of text length, which stand for labels where there are none


@message
class Look:
    """Say what labels you hold."""

    classes: int  # 0: the task has none, so count lengths, up to `longest` tokens
    longest: int


@message
class Looked:
    shares: np.ndarray  # float64 [classes]: V_i


@on_device
def look(device: Device, order: Look) -> Looked:
    if order.classes:
        return Looked(shares=distribution(device.data.labels, order.classes))
    buckets = np.minimum(device.data.lengths * LENGTHS // (order.longest + 1), LENGTHS - 1)
    return Looked(shares=distribution(buckets, LENGTHS))


def calibrating(labels: Mapping[DeviceId, np.ndarray], share: float) -> Tensors:
    """By device, what to add to the logits of its rows, fp32 [classes], so that features gain nothing by whose they are.

    `share` of what its labels tell is taken off, from 0 to below 1.
    """
    known = np.stack(list(labels.values()))
    return dict(
        zip(
            labels,
            torch.from_numpy(label_shifts(known, reference(known), share)).float(),
            strict=True,
        )
    )
