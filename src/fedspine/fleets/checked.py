"""A wrapper of any fleet that checks every reply where it enters, so that a method sees only
results that it can use.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from fedspine.core.checks import Agreeing, Asked, Terms, why_unusable
from fedspine.core.device import DeviceId, O, R, Work
from fedspine.core.fleet import AllLost, Fleet, Idle, Profile, Reply, T
from fedspine.core.schema import result_kind
from fedspine.fleets.wrapper import FleetWrapper


@dataclass
class Exchanges:
    """What is known of pending exchanges, across the rounds of a run."""

    works: dict[DeviceId, Work[Any, Any]] = field(default_factory=dict)  # of what was sent
    agreed: dict[DeviceId, Any] = field(default_factory=dict)  # see `core.checks.Agreeing`


class Checked(FleetWrapper):
    """A fleet whose replies are checked by `core.checks`. A reply that cannot be used is noted and
    left out, as if it had been lost; `unusable` has the reason.

    `everyone` are the devices of the whole fleet, whose replies may be pending. An ask raises
    AllLost if some replies cannot be used and fewer than the `quorum`, but at least one, can; if
    none can, the method decides.
    """

    def __init__(
        self,
        fleet: Fleet,
        terms: Terms,
        *,
        everyone: Iterable[Profile] = (),
        quorum: int = 1,
        exchanges: Exchanges | None = None,
    ) -> None:
        super().__init__(fleet)
        self._terms, self._quorum = terms, quorum
        self._rows = {each.id: each.examples for each in (*fleet.devices, *everyone)}
        self._exchanges = exchanges or Exchanges()
        self._unusable: dict[DeviceId, str] = {}
        self._sent: set[DeviceId] = set()  # by `send`, since nothing was pending

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return self._unusable

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        replies = self._fleet.ask(work, orders, within=within)
        self._forget(orders)
        found = [self._checked(work, reply) for reply in replies]
        good = [reply for reply in found if reply is not None]
        self._check_quorum(len(orders), len(good), received=len(replies))
        return good

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        self._fleet.send(work, orders)
        self._forget(orders)
        self._exchanges.works.update(dict.fromkeys(orders, work))
        self._sent.update(orders)

    def next(self) -> Reply[Any]:
        while True:
            try:
                reply = self._fleet.next()
            except Idle:
                asked, bad = len(self._sent), len(self._sent & self._unusable.keys())
                self._sent.clear()
                self._check_quorum(asked, asked - bad, received=asked)
                raise
            # None after a resume: then the fleet itself has compared the types
            work = self._exchanges.works.pop(reply.device, None)
            if (found := self._checked(work, reply)) is not None:
                return found

    def only(self, ids: Iterable[DeviceId]) -> "Checked":
        return self._around(self._fleet.only(ids))

    def together(
        self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        return self._fleet.together(lambda name, part: job(name, self._around(part)), groups)

    def _forget(self, asked: Iterable[DeviceId]) -> None:
        for device in asked:
            self._unusable.pop(device, None)

    def _checked(self, work: Work[Any, Any] | None, reply: Reply[R]) -> Reply[R] | None:
        """The reply with its weight; None, with a note, if it cannot be used."""
        device, order, agreed = reply.device, reply.order, self._exchanges.agreed
        before = agreed.get(device)
        if isinstance(order, Agreeing):
            before = agreed[device] = order.agreed(before, self._terms)
        kind = Any if work is None else result_kind(work)
        asked = Asked(self._terms, rows=self._rows[device], order=order, agreed=before)
        why = why_unusable(reply.value, kind, asked)
        if why is not None:
            self._unusable[device] = why
            self.note(device=device, left_out=f"cannot be used: {why}")
            return None
        if isinstance(reply.value, Agreeing):
            agreed[device] = reply.value.agreed(before, self._terms)
        return replace(reply, weight=self._rows[device])

    def _check_quorum(self, asked: int, good: int, *, received: int) -> None:
        if received > good and 0 < good < min(self._quorum, asked):
            raise AllLost(
                f"{good} of {asked} devices asked sent what can be used, "
                f"but the quorum is {self._quorum}"
            )

    def _around(self, fleet: Fleet) -> "Checked":
        part = Checked(fleet, self._terms, quorum=self._quorum, exchanges=self._exchanges)
        part._rows = self._rows
        return part
