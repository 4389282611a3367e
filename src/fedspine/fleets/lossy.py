"""A wrapper of a fleet that loses messages and delays replies, to test how robust a method is."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from fedspine.core.device import DeviceId, O, R, Work
from fedspine.core.fleet import Fleet, Reply, T
from fedspine.fleets.rounds import LOST, LosingFleet, MessageLosses
from fedspine.fleets.wrapper import FleetWrapper


class Lossy(FleetWrapper):
    """A fleet that loses each exchange with probability `drop`: half of them before the order
    arrives, half after the work is done; then the device goes on as if it had not been asked.

    `delay_seconds` is the mean of an exponential delay that is added to every reply to `ask`;
    replies to `send` are not delayed. Losses depend on `seed`, the fleet's clock and this wrapper's
    earlier asks, so a new wrapper for a round loses the same replies after a resume.
    """

    def __init__(
        self, fleet: LosingFleet, *, drop: float = 0.0, delay_seconds: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 <= drop <= 1 or delay_seconds < 0:
            raise ValueError(
                "0 <= drop <= 1 and delay_seconds >= 0 were "
                f"expected, got {drop} and {delay_seconds}"
            )
        super().__init__(fleet)
        self._fleet: LosingFleet = fleet
        self._drop, self._delay, self._seed = drop, delay_seconds, seed
        # shared by all parts, so that each ask is a new draw
        self._draws: Counter[DeviceId] = Counter()

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        luck = {id: self._luck(id) for id in orders}
        delays = {id: self._delay * units for id, (_, units) in luck.items()}
        fleet, left = self._unlucky(luck, orders, delays)
        started = self.now
        replies = [
            _later(reply, delays[reply.device]) for reply in fleet.ask(work, left, within=within)
        ]
        # lost and late replies are waited for until the limit; without a limit a loss is known at
        # once
        ends = [reply.cost.seconds for reply in replies] + [within] * (
            len(replies) < len(luck) and within < inf
        )
        self.wait(max(0.0, max(ends, default=0.0) - (self.now - started)))
        return replies

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        fleet, left = self._unlucky({id: self._luck(id) for id in orders}, orders, {})
        fleet.send(work, left)

    def next(self) -> Reply[Any]:
        return self._fleet.next()

    def only(self, ids: Iterable[DeviceId]) -> "Lossy":
        return self._around(self._fleet.only(ids))

    def together(
        self, job: Callable[[str, Fleet], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        return self._fleet.together(lambda name, part: job(name, self._around(part)), groups)

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        return self._fleet.unusable

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """The fleet's forecast plus the mean delay; None if the fleet has none."""
        seconds = self._fleet.foresee(
            device, flops=flops, launches=launches, bytes_down=bytes_down, bytes_up=bytes_up
        )
        return None if seconds is None else seconds + self._delay

    def _unlucky(
        self,
        luck: Mapping[DeviceId, tuple[float, float]],
        orders: Mapping[DeviceId, O],
        delays: Mapping[DeviceId, float],
    ) -> tuple[Fleet, Mapping[DeviceId, O]]:
        """The fleet, which loses some replies, and the orders that arrive."""
        on_the_way = {id for id, (chance, _) in luck.items() if chance < self._drop / 2}
        silent = {id for id, (chance, _) in luck.items() if chance < self._drop}
        for id in sorted(on_the_way):
            self.note(device=id, left_out=LOST)
        losses = MessageLosses(frozenset(silent - on_the_way), delays)
        return self._fleet.losing(losses), _Without(orders, on_the_way)

    def _around(self, fleet: Any) -> "Lossy":
        part = Lossy(fleet, drop=self._drop, delay_seconds=self._delay, seed=self._seed)
        part._draws = self._draws
        return part

    def _luck(self, device: DeviceId) -> tuple[float, float]:
        """A uniform and a unit exponential draw for one exchange, independent of the others."""
        self._draws[device] += 1
        key = [
            self._seed,
            zlib.crc32(device.encode()),
            self._draws[device],
            *np.float64(self.now).tobytes(),
        ]
        rng = np.random.default_rng(key)
        return float(rng.random()), float(rng.exponential())


class _Without(Mapping[DeviceId, O]):
    """Orders without some devices, still built only when they are read."""

    def __init__(self, orders: Mapping[DeviceId, O], without: set[DeviceId]) -> None:
        self._orders = orders
        self._ids = [id for id in orders if id not in without]

    def __getitem__(self, device: DeviceId) -> O:
        return self._orders[device]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def _later(reply: Reply[R], seconds: float) -> Reply[R]:
    return replace(reply, cost=replace(reply.cost, seconds=reply.cost.seconds + seconds))
