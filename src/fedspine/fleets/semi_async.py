"""A wrapper of a fleet that ends a round at a quorum of its replies, so that it does not wait for
stragglers.

A late reply is not lost, but delivered in the round in which it arrives. A method merges it as a
change (`core.method.on_todays`), as FedBuff does (Nguyen et al. 2022, arXiv:2106.06639). Ours: a
quorum of each round in place of a buffer, and no discount for staleness.
"""

from collections.abc import Mapping
from contextlib import suppress
from math import ceil, inf
from typing import Any

from fedspine.core.device import DeviceId, O, R, Work, name_of
from fedspine.core.fleet import Fleet, Idle, Profile, Reply
from fedspine.fleets.wrapper import FleetWrapper

GIVEN_UP = 3  # rounds after which a reply is given up and its device may be asked again
TINY = 1e-9  # guards against rounding: 0.28 of 25 replies are seven


class SemiAsync(FleetWrapper):
    """The part of a fleet that one round asks; `ask` returns once a share `quorum` has replied.

    This holds for the work named `late_work`, whose late replies the method can merge. They come
    from the `ask` of a later round, in the order of arrival, with `late` set to the number of
    rounds. Until then the device is busy and not among `devices`. After three rounds a reply is
    given up: its device may be asked again, and the reply, if it still comes, is noted and left
    out. Any other work, an ask with a time limit, and parts (`only`, `together`) wait for all
    replies.

    `in_flight` says how many rounds ago each device was sent an order to which no reply has come.
    All other state is the fleet's own, so a new wrapper for a round continues after a resume.
    """

    def __init__(
        self, fleet: Fleet, *, quorum: float, late_work: str, in_flight: Mapping[DeviceId, int]
    ) -> None:
        if not 0 < quorum <= 1:
            raise ValueError(f"expected 0 < quorum <= 1, got {quorum}")
        super().__init__(fleet)
        self._quorum, self._late_work = quorum, late_work
        self._busy = {id for id, rounds in in_flight.items() if rounds < GIVEN_UP}

    @property
    def devices(self) -> tuple[Profile, ...]:
        return tuple(each for each in self._fleet.devices if each.id not in self._busy)

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        if self._quorum == 1 or within < inf or name_of(work) != self._late_work:
            return self._fleet.ask(work, orders, within=within)
        # where nobody is asked, late replies are the round
        counted = set(orders) or set(self._busy)
        self.send(work, orders)
        came: list[Reply[R]] = []
        enough = ceil(self._quorum * len(counted) - TINY)
        with suppress(Idle):  # too many were lost
            while sum(reply.device in counted for reply in came) < enough:
                reply = self.next()
                if reply.late < GIVEN_UP:
                    came.append(reply)
                else:
                    self.note(device=reply.device, left_out="its reply arrived too late")
        return came

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        if busy := [id for id in orders if id in self._busy]:
            raise LookupError(f"{busy[0]} has not replied to an earlier order; ask only `devices`")
        self._fleet.send(work, orders)
        self._busy.update(orders)

    def next(self) -> Reply[Any]:
        try:
            reply = self._fleet.next()
        except Idle:
            self._busy.clear()  # nothing is under way any more
            raise
        if reply.late < GIVEN_UP:
            self._busy.discard(reply.device)
        return reply

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return self._fleet.unusable
