"""A fleet around a fleet that loses devices and delays replies, to see how a method copes."""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any

import numpy as np

from fedspine.device import DeviceId, O, R, Work
from fedspine.fleet import Cost, Fleet, Profile, Reply, T


class Lossy:
    """Each order is lost with probability `drop`, half of the time before it arrives and half after the work is done.

    `delay_seconds` is the mean of an exponential delay that every reply gets on top. What is lost follows from `seed`
    and the fleet's clock alone, so a resumed run loses the same replies.
    """

    def __init__(self, fleet: Fleet, *, drop: float = 0.0, delay_seconds: float = 0.0, seed: int = 0) -> None:
        if not 0 <= drop <= 1 or delay_seconds < 0:
            raise ValueError(f"0 <= drop <= 1 and delay_seconds >= 0 were expected, {drop} and {delay_seconds} came")
        self._fleet, self._drop, self._delay, self._seed = fleet, drop, delay_seconds, seed

    @property
    def devices(self) -> tuple[Profile, ...]:
        return self._fleet.devices

    @property
    def now(self) -> float:
        return self._fleet.now

    def ask(self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf) -> list[Reply[R]]:
        rng, ids = self._rng(), list(orders)
        lost, before = rng.random(len(ids)) < self._drop, rng.random(len(ids)) < 0.5
        delays = rng.exponential(self._delay, len(ids)) if self._delay else np.zeros(len(ids))
        reached = {id: orders[id] for id, gone in zip(ids, lost & before, strict=True) if not gone}
        silent = {id for id, gone in zip(ids, lost, strict=True) if gone}
        for id in sorted(silent):
            self.note(device=id, left_out="lost")
        delay_of = dict(zip(ids, delays, strict=True))
        started = self._fleet.now
        replies = [
            _later(reply, delay_of[reply.device])
            for reply in self._fleet.ask(work, reached, within=within)
            if reply.device not in silent
        ]
        punctual = [reply for reply in replies if reply.cost.seconds <= within]
        # everybody who answers late, or never, is waited for until the time is up
        end = max((reply.cost.seconds for reply in replies), default=0.0)
        self._fleet.wait(max(0.0, min(end, within) - (self._fleet.now - started)))
        return punctual

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        kept = self._rng().random(len(orders)) >= self._drop
        self._fleet.send(work, {id: orders[id] for id, keep in zip(orders, kept, strict=True) if keep})

    def next(self) -> Reply[Any]:
        return self._fleet.next()

    def only(self, ids: Iterable[DeviceId]) -> "Lossy":
        return self._around(self._fleet.only(ids))

    def together(self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]) -> dict[str, T]:
        return self._fleet.together(lambda name, part: job(name, self._around(part)), groups)

    def wait(self, seconds: float) -> None:
        self._fleet.wait(seconds)

    def note(self, **values: Any) -> None:
        self._fleet.note(**values)

    def _around(self, fleet: Fleet) -> "Lossy":
        return Lossy(fleet, drop=self._drop, delay_seconds=self._delay, seed=self._seed)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self._seed, *np.float64(self.now).tobytes()])


def _later(reply: Reply[R], seconds: float) -> Reply[R]:
    cost = reply.cost
    late = Cost(cost.bytes_down, cost.bytes_up, cost.flops, cost.peak_memory_bytes, cost.seconds + float(seconds))
    return Reply(device=reply.device, value=reply.value, cost=late)
