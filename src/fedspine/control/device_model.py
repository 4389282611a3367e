"""What one device's rounds have taught the server: a bandit, and where a setting asks for it how fast the device is."""

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import TypeAlias

import numpy as np

from fedspine.control.bandit import Bandit
from fedspine.control.latency_model import coefficients, no_evidence, predicted
from fedspine.core.message import message

TERCILES = 3


@message
class Pupil:
    """A bandit, and what pooling, the deadline and the oracle need besides.

    `evidence` [3, 4] is what `pace` knows of the device's times; `load` the operations that the device reports over
    those of batches of full-length texts.
    """

    bandit: Bandit = field(default_factory=Bandit)
    evidence: np.ndarray = field(default_factory=no_evidence)
    load: float = 1.0


Learnt: TypeAlias = Mapping[
    str, Bandit | Pupil
]  # by device; a bandit alone where no setting asks for more


def pupil(learnt: Learnt, device: str) -> Pupil:
    """What is known of a device, which may never have replied."""
    match learnt.get(device):
        case Pupil() as known:
            return known
        case Bandit() as bandit:
            return Pupil(bandit=bandit)
    return Pupil()


def paces(learnt: Learnt, devices: Iterable[str]) -> dict[str, np.ndarray]:
    """The coefficients of `pace` of these devices; one that has never replied is taken to be like the fleet."""
    fleet = sum((pupil(learnt, device).evidence for device in learnt), no_evidence())
    return {device: coefficients(pupil(learnt, device).evidence, fleet) for device in devices}


def alike(learnt: Learnt) -> dict[str, tuple[str, ...]]:
    """The other devices of every device's speed tercile, by the time each would take unpruned at half the largest rank."""
    seconds = {
        device: predicted(pace, sparsity=0.0, rank=0.5)
        for device, pace in paces(learnt, learnt).items()
    }
    order = sorted(seconds, key=lambda device: (seconds[device], device))
    groups = [
        [order[place] for place in part] for part in np.array_split(np.arange(len(order)), TERCILES)
    ]
    return {
        device: tuple(other for other in group if other != device)
        for group in groups
        for device in group
    }
