"""The label distribution of each device: asked once, to choose devices and to adjust logits."""

from collections.abc import Mapping

import numpy as np
import torch

from fedspine.control.labels import class_log_ratios, distribution, reference
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.message import Tensors, message

LENGTHS = 10  # buckets of text length, which stand for labels where there are none


@message
class LabelQuery:
    """Ask for the share of each class in a device's rows."""

    classes: int  # 0: the task has none, so count lengths, up to `longest` tokens
    longest: int


@message
class LabelDistribution:
    shares: np.ndarray  # float64 [classes]: V_i


@on_device
def label_distribution(device: Device, order: LabelQuery) -> LabelDistribution:
    if order.classes:
        return LabelDistribution(shares=distribution(device.data.labels, order.classes))
    buckets = np.minimum(device.data.lengths * LENGTHS // (order.longest + 1), LENGTHS - 1)
    return LabelDistribution(shares=distribution(buckets, LENGTHS))


def logit_adjustments(labels: Mapping[DeviceId, np.ndarray], share: float) -> Tensors:
    """What to add to the logits of each device's rows, fp32 [classes]: logit adjustment by its
    label skew.

    With it, features gain nothing from telling which device they come from. `share` of the skew is
    taken off, from 0 to below 1. Menon et al. 2021 (arXiv:2007.07314); FedLC, Zhang et al. 2022
    (arXiv:2209.00189).
    """
    known = np.stack(list(labels.values()))
    return dict(
        zip(
            labels,
            torch.from_numpy(class_log_ratios(known, reference(known), share)).float(),
            strict=True,
        )
    )
