"""The session of a run with its sites: their state, and asking them over any link.

An ask is a transaction. It names the seed and the memory version to start from, so it can be
repeated with the same result, and only a valid reply within its time limit advances the device. So
a lost site, worker, server or run leaves nothing half done. With an empty secret and no noise at
the sites, the same seed gives the state of the simulated fleet over the same rows.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.checks import MOST_FLOAT, MOST_ROWS, MOST_WHOLE, short
from fedspine.core.device import DeviceId, Work, name_of
from fedspine.core.fleet import Cost
from fedspine.core.message import NotAMessage, pack
from fedspine.core.schema import work_kinds
from fedspine.core.server_optimiser import Server
from fedspine.flare.run_terms import RunTerms
from fedspine.flare.site_state import (
    AskResult,
    InFlight,
    Link,
    RelayLost,
    SiteState,
    TimeLimit,
    Timeouts,
)
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.fleets.rounds import LOST, Devices, MessageLosses, Totals, Waits
from fedspine.storage.records import Records

PING_SECONDS = 5.0
READY_SECONDS = 120.0  # for a site to start a worker that loads model and rows
MOST_SHOWN = 200  # characters of a site's text in the records
KIND = "site"  # the kind of device in the records


class Declined(str):
    """The reason, in the site's words, why a reachable site refuses by its own terms."""


@dataclass
class FlareSession:
    """The mutable state shared by all views of a fleet."""

    link: Link
    base: Any
    terms: RunTerms
    seed: int
    run: str
    timeouts: Timeouts
    aggregation: Aggregation = Mean()
    server: Server = field(default_factory=Server)
    # None until the run begins, after its sites were asked to take part
    records: Records | None = None
    sites: dict[DeviceId, SiteState] = field(default_factory=dict)
    pending: list[InFlight] = field(default_factory=list)
    # the last order of each device in this round
    sent: dict[DeviceId, InFlight] = field(default_factory=dict)
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
        self,
        device: DeviceId,
        work: Work[Any, Any],
        order: Any,
        within: float,
        losses: MessageLosses,
    ) -> Future[AskResult]:
        """Queue an order for its site, with a time limit of `within` seconds from now."""
        end = TimeLimit(min(losses.limit(device, within), self.timeouts.within))
        site, lost = self.sites[device], device in losses.replies
        return site.line.submit(self._execute, site, work, order, end, lost)

    def _execute(
        self, site: SiteState, work: Work[Any, Any], order: Any, end: TimeLimit, lost: bool
    ) -> AskResult:
        torch.set_num_threads(1)
        began, payload = time.monotonic(), pack(order).payload
        try:
            came = self._asked(site, work, payload, end, lost)
        except (TimeoutError, RelayLost) as error:
            came = str(error)
        site.missed = isinstance(came, str) and not isinstance(came, Declined)
        spent = came if isinstance(came, tuple) else (None, None)
        return _ask_result(
            spent, came if isinstance(came, str) else None, len(payload), time.monotonic() - began
        )

    def _asked(
        self, site: SiteState, work: Work[Any, Any], payload: bytes, end: TimeLimit, lost: bool
    ) -> Any:
        """The result and the site's answer, or a line with the reason why there is none."""
        if site.missed and not self.answers_ping(site, end):
            return "does not answer"
        for _ in range(3):  # again after the run was opened anew, and after memory was lost
            asked = SiteOrder(
                run=self.run,
                work=name_of(work),
                order=as_array(payload),
                seed=(self.seed, list(self.sites).index(site.name), site.asks),
                round=self.round,
                memory=site.memory,
                version=site.asks + 1,
                needed=site.saved,
            )
            reply = self.exchange(site.name, asked, end, SiteAnswer, NotDone)
            match reply:
                case SiteAnswer():
                    return LOST if lost else self._taken(site, work, reply)
                case NotDone(reason="not opened"):
                    opened = self.open(site.name, end)
                    if not isinstance(opened, Opened):
                        return opened
                case NotDone(reason="memory lost"):
                    self.note(device=site.name, memory="lost; it starts afresh")
                    site.memory = None
                case NotDone(reason="refused"):
                    return Declined(f"refuses the order: {one_line(reply.detail)}")
                case NotDone(reason="bad order", detail=detail):
                    return f"cannot use the order: {one_line(detail)}"
                case NotDone():
                    return reply.reason
                case str():
                    return reply
        return "could not be opened"

    def _taken(self, site: SiteState, work: Work[Any, Any], reply: SiteAnswer) -> Any:
        if why := false_cost(reply):
            return f"its answer cannot be used: {why}"
        try:
            value = decoded(reply.result, work_kinds(work)[1])
        except NotAMessage as error:
            return f"its result cannot be used: {error}"
        site.asks += 1
        site.memory = site.asks
        return value, reply

    def answers_ping(self, site: SiteState, end: TimeLimit) -> bool:
        """Whether a site answers a ping; raises TimeoutError, RelayLost."""
        return self._with_retries(
            site.name, lambda left: self.link.ping(site.name, min(PING_SECONDS, left)), end
        )

    def open(self, site: str, end: TimeLimit) -> Opened | str:
        """Open the run at a site; returns a line with the reason if it does not join."""
        asked = Opening(run=self.run, terms=self.terms)
        reply = self.exchange(site, asked, end, Opened, NotDone)
        match reply:
            case NotDone():
                return Declined(one_line(reply.detail or reply.reason))
            case Opened():
                return false_count(reply) or reply
        return reply

    def exchange(self, site: str, asked: Any, end: TimeLimit, *kinds: type) -> Any:
        """A site's reply of one of these types, or a line with the reason why there is none; raises
        TimeoutError, RelayLost.
        """
        payload = pack(asked).payload
        status, reply = self._with_retries(
            site, lambda left: self.link.exchange(site, payload, left), end
        )
        if status != "done":
            return FAILURES.get(status, FAILURES["unreachable"])
        try:
            return decoded(reply, *kinds)
        except NotAMessage as error:
            return f"its reply cannot be read: {error}"

    def _with_retries(self, site: str, attempt: Callable[[float], Any], end: TimeLimit) -> Any:
        """The value of `attempt`, repeated with a new relay while there is time; every message can
        safely be sent twice. Raises TimeoutError, RelayLost.
        """
        while True:
            left, relay = end.left, self.link.relay
            if left <= 0:
                raise TimeoutError("no time was left")
            try:
                return attempt(left)
            except RelayLost:
                outage = TimeLimit(self.timeouts.outage)
                self.link.mend(relay, lambda until=outage: until.left <= 0)
                self._note_lost_relay(relay)
                self._prepare(site)
                end.at = time.monotonic() + left  # the site does not lose the time of the outage

    def _prepare(self, site: str) -> None:
        """Open the run at a site under a new relay, whose site object starts a new worker."""
        with suppress(RelayLost):  # the next attempt reports it
            self.link.exchange(
                site, pack(Opening(run=self.run, terms=self.terms)).payload, READY_SECONDS
            )

    @staticmethod
    def already(came: AskResult) -> "Future[AskResult]":
        """A future that already has its reply."""
        future: Future[AskResult] = Future()
        future.set_result(came)
        return future

    def _note_lost_relay(self, relay: str | None) -> None:
        with self.lock:
            known, self.lost_relay = self.lost_relay, relay
        if relay != known and self.records is not None:
            self.note(relay="lost; another took its place and what was under way was sent again")

    def record(self, work: str, device: DeviceId, started: float, came: AskResult) -> None:
        """Write one exchange to the records and add it to the round's totals."""
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
                **({} if came.epsilon is None else {"epsilon": came.epsilon}),
                **({} if came.noise is None else {"noise": came.noise}),
            )
        if lost:
            self.note(device=device, left_out=came.missing)

    def note(self, **values: Any) -> None:
        with self.lock:
            self.records.note(self.now, values)


def false_count(opened: Opened) -> str | None:
    """What is wrong with the numbers that a site declares; None if nothing is."""
    for name, most in (("examples", MOST_ROWS), ("memory_bytes", MOST_WHOLE)):
        if not 1 <= getattr(opened, name) <= most:
            got = short(getattr(opened, name))
            return f"it declares {name} of {got}, but 1 to {most} was expected"
    return None


def false_cost(answer: SiteAnswer) -> str | None:
    """What is wrong with the numbers of an answer beside its result; None if nothing is. Methods
    plan by these numbers, and the records have them.
    """
    for name, came in vars(answer).items():
        if isinstance(came, int | float):
            most = MOST_WHOLE if isinstance(came, int) else MOST_FLOAT
            if not 0 <= came <= most:  # nor for nan
                return f"{name} is {short(came)}, but 0 to {short(most)} was expected"
    return None


def one_line(text: str) -> str:
    """The untrusted text of a site as a short line that a terminal can show.

    >>> one_line("a" + chr(27) + "[2J" + chr(10) + "b"), len(one_line("c" * 500))
    ('a [2J b', 200)
    """
    return "".join(sign if sign.isprintable() else " " for sign in text)[:MOST_SHOWN]


FAILURES = {
    "late": "did not reply in time; its worker was restarted",
    "died": "its worker ended before it replied and was restarted",
    "refused": "does not take messages of this size or from here",
    "unreachable": "does not answer",
}


def _ask_result(spent: Any, missing: str | None, bytes_down: int, seconds: float) -> AskResult:
    value, answer = spent
    if answer is None:
        return AskResult(Cost(bytes_down, 0, 0.0, 0, seconds), missing=missing)
    cost = Cost(
        bytes_down=bytes_down,
        bytes_up=len(answer.result),
        flops=answer.flops,
        peak_memory_bytes=answer.peak_memory_bytes,
        seconds=seconds,
        compute_seconds=min(answer.compute_seconds, seconds),  # as the site says
    )
    private = {"epsilon": answer.epsilon, "noise": answer.noise}
    return AskResult(cost, value, answer.samples, **private)
