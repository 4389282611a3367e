"""A fleet of real machines over NVIDIA FLARE: one device per site, in wall-clock time.

Methods see the interface of the simulated fleet. `fedspine.flare.session` holds the state of the
sites. On this side only `fedspine.flare.link` and `fedspine.flare.startup_kit` use NVIDIA FLARE, on
the sites and the server `fedspine.flare.app`.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from math import inf
from statistics import median
from typing import Any

import torch

from fedspine.core.aggregation import Aggregation
from fedspine.core.device import DeviceId, O, R, Work, find_work, name_of
from fedspine.core.fleet import AllLost, Cost, Fleet, Idle, Profile, Reply, T
from fedspine.core.server_optimiser import Server
from fedspine.flare.session import Declined, FlareSession
from fedspine.flare.site_state import (
    AskResult,
    FlareSnapshot,
    InFlight,
    RelayLost,
    Sent,
    ServedFlareSnapshot,
    SiteSnapshot,
    SiteState,
    TimeLimit,
)
from fedspine.flare.wire import Opened
from fedspine.fleets.rounds import Devices, MessageLosses, Totals, Waits, mean_wait, round_row

OPEN_SECONDS = 600.0  # for a site to load model and rows
CHECK_SECONDS = 2.0  # between two checks of which sites are there
MOST_TIMES = 1000  # times the median of the others' rows: the most rows that a site may declare


class FlareFleet:
    """A view of the sites: all of them, or a part."""

    clock = "fleet"

    def __init__(
        self,
        session: FlareSession,
        ids: tuple[DeviceId, ...] | None = None,
        *,
        all_pending: bool = False,
        losses: MessageLosses | None = None,
    ) -> None:
        self._session, self._ids, self._all_pending = session, ids, all_pending or ids is None
        self._losses = losses or MessageLosses()

    @property
    def devices(self) -> tuple[Profile, ...]:
        sites, share = self._session.sites, self._session.timeouts.largest_share
        ids = sites if self._ids is None else self._ids
        return tuple(replace(sites[id].profile, largest_share=share) for id in ids)

    @property
    def quorum(self) -> int:
        return self._session.timeouts.quorum

    @property
    def now(self) -> float:
        return self._session.now

    @property
    def base(self) -> Any:
        return self._session.base

    @property
    def aggregation(self) -> Aggregation:
        return self._session.aggregation

    @property
    def server(self) -> Server:
        return self._session.server

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        self._check(orders)
        session, started = self._session, self.now
        built = {id: orders[id] for id in orders}
        under_way = {
            id: session.dispatch(id, work, order, within, self._losses)
            for id, order in built.items()
        }
        with session.devices_wall.served():
            came = {id: future.result() for id, future in under_way.items()}
        with session.lock:
            session.totals.waiting_seconds += mean_wait([one.cost.seconds for one in came.values()])
        for id, one in came.items():
            session.record(work.__name__, id, started, one)
        session.waits.asked(orders, started, self.now)
        replies = [
            Reply(device=id, value=one.value, cost=one.cost, order=built[id])
            for id, one in came.items()
            if one.missing is None
        ]
        self._check_quorum(came.values())
        return replies

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        self._check(orders)
        for id in orders:
            self._send(id, work, orders[id], self._session.round)

    def next(self) -> Reply[Any]:
        session = self._session
        while waiting := self._visible(session.pending):
            with session.devices_wall.served():
                done, _ = wait([entry.came for entry in waiting], return_when=FIRST_COMPLETED)
            entry = next(entry for entry in waiting if entry.came in done)
            session.pending.remove(entry)
            came = entry.came.result()
            session.record(entry.work.__name__, entry.device, entry.started, came)
            if came.missing is None:
                with session.lock:
                    session.totals.late += session.round > entry.round
                session.waits.busy(entry.device, entry.started, entry.started + came.cost.seconds)
                return Reply(
                    device=entry.device,
                    value=came.value,
                    cost=came.cost,
                    order=entry.order,
                    late=session.round - entry.round,
                )
        self._check_quorum([entry.came.result() for entry in self._visible(session.sent.values())])
        raise Idle("no reply is under way; send an order first")

    def only(self, ids: Iterable[DeviceId]) -> "FlareFleet":
        return FlareFleet(self._session, self._part(ids))

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
        self._session.note(**values)

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return {}  # replies are checked around the fleet: see `fleets.checked`

    def foresee(self, device: DeviceId, **cost: float) -> None:
        """None: the time of a real site is unknown."""

    def losing(self, losses: MessageLosses) -> "FlareFleet":
        return FlareFleet(self._session, self._ids, all_pending=self._all_pending, losses=losses)

    # the run loop's part of the interface: see `fedspine.fleets.rounds`

    def cohort(self, ids: Iterable[DeviceId]) -> "FlareFleet":
        return FlareFleet(self._session, self._part(ids), all_pending=True)

    @property
    def in_flight(self) -> Mapping[DeviceId, int]:
        session = self._session
        return {
            entry.device: session.round - entry.round
            for entry in session.pending
            if not (entry.came.done() and entry.came.result().missing)
        }

    def begin_round(self, round: int) -> Totals:
        session = self._session
        session.round = session.records.round = round
        session.totals, session.sent, session.waits = Totals(), {}, Waits()
        session.devices_wall = Devices()
        self._gather()
        return session.totals

    def end_round(self, wall_seconds: float) -> None:
        session, now = self._session, self.now
        row = round_row(
            session.totals, session.waits, session.devices_wall, now=now, wall_seconds=wall_seconds
        )
        session.records.write("round", **row)

    def snapshot(self) -> FlareSnapshot:
        session = self._session
        for site in session.sites.values():
            site.saved = (*site.saved, site.memory or 0)[-2:]
        saved = {
            "run": session.run,
            "now": self.now,
            "sites": tuple(_site_snapshot(site) for site in session.sites.values()),
            "pending": tuple(_sent(entry) for entry in session.pending),
        }
        memory = session.server.memory
        return ServedFlareSnapshot(**saved, server=memory) if memory else FlareSnapshot(**saved)

    def restore(self, snapshot: FlareSnapshot, memories: Mapping[DeviceId, str]) -> None:
        """Resume from a snapshot; sites that joined since come after those that it names."""
        session, here = self._session, self._session.sites
        session.run, session.began = snapshot.run, time.monotonic() - snapshot.now
        session.sites = {}
        for one in snapshot.sites:
            site = here.pop(one.name, None) or SiteState(
                one.name, one.examples, one.memory_bytes, missed=True
            )
            site.asks, site.memory, site.saved = one.asks, one.memory, (one.memory or 0,)
            session.sites[one.name] = site
        session.sites |= here
        session.server.restore(snapshot.server if isinstance(snapshot, ServedFlareSnapshot) else {})
        for entry in snapshot.pending:
            self._resend(entry)

    @property
    def memories(self) -> Mapping[DeviceId, str]:
        return {}  # the sites keep their own

    def join(self) -> dict[str, str]:
        """Open the run at every site of the current relay; returns the reason of each site that
        refuses.
        """
        session, sites = self._session, self._session.link.sites
        with ThreadPoolExecutor(max(1, len(sites))) as threads:
            answers = threads.map(lambda site: _opened(session, site), sites)
            opened = _without_false(session, dict(zip(sites, answers, strict=True)))
        for name, one in opened.items():
            if isinstance(one, Opened) and name not in session.sites:
                session.sites[name] = SiteState(name, one.examples, one.memory_bytes)
            elif isinstance(one, Opened):
                session.sites[name].missed = False
                session.sites[name].examples = one.examples
        return {name: one for name, one in opened.items() if isinstance(one, str)}

    def _gather(self) -> None:
        """Admit sites that joined or came back, and wait for a quorum; raises AllLost after
        `timeouts.outage`.
        """
        session, end = self._session, time.monotonic() + self._session.timeouts.outage
        while True:
            if self._new_relay_needed():
                self._reconnect(end)
            here = [
                name
                for name in session.link.sites
                if name in session.sites and not session.sites[name].missed
            ]
            if len(here) >= min(session.timeouts.quorum, len(session.sites)):
                return
            if time.monotonic() > end:
                quorum = session.timeouts.quorum
                raise AllLost(f"{len(here)} sites answer, but the quorum is {quorum}")
            time.sleep(CHECK_SECONDS)

    def _new_relay_needed(self) -> bool:
        """Whether a new relay would reach a site that the present one does not."""
        session = self._session
        if session.link.relay is None:
            return True
        absent = set(session.link.connected()) - set(session.link.sites)
        missed = [session.sites[name] for name in session.link.connected() if name in session.sites]
        missed = [site for site in missed if site.missed]
        with ThreadPoolExecutor(max(1, len(missed))) as threads:
            answers = list(threads.map(lambda site: _answers(session, site), missed))
        return bool(absent) or not all(answers)

    def _reconnect(self, end: float) -> None:
        session = self._session
        try:
            session.link.mend(session.link.relay, lambda: time.monotonic() > end)
        except RelayLost as error:
            raise AllLost(str(error)) from None
        for name, why in self.join().items():
            session.note(device=name, left_out=why)

    def _send(self, id: DeviceId, work: Work[Any, Any], order: Any, round: int) -> None:
        session = self._session
        came = session.dispatch(id, work, order, inf, self._losses)
        session.sent[id] = InFlight(id, round, work, order, self.now, came)
        session.pending.append(session.sent[id])

    def _resend(self, entry: Sent) -> None:
        session, work = self._session, find_work(entry.work)
        if entry.cost is None:
            self._send(entry.device, work, entry.order, entry.round)
            return
        came = session.already(AskResult(Cost(**entry.cost), entry.value))
        session.pending.append(
            InFlight(entry.device, entry.round, work, entry.order, self.now, came)
        )

    def _visible(self, entries: Iterable[InFlight]) -> list[InFlight]:
        mine = {profile.id for profile in self.devices}
        return [entry for entry in entries if self._all_pending or entry.device in mine]

    def _check_quorum(self, came: Collection[AskResult]) -> None:
        replied, quorum = sum(one.missing is None for one in came), self._session.timeouts.quorum
        if replied < min(quorum, len(came)):
            refused = [str(one.missing) for one in came if isinstance(one.missing, Declined)]
            why = f" (one {refused[0]})" if refused else ""
            raise AllLost(
                f"{replied} of {len(came)} sites asked replied, but the quorum is {quorum}{why}"
            )

    def _part(self, ids: Iterable[DeviceId]) -> tuple[DeviceId, ...]:
        wanted = set(ids)
        self._check(wanted)
        return tuple(profile.id for profile in self.devices if profile.id in wanted)

    def _check(self, ids: Iterable[DeviceId]) -> None:
        known = {profile.id for profile in self.devices}
        unknown = [id for id in ids if id not in known]
        if unknown:
            raise LookupError(
                f"{unknown[0]} is not in this part of the fleet, which has {len(known)} devices"
            )


def _opened(session: FlareSession, site: str) -> Opened | str:
    try:
        return session.open(site, TimeLimit(OPEN_SECONDS))
    except (TimeoutError, RelayLost) as error:
        return str(error)


def _without_false(
    session: FlareSession, opened: dict[str, Opened | str]
) -> dict[str, Opened | str]:
    """The answers, with a refusal in place of that of a site that declares far more rows than the
    others.
    """
    rows = {name: site.examples for name, site in session.sites.items()}
    rows |= {name: one.examples for name, one in opened.items() if isinstance(one, Opened)}
    for name in opened.keys() & rows.keys():
        others = [count for other, count in rows.items() if other != name]
        usual = median(others) if others else rows[name]
        if rows[name] > MOST_TIMES * usual and isinstance(opened[name], Opened):
            opened[name] = (
                f"it declares {rows[name]} rows, the others {usual:g} in the middle; more than "
                f"{MOST_TIMES} times as many are not believed"
            )
    return opened


def _answers(session: FlareSession, site: SiteState) -> bool:
    try:
        site.missed = not session.answers_ping(site, TimeLimit(CHECK_SECONDS))
    except (TimeoutError, RelayLost):
        return False
    return not site.missed


def _site_snapshot(site: SiteState) -> SiteSnapshot:
    return SiteSnapshot(
        name=site.name,
        examples=site.examples,
        memory_bytes=site.memory_bytes,
        asks=site.asks,
        memory=site.memory,
    )


def _sent(entry: InFlight) -> Sent:
    came = entry.came.result() if entry.came.done() else None
    here = came is not None and came.missing is None
    return Sent(
        device=entry.device,
        round=entry.round,
        work=name_of(entry.work),
        order=entry.order,
        value=came.value if here else None,
        cost=vars(came.cost) if here else None,
    )
