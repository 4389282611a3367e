"""When devices begin and end a split round: all at once, or each at its own time.

Joining late is ours. On a slow link the client model takes long whatever the batch size. So a round
starts with the first features of a share of the devices. The others are merged from the first step
that begins after their features arrive. Devices with slow links leave some steps before the last
one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, TypeAlias

import numpy as np

from fedspine.control.batch_timing import early
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.split.exchange_costs import row_costs
from fedspine.split.protocol import Progress, Staggered

LIGHT = 0.25  # bytes of a client model over those of a batch's features, below which it is light
FEWEST_STEPS = 8  # the fewest iterations of a round in which it pays


@dataclass(frozen=True)
class AtOnce:
    """All devices begin and end a round together."""

    name: ClassVar = "at-once"


@dataclass(frozen=True)
class Late:
    """Devices with slow links begin later and end earlier, in rounds of 8 steps or more.

    If the client model has less than a quarter of the bytes of a batch's features, all devices
    begin at once.
    """

    name: ClassVar = "late"
    # share of the devices with whose features a round starts, and that stay to its last step
    quorum: float = 0.5


Joining: TypeAlias = AtOnce | Late


def check_joining(joining: Joining) -> None:
    if isinstance(joining, Late) and not 0 < joining.quorum <= 1:
        raise BadInput(
            f"method.joining.quorum is {joining.quorum}, but a share above 0 and up to 1 was "
            "expected"
        )


@dataclass(frozen=True)
class LateJoining:
    """What is known of a round before it begins."""

    quorum: float
    devices: int  # of the round
    weight_bytes: int  # of the client model
    batch_bytes: float  # of the features of a planned batch, on average
    fixed: float  # seconds of an exchange whatever its rows, as known before the round

    def staggered(self, steps: int) -> Staggered | None:
        """How devices begin and end a round of this many `steps`; None if all begin and end
        together.
        """
        if steps < FEWEST_STEPS or self.weight_bytes <= LIGHT * self.batch_bytes:
            return None
        return Staggered(self.quorum, lambda done, progress: self._leaving(steps, done, progress))

    def _leaving(
        self, steps: int, done: int, progress: Mapping[DeviceId, Progress]
    ) -> Collection[DeviceId]:
        """Devices that end the round after `done` iterations, since their links need long for the
        client model.
        """
        if 2 * done < steps:
            return ()
        own = list(progress.values())
        found = row_costs(own, self.fixed)
        rows = np.array([each.batch for each in own])
        # the last gradient goes down, the client model up
        ends = found.fixed + found.cost * (rows / 2 + self.weight_bytes / found.row_bytes)
        least = ceil(self.quorum * self.devices)
        before = early(ends, max(each.costs[-1].seconds for each in own), least)
        return [
            device
            for device, sooner in zip(progress, before, strict=True)
            if sooner >= steps - done
        ]
