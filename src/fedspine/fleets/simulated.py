"""The default fleet: any number of unequal devices on one machine, on a virtual clock.

The work is real, only its duration is simulated: every order and result is packed and charged by
its bytes, every operation by the speeds in `hardware`, which methods cannot see. All devices share
one frozen base.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.device import Call, DeviceId, O, R, Served, Work, name_of
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Profile, Reply, T
from fedspine.core.message import message, pack, unpack
from fedspine.core.privacy import Privacy
from fedspine.execution.workers import Workers
from fedspine.fleets.hardware import KINDS, Hardware, Timing, device_ids
from fedspine.fleets.rounds import Devices, Totals, Waits, mean_wait, round_row
from fedspine.storage.records import Records
from fedspine.storage.store import Store


@message
class Snapshot:
    """The saved state of a simulated fleet, without the devices' memories."""

    now: float
    asks: dict[str, int]  # served so far, by device
    pending: tuple["PendingReply", ...]


@message
class PendingReply:
    """A reply in flight, which arrives at `due` on the virtual clock."""

    due: float
    number: int  # breaks ties in the order of sending
    device: str
    round: int  # in which its order was sent
    order: Any
    result: np.ndarray  # uint8, the packed reply
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
    privacy: Privacy | None = None  # of the run
    round: int = 0
    asks: dict[DeviceId, int] = field(default_factory=dict)
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
        """Serve every order, and yield it with its result, one after another; the caller moves the
        clock.
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
            asked = self.asks.get(device, 0)
            timing = self.timing(
                device,
                asked,
                flops=served.flops,
                launches=served.launches,
                bytes_down=bytes_down[device],
                bytes_up=len(served.result),
            )
            self.asks[device] = asked + 1
            self.changed[device] = served.memory
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
                ),
            )

    def timing(self, device: DeviceId, ask: int | None, **cost: Any) -> Timing:
        """Seconds of an exchange of this `cost`, given how many the device served before; None:
        without jitter.
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
        )

    def _memory(self, device: DeviceId) -> bytes | None:
        """A device's memory; only its last version of a round is written, since a round may ask it
        forty times.
        """
        if device in self.changed:
            return self.changed[device]
        file = self.memories.get(device)
        return None if file is None else self.store.get_memory(file)

    def keep_memories(self) -> None:
        """Write the memories that changed since the last save, for the next one."""
        for device, payload in self.changed.items():
            self.memories[device] = self.store.put_memory(device, self.asks[device], payload)
        self.changed.clear()

    def record(
        self,
        work: Work[Any, Any],
        device: DeviceId,
        started: float,
        cost: Cost,
        served: Served,
        lost: bool,
    ) -> None:
        """Write one exchange down and add it to the round's totals; note who declined."""
        self.totals.add(
            Totals(
                exchanges=1,
                lost=int(lost),
                samples=served.samples,
                bytes_up=cost.bytes_up,
                bytes_down=cost.bytes_down,
                peak_memory_bytes=cost.peak_memory_bytes,
            )
        )
        self.records.write(
            "exchange",
            device=device,
            kind=self.hardware.kinds[self.index[device]],
            work=work.__name__,
            started=started,
            seconds=cost.seconds,
            bytes_down=cost.bytes_down,
            bytes_up=cost.bytes_up,
            flops=cost.flops,
            peak_memory_bytes=cost.peak_memory_bytes,
            lost=lost,
            **({} if served.epsilon is None else {"epsilon": served.epsilon}),
        )
        if served.declined is not None:
            self.records.write(
                "note",
                now=started,
                values={"device": device, "left_out": served.declined},
            )


class SimulatedFleet:
    """A view of the simulated devices: all of them, or a part, on a clock of its own or a shared
    one.

    `fedspine.run` makes one from a recipe. Without workers it serves no asks, but time passes:

    >>> from fedspine import SimulatedFleet
    >>> kinds = ["tx2", "agx"]
    >>> world = World(seed=0, profiles=profiles(kinds, [10, 20]), workers=None, store=None,
    ...               hardware=Hardware(seed=0, kinds=tuple(kinds)), records=None)
    >>> fleet = SimulatedFleet(world)
    >>> fleet.wait(1.5)
    >>> [device.id for device in fleet.devices], fleet.now
    (['tx2-00', 'agx-01'], 1.5)
    """

    def __init__(
        self,
        world: World,
        devices: tuple[Profile, ...] | None = None,
        clock: Clock | None = None,
        pending_of: tuple[Profile, ...] | None = None,
    ) -> None:
        self._world = world
        self._devices = world.profiles if devices is None else devices
        self._pending_of = self._devices if pending_of is None else pending_of
        self._clock = clock or Clock()

    @property
    def devices(self) -> tuple[Profile, ...]:
        return self._devices

    @property
    def now(self) -> float:
        return self._clock.now

    @property
    def base(self) -> Any:
        return self._world.workers.base

    @property
    def aggregation(self) -> Aggregation:
        return self._world.aggregation

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        self._check(orders)
        started, replies, seconds = self.now, [], []
        declined: list[str] = []
        with self._world.devices_wall.served():
            for device, order, served, cost in self._world.exchange(work, orders):
                late = cost.seconds > within or served.declined is not None
                self._world.record(work, device, started, cost, served, late)
                seconds.append(min(cost.seconds, within))
                declined += [] if served.declined is None else [served.declined]
                if not late:
                    value = unpack(served.result)
                    replies.append(Reply(device=device, value=value, cost=cost, order=order))
        if seconds:
            self._clock.now += max(seconds)
        self._world.totals.waiting_seconds += mean_wait(seconds)
        self._world.waits.asked(orders, started, self.now)
        if declined and len(declined) == len(orders):
            raise AllLost(f"none of the {len(orders)} devices asked answers ({declined[0]})")
        return replies

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        self._check(orders)
        world = self._world
        with world.devices_wall.served():
            for device, order, served, cost in world.exchange(work, orders):
                world.record(work, device, self.now, cost, served, served.declined is not None)
                if served.declined is not None:
                    continue
                end = self.now + cost.seconds
                world.waits.busy(device, self.now, end)
                world.pending.append(
                    PendingReply(
                        due=end,
                        number=world.sent,
                        device=device,
                        round=world.round,
                        order=order,
                        result=np.frombuffer(served.result, np.uint8),
                        cost=vars(cost),
                    )
                )
                world.sent += 1

    def next(self) -> Reply[Any]:
        world, mine = self._world, {profile.id for profile in self._pending_of}
        pending = (entry for entry in world.pending if entry.device in mine)
        entry = min(pending, key=lambda entry: (entry.due, entry.number), default=None)
        if entry is None:
            raise Idle("no reply is under way; send an order first")
        world.pending.remove(entry)
        self._clock.now = max(self.now, entry.due)
        return Reply(
            device=entry.device,
            value=unpack(entry.result.tobytes()),
            cost=Cost(**entry.cost),
            order=entry.order,
            late=world.round - entry.round,
        )

    def only(self, ids: Iterable[DeviceId]) -> "SimulatedFleet":
        return SimulatedFleet(self._world, self._part(ids), self._clock)

    def together(
        self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        results, ends = {}, [self.now]
        for name, ids in groups.items():
            part = SimulatedFleet(self._world, self._part(ids), Clock(self.now))
            results[name] = job(name, part)
            ends.append(part.now)
        self._clock.now = max(ends)
        return results

    def wait(self, seconds: float) -> None:
        self._clock.now += seconds

    def note(self, **values: Any) -> None:
        self._world.records.write("note", now=self.now, values=values)

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return {}  # replies are checked around the fleet: see `fleets.checked`

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """The true seconds of an exchange of this cost in this round, for the oracle controller.

        They follow from the power mode and the link's mean, without the jitter of the exchange.
        """
        self._check((device,))
        spent = {
            "flops": flops,
            "launches": launches,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
        }
        return self._world.timing(device, None, **spent).total

    # the run loop's part of the interface: see `fedspine.fleets.rounds`

    clock = "simulated"
    quorum = 1

    def cohort(self, ids: Iterable[DeviceId]) -> "SimulatedFleet":
        return SimulatedFleet(self._world, self._part(ids), self._clock, pending_of=self._devices)

    @property
    def in_flight(self) -> Mapping[DeviceId, int]:
        return {entry.device: self._world.round - entry.round for entry in self._world.pending}

    def begin_round(self, round: int) -> Totals:
        """Move modes and links on to `round`; returns its totals, which the fleet updates."""
        self._world.round = self._world.records.round = round
        self._world.totals, self._world.waits, self._world.devices_wall = (
            Totals(),
            Waits(),
            Devices(),
        )
        return self._world.totals

    def end_round(self, wall_seconds: float) -> None:
        """Write the round's totals down."""
        world = self._world
        row = round_row(
            world.totals, world.waits, world.devices_wall, now=self.now, wall_seconds=wall_seconds
        )
        world.records.write("round", **row)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            now=self.now,
            asks=dict(self._world.asks),
            pending=tuple(self._world.pending),
        )

    def restore(self, snapshot: Snapshot, memories: Mapping[DeviceId, str]) -> None:
        """Resume from a snapshot; the store must hold the memories it names."""
        world = self._world
        self._clock.now = snapshot.now
        world.asks, world.memories, world.changed = dict(snapshot.asks), dict(memories), {}
        world.pending = list(snapshot.pending)
        world.sent = max((entry.number + 1 for entry in snapshot.pending), default=0)

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        """The file of every device's memory, for the store; what changed since the last save is
        written first.
        """
        self._world.keep_memories()
        return self._world.memories

    def _part(self, ids: Iterable[DeviceId]) -> tuple[Profile, ...]:
        wanted = set(ids)
        self._check(wanted)
        return tuple(profile for profile in self._devices if profile.id in wanted)

    def _check(self, ids: Iterable[DeviceId]) -> None:
        known = {profile.id for profile in self._devices}
        unknown = [id for id in ids if id not in known]
        if unknown:
            raise LookupError(
                f"{unknown[0]} is not in this part of the fleet, which has {len(known)} devices"
            )


def profiles(kinds: list[str], examples: list[int]) -> tuple[Profile, ...]:
    """The profiles that simulated devices declare."""
    if len(kinds) != len(examples):
        raise BadInput(f"{len(kinds)} devices were expected to hold data, {len(examples)} do")
    return tuple(
        Profile(id=id, site="simulated", examples=rows, memory_bytes=KINDS[kind].memory_bytes)
        for id, kind, rows in zip(device_ids(kinds), kinds, examples, strict=True)
    )
