"""A fleet of real machines over NVIDIA FLARE: one device per site, on the clock on the wall.

Methods see what they see of a simulated fleet. What a run knows of its sites is in `fedspine.flare.session`, what
NVFlare has to do with it in `flare_link` on this side and `flare_app` on the others.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from math import inf
from typing import Any

import numpy as np
import torch

from fedspine.core.device import DeviceId, O, R, Work, find_work, name_of
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Profile, Reply, T
from fedspine.flare.session import Party
from fedspine.flare.site_state import (
    Came,
    Deadline,
    FlareSnapshot,
    Member,
    Pending,
    RelayLost,
    Sent,
    SiteStanding,
)
from fedspine.flare.wire import Opened
from fedspine.fleets.rounds import Devices, Totals, Waits

OPEN_SECONDS = 600.0  # for a site to load model and rows
LOOK_SECONDS = 2.0  # between two looks at who is there


class FlareFleet:
    """A view of the sites: all of them, or a part."""

    clock = "fleet"

    def __init__(
        self, party: Party, ids: tuple[DeviceId, ...] | None = None, *, hears_all: bool = False
    ) -> None:
        self._party, self._ids, self._hears_all = party, ids, hears_all or ids is None

    @property
    def devices(self) -> tuple[Profile, ...]:
        members = self._party.members
        return tuple(members[id].profile for id in (members if self._ids is None else self._ids))

    @property
    def now(self) -> float:
        return self._party.now

    @property
    def base(self) -> Any:
        return self._party.base

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        self._check(orders)
        party, started = self._party, self.now
        under_way = {id: party.dispatch(id, work, orders[id], within) for id in orders}
        with party.devices_wall.served():
            came = {id: future.result() for id, future in under_way.items()}
        seconds = [one.cost.seconds for one in came.values()]
        with party.lock:
            party.totals.waiting_seconds += (
                float(np.mean(max(seconds) - np.array(seconds))) if seconds else 0.0
            )
        for id, one in came.items():
            party.record(work.__name__, id, started, one)
        party.waits.asked(orders, started, self.now)
        replies = [
            Reply(device=id, value=one.value, cost=one.cost)
            for id, one in came.items()
            if one.missing is None
        ]
        self._check_quorum(came.values())
        return replies

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        self._check(orders)
        party = self._party
        for id in orders:
            order = orders[id]
            entry = Pending(id, work, order, self.now, party.dispatch(id, work, order, inf))
            party.pending.append(entry)
            party.sent[id] = entry

    def next(self) -> Reply[Any]:
        party = self._party
        while waiting := self._heard(party.pending):
            with party.devices_wall.served():
                done, _ = wait([entry.came for entry in waiting], return_when=FIRST_COMPLETED)
            entry = next(entry for entry in waiting if entry.came in done)
            party.pending.remove(entry)
            came = entry.came.result()
            party.record(entry.work.__name__, entry.device, entry.started, came)
            if came.missing is None:
                party.waits.busy(entry.device, entry.started, entry.started + came.cost.seconds)
                return Reply(device=entry.device, value=came.value, cost=came.cost)
        self._check_quorum([entry.came.result() for entry in self._heard(party.sent.values())])
        raise Idle("no reply is under way; send an order first")

    def only(self, ids: Iterable[DeviceId]) -> "FlareFleet":
        return FlareFleet(self._party, self._part(ids))

    def together(
        self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        parts = {name: self.only(ids) for name, ids in groups.items()}
        with ThreadPoolExecutor(
            max(1, len(parts)), initializer=torch.set_num_threads, initargs=(1,)
        ) as threads:
            running = {name: threads.submit(job, name, part) for name, part in parts.items()}
            return {name: future.result() for name, future in running.items()}

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def note(self, **values: Any) -> None:
        self._party.note(**values)

    def foresee(self, device: DeviceId, **cost: float) -> None:
        """Nobody knows how long a real site will take."""

    # what the run loop needs besides: see `fedspine.fleets.rounds`

    def cohort(self, ids: Iterable[DeviceId]) -> "FlareFleet":
        return FlareFleet(self._party, self._part(ids), hears_all=True)

    def begin_round(self, round: int) -> Totals:
        party = self._party
        party.round = party.records.round = round
        party.totals, party.sent, party.waits = Totals(), {}, Waits()
        party.devices_wall = Devices()
        self._gather()
        return party.totals

    def end_round(self, wall_seconds: float) -> None:
        totals = self._party.totals
        totals.waiting_seconds += self._party.waits.mean(self.now)
        totals.server_wall_seconds += max(0.0, wall_seconds - self._party.devices_wall.seconds)
        self._party.records.write(
            "round",
            now=self.now,
            devices=totals.exchanges,
            lost=totals.lost,
            waiting_seconds=totals.waiting_seconds,
            bytes_up=totals.bytes_up,
            bytes_down=totals.bytes_down,
            wall_seconds=wall_seconds,
            server_wall_seconds=totals.server_wall_seconds,
        )

    def snapshot(self) -> FlareSnapshot:
        party = self._party
        for member in party.members.values():
            member.saved = (*member.saved, member.memory or 0)[-2:]
        return FlareSnapshot(
            run=party.run,
            now=self.now,
            sites=tuple(_standing(member) for member in party.members.values()),
            pending=tuple(_sent(entry) for entry in party.pending),
        )

    def restore(self, snapshot: FlareSnapshot, memories: Mapping[DeviceId, str]) -> None:
        """Go on from a snapshot; sites that joined since keep their place after those it names."""
        party, here = self._party, self._party.members
        party.run, party.began = snapshot.run, time.monotonic() - snapshot.now
        party.members = {}
        for one in snapshot.sites:
            member = here.pop(one.name, None) or Member(
                one.name, one.examples, one.memory_bytes, missed=True
            )
            member.asks, member.memory, member.saved = one.asks, one.memory, (one.memory or 0,)
            party.members[one.name] = member
        party.members |= here
        for entry in snapshot.pending:
            self._resend(entry)

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        return {}  # the sites keep their own

    def join(self) -> dict[str, str]:
        """Have every site of the present relay take part; returns, by site, why one does not."""
        party, sites = self._party, self._party.link.sites
        with ThreadPoolExecutor(max(1, len(sites))) as threads:
            answers = threads.map(lambda site: _opened(party, site), sites)
            opened = dict(zip(sites, answers, strict=True))
        for name, one in opened.items():
            if isinstance(one, Opened) and name not in party.members:
                party.members[name] = Member(name, one.examples, one.memory_bytes)
            elif isinstance(one, Opened):
                party.members[name].missed = False
        return {name: one for name, one in opened.items() if isinstance(one, str)}

    def _gather(self) -> None:
        """Let in whoever came or came back, and wait for a quorum of sites; raises AllLost when patience ends."""
        party, end = self._party, time.monotonic() + self._party.patience.outage
        while True:
            if self._somebody_waits():
                self._reconnect(end)
            here = [
                name
                for name in party.link.sites
                if name in party.members and not party.members[name].missed
            ]
            if len(here) >= min(party.patience.quorum, len(party.members)):
                return
            if time.monotonic() > end:
                raise AllLost(f"{len(here)} sites answer, {party.patience.quorum} are the quorum")
            time.sleep(LOOK_SECONDS)

    def _somebody_waits(self) -> bool:
        """Whether a new relay would reach a site that the present one does not."""
        party = self._party
        if party.link.relay is None:
            return True
        absent = set(party.link.connected()) - set(party.link.sites)
        missed = [party.members[name] for name in party.link.connected() if name in party.members]
        missed = [member for member in missed if member.missed]
        with ThreadPoolExecutor(max(1, len(missed))) as threads:
            answers = list(threads.map(lambda member: _answers(party, member), missed))
        return bool(absent) or not all(answers)

    def _reconnect(self, end: float) -> None:
        party = self._party
        try:
            party.link.mend(party.link.relay, lambda: time.monotonic() > end)
        except RelayLost as error:
            raise AllLost(str(error)) from None
        for name, why in self.join().items():
            party.note(device=name, left_out=why)

    def _resend(self, entry: Sent) -> None:
        party, work = self._party, find_work(entry.work)
        if entry.cost is None:
            self.send(work, {entry.device: entry.order})
            return
        came = Came(Cost(**entry.cost), entry.value)
        party.pending.append(
            Pending(entry.device, work, entry.order, self.now, party.already(came))
        )

    def _heard(self, entries: Iterable[Pending]) -> list[Pending]:
        mine = {profile.id for profile in self.devices}
        return [entry for entry in entries if self._hears_all or entry.device in mine]

    def _check_quorum(self, came: Collection[Came]) -> None:
        replied, quorum = sum(one.missing is None for one in came), self._party.patience.quorum
        if replied < min(quorum, len(came)):
            raise AllLost(f"of {len(came)} sites asked {replied} replied, {quorum} are the quorum")

    def _part(self, ids: Iterable[DeviceId]) -> tuple[DeviceId, ...]:
        wanted = set(ids)
        self._check(wanted)
        return tuple(profile.id for profile in self.devices if profile.id in wanted)

    def _check(self, ids: Iterable[DeviceId]) -> None:
        known = {profile.id for profile in self.devices}
        strangers = [id for id in ids if id not in known]
        if strangers:
            raise LookupError(
                f"{strangers[0]} is not in this part of the fleet, which has {len(known)} devices"
            )


def _opened(party: Party, site: str) -> Opened | str:
    try:
        return party.open(site, Deadline(OPEN_SECONDS))
    except (TimeoutError, RelayLost) as error:
        return str(error)


def _answers(party: Party, member: Member) -> bool:
    try:
        member.missed = not party.reached(member, Deadline(LOOK_SECONDS))
    except (TimeoutError, RelayLost):
        return False
    return not member.missed


def _standing(member: Member) -> SiteStanding:
    return SiteStanding(
        name=member.name,
        examples=member.examples,
        memory_bytes=member.memory_bytes,
        asks=member.asks,
        memory=member.memory,
    )


def _sent(entry: Pending) -> Sent:
    came = entry.came.result() if entry.came.done() else None
    here = came is not None and came.missing is None
    return Sent(
        device=entry.device,
        work=name_of(entry.work),
        order=entry.order,
        value=came.value if here else None,
        cost=vars(came.cost) if here else None,
    )
