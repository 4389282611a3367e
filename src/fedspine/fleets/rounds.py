"""What the run loop needs of a fleet besides asking: rounds, and going on after a resume."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet


@dataclass
class Totals:
    """What the exchanges of a round add up to, or of a run."""

    exchanges: int = 0
    lost: int = 0
    samples: int = 0
    waiting_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    peak_memory_bytes: int = 0
    server_wall_seconds: float = 0.0  # the method's own work, on no virtual clock

    def add(self, other: "Totals") -> None:
        """Take the totals of one more round or exchange in."""
        for name in vars(self):
            if name != "peak_memory_bytes":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)


@dataclass
class Devices:
    """Wall seconds of a round in which devices were served or waited for; what is left of the round is the server's."""

    seconds: float = 0.0

    @contextmanager
    def served(self) -> Iterator[None]:
        """Count the time in it; orders that are built meanwhile are taken off with `not_theirs`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @contextmanager
    def not_theirs(self) -> Iterator[None]:
        """Take the time in it off again."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - started


@dataclass
class Waits:
    """How long devices have nothing to do in a round, of those to which orders are sent; `ask` knows its own at once."""

    since: dict[DeviceId, float] = field(
        default_factory=dict
    )  # the end of each one's last exchange
    seconds: float = 0.0  # of all devices

    def busy(self, device: DeviceId, start: float, end: float) -> None:
        """A device has an exchange from here to there."""
        self.seconds += max(0.0, start - self.since.get(device, start))
        self.since[device] = end

    def asked(self, devices: Iterable[DeviceId], start: float, end: float) -> None:
        """Devices are asked together; those to which nothing was sent in this round are left out."""
        for (
            device
        ) in devices:  # in their order, since sums in another one are not the same to the bit
            if device in self.since:
                self.busy(device, start, end)

    def mean(self, now: float) -> float:
        """Seconds of the mean device until now, the round's end; one whose reply is late waits for nobody."""
        waiting = self.seconds + sum(max(0.0, now - since) for since in self.since.values())
        return waiting / max(1, len(self.since))


class RoundFleet(Fleet, Protocol):
    """A whole fleet as a run drives it, simulated or real."""

    @property
    def clock(self) -> str:
        """What `now` counts: "simulated" seconds, or "fleet" seconds, which are wall seconds between real machines."""
        ...

    def cohort(self, ids: Iterable[DeviceId]) -> Fleet:
        """The part of the fleet that a round asks. Unlike that of `only`, its `next` hears whoever has a reply under way."""
        ...

    def begin_round(self, round: int) -> Totals:
        """Get ready for `round`; returns the totals that it will fill."""
        ...

    def end_round(self, wall_seconds: float) -> None:
        """Write the round's totals down."""
        ...

    def snapshot(self) -> Any:
        """A message that holds all that the fleet needs to go on after a resume, but for `memories`."""
        ...

    def restore(self, snapshot: Any, memories: Mapping[DeviceId, str]) -> None:
        """Go on from a snapshot; the store must hold the memories it names."""
        ...

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        """The file in the store of every device's memory; none where devices keep their own."""
        ...
