"""The state that all views of a simulated fleet share: the devices' hardware and memories, the
workers that serve them, pending replies, and the round's totals.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.device import Call, DeviceId, Served, Work, name_of
from fedspine.core.fleet import Cost, EarlyExchange, Profile
from fedspine.core.message import message, pack, unpack
from fedspine.core.noise import COUNTED
from fedspine.core.privacy import KEPT, Privacy
from fedspine.core.server_optimiser import Server
from fedspine.execution.workers import Workers
from fedspine.fleets.hardware import Hardware, Timing
from fedspine.fleets.rounds import Devices, Totals, Waits
from fedspine.storage.records import Records
from fedspine.storage.store import Store, version_of


@message
class Snapshot:
    """The saved state of a simulated fleet, without the devices' memories."""

    now: float
    asks: dict[str, int]  # answered so far, by device
    pending: tuple["PendingReply", ...]


@message
class ServedSnapshot(Snapshot):
    """The saved state of a fleet whose server remembers something."""

    server: dict[str, Any]  # as `core.server_optimiser.Server` gives it


@message
class PendingReply:
    """A reply in flight, which arrives at `due` on the virtual clock."""

    due: float
    number: int  # breaks ties in the order of sending
    device: str
    round: int  # in which its order was sent
    order: Any
    result: np.ndarray  # uint8, the packed reply; empty if it is lost
    cost: dict[str, float]


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class World:
    """The mutable state shared by all views of a fleet."""

    seed: int
    profiles: tuple[Profile, ...]
    hardware: Hardware
    workers: Workers
    store: Store
    records: Records
    aggregation: Aggregation = Mean()
    server: Server = field(default_factory=Server)
    privacy: Privacy | None = None  # of the run
    noise: float = 0.0  # that devices add beside what training changes
    early: tuple[EarlyExchange, ...] = ()  # all at once, charged to the first round
    round: int = 0
    asks: dict[DeviceId, int] = field(default_factory=dict)  # whose replies arrived
    # asks of this round whose replies did not; others draw other times
    unanswered: Counter[DeviceId] = field(default_factory=Counter)
    memories: dict[DeviceId, str] = field(default_factory=dict)  # files, as of the last save
    # memories of the devices asked since
    changed: dict[DeviceId, bytes] = field(default_factory=dict)
    pending: list[PendingReply] = field(default_factory=list)
    sent: int = 0
    devices_wall: Devices = field(default_factory=Devices)  # of this round
    totals: Totals = field(default_factory=Totals)
    # of the devices to which orders were sent in this round
    waits: Waits = field(default_factory=Waits)

    def __post_init__(self) -> None:
        self.index = {profile.id: i for i, profile in enumerate(self.profiles)}

    def exchange(
        self, work: Work[Any, Any], orders: Mapping[DeviceId, Any]
    ) -> Iterator[tuple[DeviceId, Any, Served, Cost]]:
        """Serve every order and yield it with its result, in their order; the caller settles each
        and advances the clock.
        """
        name, bytes_down, built = name_of(work), {}, {}

        def calls() -> Iterator[Call]:
            for device in orders:
                with self.devices_wall.not_theirs():  # an order may be built when it is read
                    built[device] = orders[device]
                packed = pack(built[device])
                bytes_down[device] = packed.bytes
                yield self._call(device, name, packed.payload)

        for device, served in zip(orders, self.workers.run(calls()), strict=True):
            timing = self.timing(
                device,
                self.asks.get(device, 0) + self.unanswered[device],
                flops=served.flops,
                launches=served.launches,
                bytes_down=bytes_down[device],
                bytes_up=len(served.result),
            )
            yield (
                device,
                built.pop(device),
                served,
                Cost(
                    bytes_down=bytes_down[device],
                    bytes_up=len(served.result),
                    flops=served.flops,
                    peak_memory_bytes=served.peak_memory_bytes,
                    seconds=timing.total,
                    compute_seconds=timing.compute,
                ),
            )

    def settle(self, device: DeviceId, served: Served, arrived: bool) -> None:
        """Keep a device's memory if its reply arrived; see `fleets.rounds.LosingFleet`."""
        if arrived:
            self.asks[device] = self.asks.get(device, 0) + 1
            self.changed[device] = served.memory
            return
        self.unanswered[device] += 1
        if served.declined is None and (self.privacy is not None or self.noise):
            packed, after = self._memory(device), unpack(served.memory)
            before = {} if packed is None else unpack(packed)
            counted = {name: after[name] for name in (KEPT, COUNTED) if name in after}
            self.changed[device] = pack(before | counted).payload

    def timing(self, device: DeviceId, ask: int | None, **cost: Any) -> Timing:
        """Seconds of an exchange of this `cost`, if the device served so many before; None: without
        jitter.
        """
        return self.hardware.seconds(self.index[device], round=self.round, ask=ask, **cost)

    def _call(self, device: DeviceId, work: str, order: bytes) -> Call:
        index = self.index[device]
        return Call(
            device=device,
            index=index,
            work=work,
            order=order,
            memory=self._memory(device),
            seed=(self.seed, index, self.asks.get(device, 0)),
            round=self.round,
            privacy=self.privacy,
            noise=self.noise,
        )

    def _memory(self, device: DeviceId) -> bytes | None:
        """A device's packed memory. Only the last version of a round is written to disk, since a
        round may ask a device forty times.
        """
        if device in self.changed:
            return self.changed[device]
        file = self.memories.get(device)
        return None if file is None else self.store.get_memory(file)

    def keep_memories(self) -> None:
        """Write the memories that changed since the last save, for the next one."""
        for device, payload in self.changed.items():
            version = version_of(self.memories.get(device)) + 1
            self.memories[device] = self.store.put_memory(device, version, payload)
        self.changed.clear()

    def record(
        self,
        work: Work[Any, Any],
        device: DeviceId,
        started: float,
        cost: Cost,
        served: Served,
        *,
        lost: bool,
        left_out: str | None,
    ) -> None:
        """Write one exchange down and add it to the round's totals; note why its reply is left out,
        if there is a reason.
        """
        private = {} if served.epsilon is None else {"epsilon": served.epsilon}
        private |= {} if served.noise is None else {"noise": served.noise}
        self._write(work.__name__, device, started, cost, served.samples, lost=lost, **private)
        if left_out is not None:
            self.records.note(started, {"device": device, "left_out": left_out})

    def charge(self, early: EarlyExchange, started: float) -> float:
        """Charge a device for an exchange before the first round; returns its seconds."""
        device, moved = early.device, {"bytes_down": early.bytes_down, "bytes_up": early.bytes_up}
        asked = self.asks.get(device, 0)
        timing = self.timing(device, asked, flops=early.flops, launches=0, **moved)
        self.asks[device] = asked + 1
        cost = Cost(
            flops=early.flops,
            peak_memory_bytes=early.peak_memory_bytes,
            seconds=timing.total,
            compute_seconds=timing.compute,
            **moved,
        )
        self._write(early.work, device, started, cost, 0, lost=False)
        return cost.seconds

    def _write(
        self,
        work: str,
        device: DeviceId,
        started: float,
        cost: Cost,
        samples: int,
        *,
        lost: bool,
        **private: float,
    ) -> None:
        self.totals.add(
            Totals(
                exchanges=1,
                lost=int(lost),
                samples=samples,
                bytes_up=cost.bytes_up,
                bytes_down=cost.bytes_down,
                peak_memory_bytes=cost.peak_memory_bytes,
            )
        )
        self.records.write(
            "exchange",
            device=device,
            kind=self.hardware.kinds[self.index[device]],
            work=work,
            started=started,
            seconds=cost.seconds,
            compute_seconds=cost.compute_seconds,
            bytes_down=cost.bytes_down,
            bytes_up=cost.bytes_up,
            flops=cost.flops,
            peak_memory_bytes=cost.peak_memory_bytes,
            lost=lost,
            **private,
        )
