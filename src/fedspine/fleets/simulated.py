"""The default fleet: any number of unequal devices on one machine, on a virtual clock.

The work is real; only its duration is simulated. Every order and result is packed and charged by
its bytes, and every operation by the speeds in `hardware`, which methods cannot see. All devices
share one frozen base.
"""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any

import numpy as np

from fedspine.core.aggregation import Aggregation
from fedspine.core.device import DeviceId, O, R, Served, Work
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Profile, Reply, T
from fedspine.core.message import unpack
from fedspine.core.server_optimiser import Server
from fedspine.fleets.hardware import KINDS, device_ids
from fedspine.fleets.rounds import LOST, Devices, MessageLosses, Totals, Waits, mean_wait, round_row
from fedspine.fleets.simulated_world import (
    Clock,
    PendingReply,
    ServedSnapshot,
    Snapshot,
    World,
)


class SimulatedFleet:
    """A view of the simulated devices: all of them, or a part, on a clock of its own or a shared
    one.

    `fedspine.run` makes one from a recipe. Without workers it serves no asks, but time passes:

    >>> from fedspine import SimulatedFleet
    >>> from fedspine.fleets.hardware import Hardware
    >>> from fedspine.fleets.simulated import profiles
    >>> from fedspine.fleets.simulated_world import World
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
        losses: MessageLosses | None = None,
    ) -> None:
        self._world = world
        self._devices = world.profiles if devices is None else devices
        self._pending_of = self._devices if pending_of is None else pending_of
        self._clock = clock or Clock()
        self._losses = losses or MessageLosses()

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

    @property
    def server(self) -> Server:
        return self._world.server

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        self._check(orders)
        started, replies, seconds = self.now, [], []
        declined: list[str] = []
        with self._world.devices_wall.served():
            for device, order, served, cost in self._world.exchange(work, orders):
                seconds.append(min(cost.seconds, within))
                declined += [] if served.declined is None else [served.declined]
                if self._received(work, device, served, cost, within):
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
                arrives = self._received(work, device, served, cost)
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
                        result=np.frombuffer(served.result if arrives else b"", np.uint8),
                        cost=vars(cost),
                    )
                )
                world.sent += 1

    def next(self) -> Reply[Any]:
        world, mine = self._world, {profile.id for profile in self._pending_of}
        while True:
            pending = (entry for entry in world.pending if entry.device in mine)
            entry = min(pending, key=lambda entry: (entry.due, entry.number), default=None)
            if entry is None:
                raise Idle("no reply is under way; send an order first")
            world.pending.remove(entry)
            self._clock.now = max(self.now, entry.due)
            if len(entry.result):  # it was not lost
                break
        world.totals.late += world.round > entry.round
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
        self._world.records.note(self.now, values)

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return {}  # replies are checked around the fleet: see `fleets.checked`

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """The true seconds of an exchange of this cost in this round, for the oracle controller.

        They follow from the power mode and the link's mean bandwidth, without jitter.
        """
        self._check((device,))
        spent = {
            "flops": flops,
            "launches": launches,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
        }
        return self._world.timing(device, None, **spent).total

    def losing(self, losses: MessageLosses) -> "SimulatedFleet":
        return SimulatedFleet(self._world, self._devices, self._clock, self._pending_of, losses)

    # the run loop's part of the interface: see `fedspine.fleets.rounds`

    clock = "simulated"
    quorum = 1

    def cohort(self, ids: Iterable[DeviceId]) -> "SimulatedFleet":
        return SimulatedFleet(self._world, self._part(ids), self._clock, pending_of=self._devices)

    @property
    def in_flight(self) -> Mapping[DeviceId, int]:
        return {entry.device: self._world.round - entry.round for entry in self._world.pending}

    def begin_round(self, round: int) -> Totals:
        """Set power modes and links to those of `round`; returns its totals, which the fleet
        updates.

        The first round is charged for the exchanges before it.
        """
        self._world.round = self._world.records.round = round
        self._world.unanswered.clear()
        self._world.totals, self._world.waits, self._world.devices_wall = (
            Totals(),
            Waits(),
            Devices(),
        )
        if round == 0 and self._world.early:
            seconds = [self._world.charge(early, self.now) for early in self._world.early]
            self._clock.now += max(seconds)
            self._world.totals.waiting_seconds += mean_wait(seconds)
        return self._world.totals

    def end_round(self, wall_seconds: float) -> None:
        """Write the round's totals down."""
        world = self._world
        row = round_row(
            world.totals, world.waits, world.devices_wall, now=self.now, wall_seconds=wall_seconds
        )
        world.records.write("round", **row)

    def snapshot(self) -> Snapshot:
        saved = {
            "now": self.now,
            "asks": dict(self._world.asks),
            "pending": tuple(self._world.pending),
        }
        memory = self._world.server.memory
        return ServedSnapshot(**saved, server=memory) if memory else Snapshot(**saved)

    def restore(self, snapshot: Snapshot, memories: Mapping[DeviceId, str]) -> None:
        """Resume from a snapshot; the store must hold the memories it names."""
        world = self._world
        self._clock.now = snapshot.now
        world.asks, world.memories, world.changed = dict(snapshot.asks), dict(memories), {}
        world.pending = list(snapshot.pending)
        world.server.restore(snapshot.server if isinstance(snapshot, ServedSnapshot) else {})
        world.sent = max((entry.number + 1 for entry in snapshot.pending), default=0)

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        """The store's file of every device's memory; memories that changed since the last save are
        written first.
        """
        self._world.keep_memories()
        return self._world.memories

    def _received(
        self,
        work: Work[Any, Any],
        device: DeviceId,
        served: Served,
        cost: Cost,
        within: float = inf,
    ) -> bool:
        """Write an exchange down, and keep the device's memory if its reply arrives in time.
        Returns whether it does.
        """
        lost = LOST if device in self._losses.replies else None
        late = cost.seconds > self._losses.limit(device, within)
        arrives = not late and lost is None and served.declined is None
        self._world.settle(device, served, arrives)
        why = lost or served.declined
        self._world.record(work, device, self.now, cost, served, lost=not arrives, left_out=why)
        return arrives

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
