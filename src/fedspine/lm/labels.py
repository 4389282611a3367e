"""Devices whose labels are skewed: each one's loss takes out by how much, so that it teaches no model which classes are rare.

Logit adjustment (Menon et al. 2021, arXiv:2007.07314) against label skew in federated learning, as FedLC has it (Zhang et al.
2022, arXiv:2209.00189) with a margin of another form. Theirs lead to a model for equally frequent classes; here the shares of a
device count against the fleet's, so that a device whose labels are like the fleet's trains as ever.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.device import Device
from fedspine.message import message

UNSEEN = 0.5  # rows as which a class without any counts


@message
class Adjusting:
    """How strongly a device adjusts its logits, and the rows of each class in the fleet, as far as they are known."""

    tau: float
    fleet: Tensor | None  # float32 [classes]


def label_counts(device: Device) -> Float[Tensor, " classes"] | None:
    """Rows of each class on the device; None for language models, whose rows have no label."""
    if device.data.labels is None:
        return None
    counts = np.bincount(device.data.labels, minlength=device.base.config.num_labels)
    return torch.from_numpy(counts.astype(np.float32))


def logit_shift(own: Float[Tensor, " classes"] | None, adjusting: Adjusting | None) -> Float[Tensor, " classes"] | None:
    """What is added to the logits in training: tau times the log of the device's share of a class over the fleet's.

    >>> logit_shift(torch.tensor([3.0, 1.0]), Adjusting(tau=1.0, fleet=torch.tensor([30.0, 30.0]))).exp().tolist()
    [1.5, 0.5]
    """
    if own is None or adjusting is None or adjusting.fleet is None:
        return None
    return adjusting.tau * (_shares(own).log() - _shares(adjusting.fleet).log())


def added(before: Float[Tensor, " classes"] | None, counts: Sequence[Tensor | None]) -> Tensor | None:
    """The fleet's rows of each class with those of more replies; None where none has told.

    What is no count, or of other classes than the first one heard, is left out.
    """
    told = [each for each in (before, *counts) if each is not None and bool((each >= 0).all() & each.isfinite().all())]
    return torch.stack([each for each in told if each.shape == told[0].shape]).sum(0) if told else None


def _shares(counts: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    counts = counts.clamp_min(UNSEEN)
    return counts / counts.sum()
