"""What a run knows of its sites and how it asks one of them, whatever carries the messages.

An ask is a transaction. It names the memory that the site is to work from and the seed, so it may be repeated and gives
the same bytes; only a reply that arrived in time and can be used moves the device on. So a lost site, worker, server or
run leaves nothing half done, and the same seed gives the same state as the simulated fleet over the same rows.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fedspine.core.device import DeviceId, Work, name_of
from fedspine.core.fleet import Cost
from fedspine.core.message import NotAMessage, pack
from fedspine.flare.run_terms import Terms
from fedspine.flare.schema import work_kinds
from fedspine.flare.site_state import Came, Deadline, Link, Member, Patience, Pending, RelayLost
from fedspine.flare.validate import misfit
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.fleets.rounds import Devices, Totals, Waits
from fedspine.storage.records import Records

PING_SECONDS = 5.0
READY_SECONDS = 120.0  # for a site to start a worker, and for that to load model and rows
KIND = "site"  # in the records, where simulated devices have their kind


@dataclass
class Party:
    """The one mutable thing behind all views of a fleet."""

    link: Link
    base: Any
    terms: Terms
    seed: int
    run: str
    patience: Patience
    records: Records | None = (
        None  # of the run, which begins after its sites were asked to take part
    )
    members: dict[DeviceId, Member] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    sent: dict[DeviceId, Pending] = field(
        default_factory=dict
    )  # the last order of each device in this round
    waits: Waits = field(default_factory=Waits)  # of this round
    devices_wall: Devices = field(default_factory=Devices)  # of this round
    round: int = 0
    totals: Totals = field(default_factory=Totals)
    lost_relay: str | None = None  # the last one
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def dispatch(
        self, device: DeviceId, work: Work[Any, Any], order: Any, within: float
    ) -> Future[Came]:
        """Put an order into its site's line; it is given at most `within` seconds from now."""
        end = Deadline(min(within, self.patience.within))
        return self.members[device].line.submit(
            self._carried_out, self.members[device], work, order, end
        )

    def _carried_out(self, member: Member, work: Work[Any, Any], order: Any, end: Deadline) -> Came:
        torch.set_num_threads(1)
        began, payload = time.monotonic(), pack(order).payload
        try:
            came = self._asked(member, work, payload, order, end)
        except (TimeoutError, RelayLost) as error:
            came = str(error)
        member.missed = isinstance(came, str)
        spent = came if isinstance(came, tuple) else (None, None)
        return _came(
            spent, came if isinstance(came, str) else None, len(payload), time.monotonic() - began
        )

    def _asked(
        self, member: Member, work: Work[Any, Any], payload: bytes, order: Any, end: Deadline
    ) -> Any:
        """The result and the site's answer, or in words why there is none."""
        if member.missed and not self.reached(member, end):
            return "does not answer"
        for _ in range(3):  # opened anew, and with its memory lost, it is asked again
            asked = SiteOrder(
                run=self.run,
                work=name_of(work),
                order=as_array(payload),
                seed=(self.seed, list(self.members).index(member.name), member.asks),
                round=self.round,
                memory=member.memory,
                version=member.asks + 1,
                needed=member.saved,
            )
            reply = self.exchange(member.name, asked, end, SiteAnswer, NotDone)
            match reply:
                case SiteAnswer():
                    return self._taken(member, work, order, reply)
                case NotDone(why="not opened"):
                    opened = self.open(member.name, end)
                    if not isinstance(opened, Opened):
                        return opened
                case NotDone(why="memory lost"):
                    self.note(device=member.name, memory="lost; it starts anew")
                    member.memory = None
                case NotDone():
                    return reply.why
                case str():
                    return reply
        return "could not be opened"

    def _taken(self, member: Member, work: Work[Any, Any], order: Any, reply: SiteAnswer) -> Any:
        try:
            value = decoded(reply.result.tobytes(), work_kinds(work)[1])
        except NotAMessage as error:
            return f"its result cannot be used: {error}"
        if wrong := misfit(value, order, getattr(self.base, "layout", None)):
            return f"its result cannot be used: {wrong}"
        member.asks += 1
        member.memory = member.asks
        return value, reply

    def reached(self, member: Member, end: Deadline) -> bool:
        """A cheap question before work is sent to a site that missed."""
        return self._persistently(
            member.name, lambda left: self.link.ping(member.name, min(PING_SECONDS, left)), end
        )

    def open(self, site: str, end: Deadline) -> Opened | str:
        """Have a site take part; else in words why it does not."""
        asked = Opening(run=self.run, terms=self.terms)
        reply = self.exchange(site, asked, end, Opened, NotDone)
        return (reply.told or reply.why) if isinstance(reply, NotDone) else reply

    def exchange(self, site: str, asked: Any, end: Deadline, *kinds: type) -> Any:
        """A site's reply of one of these types, or in words why there is none; raises TimeoutError, RelayLost."""
        payload = pack(asked).payload
        outcome, reply = self._persistently(
            site, lambda left: self.link.exchange(site, payload, left), end
        )
        if outcome != "done":
            return OUTCOMES.get(outcome, OUTCOMES["unreachable"])
        try:
            return decoded(reply, *kinds)
        except NotAMessage as error:
            return f"its reply cannot be read: {error}"

    def _persistently(self, site: str, attempt: Callable[[float], Any], end: Deadline) -> Any:
        """Try again with a new relay while there is time: every message may be sent twice."""
        while True:
            left, relay = end.left, self.link.relay
            if left <= 0:
                raise TimeoutError("no time was left")
            try:
                return attempt(left)
            except RelayLost:
                outage = Deadline(self.patience.outage)
                self.link.mend(relay, lambda until=outage: until.left <= 0)
                self._tell_of_loss(relay)
                self._made_ready(site)
                end.at = time.monotonic() + left  # what was lost with the relay is not the site's

    def _made_ready(self, site: str) -> None:
        """Have a site take part under a new relay, for which it first starts a new worker."""
        with suppress(RelayLost):  # then whoever tries again finds out
            self.link.exchange(
                site, pack(Opening(run=self.run, terms=self.terms)).payload, READY_SECONDS
            )

    @staticmethod
    def already(came: Came) -> "Future[Came]":
        """A reply that is here, as if it were still to come."""
        future: Future[Came] = Future()
        future.set_result(came)
        return future

    def _tell_of_loss(self, relay: str | None) -> None:
        with self.lock:
            known, self.lost_relay = self.lost_relay, relay
        if relay != known and self.records is not None:
            self.note(relay="lost; another took its place and what was under way was sent again")

    def record(self, work: str, device: DeviceId, started: float, came: Came) -> None:
        """Write one exchange down and add it to the round's totals."""
        cost, lost = came.cost, came.missing is not None
        found = Totals(
            exchanges=1,
            lost=int(lost),
            samples=came.samples,
            bytes_up=cost.bytes_up,
            bytes_down=cost.bytes_down,
            peak_memory_bytes=cost.peak_memory_bytes,
        )
        with self.lock:
            self.totals.add(found)
            self.records.write(
                "exchange",
                device=device,
                kind=KIND,
                work=work,
                started=started,
                **vars(cost),
                lost=lost,
            )
        if lost:
            self.note(device=device, left_out=came.missing)

    def note(self, **values: Any) -> None:
        with self.lock:
            self.records.write("note", now=self.now, values=values)


OUTCOMES = {
    "late": "did not reply in time; its worker was started anew",
    "died": "its worker ended before it replied and was started anew",
    "refused": "does not take messages of this size or from here",
    "unreachable": "does not answer",
}


def _came(spent: Any, missing: str | None, bytes_down: int, seconds: float) -> Came:
    value, answer = spent
    if answer is None:
        return Came(Cost(bytes_down, 0, 0.0, 0, seconds), missing=missing)
    cost = Cost(bytes_down, len(answer.result), answer.flops, answer.peak_memory_bytes, seconds)
    return Came(cost, value, answer.samples)
