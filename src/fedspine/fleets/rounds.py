"""The run loop's interface to a fleet, besides asking: rounds, totals, snapshots."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet


@dataclass
class Totals:
    """Sums over the exchanges of a round or of a run; `peak_memory_bytes` is their maximum."""

    exchanges: int = 0
    lost: int = 0  # an order or its reply, or a reply that came after a time limit
    late: int = 0  # replies to an order of an earlier round
    samples: int = 0
    waiting_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    peak_memory_bytes: int = 0
    # wall seconds of the server's own work, which the virtual clock does not count
    server_wall_seconds: float = 0.0

    def add(self, other: "Totals") -> None:
        """Add the totals of another round or exchange."""
        for name in vars(self):
            if name != "peak_memory_bytes":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)


LOST = "lost"  # why a reply is missing that a `MessageLosses` names


@dataclass(frozen=True)
class MessageLosses:
    """Which devices' replies are lost on their way back, and the seconds by which others' are
    delayed beyond their cost.
    """

    replies: frozenset[DeviceId] = frozenset()
    delays: Mapping[DeviceId, float] = field(default_factory=dict)

    def limit(self, device: DeviceId, within: float) -> float:
        """The seconds after which a device's reply, with its delay, is later than `within`."""
        return within - self.delays.get(device, 0.0)


class LosingFleet(Fleet, Protocol):
    """A fleet or a part of one, as a wrapper that loses messages needs it."""

    def losing(self, losses: MessageLosses) -> Fleet:
        """The same part, whose orders lose these replies. As at a real site, a device whose reply
        does not arrive in time goes on as if it had not been asked: with the memory and the draws
        that it had. Only what it has spent of its privacy and answered stays counted.
        """
        ...


@dataclass
class Devices:
    """Wall seconds of a round spent on serving devices or waiting for them; the rest is the
    server's.
    """

    seconds: float = 0.0

    @contextmanager
    def served(self) -> Iterator[None]:
        """Count the time in this context, except the time in `not_theirs`, which wraps the building
        of orders.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @contextmanager
    def not_theirs(self) -> Iterator[None]:
        """Do not count the time in this context."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - started


@dataclass
class Waits:
    """Idle time, in a round, of devices that got orders by `send`; for `ask`, see `mean_wait`."""

    # the end of each one's last exchange
    since: dict[DeviceId, float] = field(default_factory=dict)
    seconds: float = 0.0  # of all devices

    def busy(self, device: DeviceId, start: float, end: float) -> None:
        """Add an exchange of a device, from `start` to `end`."""
        self.seconds += max(0.0, start - self.since.get(device, start))
        self.since[device] = end

    def asked(self, devices: Iterable[DeviceId], start: float, end: float) -> None:
        """Add a joint ask of devices; devices that were sent nothing in this round do not count."""
        for device in devices:  # in this order, which rounding depends on
            if device in self.since:
                self.busy(device, start, end)

    def mean(self, now: float) -> float:
        """Mean idle seconds per device until `now`, the round's end; a device with a late reply is
        not idle.
        """
        waiting = self.seconds + sum(max(0.0, now - since) for since in self.since.values())
        return waiting / max(1, len(self.since))


def mean_wait(seconds: Sequence[float]) -> float:
    """Mean idle seconds per device of an ask whose exchanges took `seconds`; 0 without any."""
    return float(np.mean(max(seconds) - np.array(seconds))) if seconds else 0.0


def round_row(
    totals: Totals, waits: Waits, devices_wall: Devices, *, now: float, wall_seconds: float
) -> dict[str, Any]:
    """The row of a round that ends at `now`; adds its last waits and server seconds to `totals`."""
    totals.waiting_seconds += waits.mean(now)
    totals.server_wall_seconds += max(0.0, wall_seconds - devices_wall.seconds)
    return {
        "now": now,
        "devices": totals.exchanges,
        "lost": totals.lost,
        "waiting_seconds": totals.waiting_seconds,
        "bytes_up": totals.bytes_up,
        "bytes_down": totals.bytes_down,
        "wall_seconds": wall_seconds,
        "server_wall_seconds": totals.server_wall_seconds,
    }


class RoundFleet(Fleet, Protocol):
    """The run loop's view of a whole fleet, simulated or real."""

    @property
    def clock(self) -> str:
        """What `now` counts: "simulated" seconds, or "fleet" seconds, which are wall seconds
        between real machines.
        """
        ...

    @property
    def quorum(self) -> int:
        """The fewest usable replies to an ask with which a round continues."""
        ...

    def cohort(self, ids: Iterable[DeviceId]) -> Fleet:
        """The part of the fleet that a round asks. Unlike that of `only`, its `next` returns
        pending replies of all devices.
        """
        ...

    @property
    def in_flight(self) -> Mapping[DeviceId, int]:
        """By device with a pending order: how many rounds ago the last such order was sent. An
        order is pending until `next` returns its reply.
        """
        ...

    def begin_round(self, round: int) -> Totals:
        """Begin `round`; returns its totals, which the fleet updates."""
        ...

    def end_round(self, wall_seconds: float) -> None:
        """Write the round's totals down."""
        ...

    def snapshot(self) -> Any:
        """A message with the fleet's state for a resume, without the devices' memories."""
        ...

    def restore(self, snapshot: Any, memories: Mapping[DeviceId, str]) -> None:
        """Resume from a snapshot; the store must hold the memories it names."""
        ...

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        """The store's file with each device's memory; empty if devices keep their own."""
        ...
