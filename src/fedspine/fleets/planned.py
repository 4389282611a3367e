"""A fleet of simulated devices that are charged but do not train; `fedspine plan` runs one round on
it.

A method cannot distinguish it from the simulated fleet up to its first training. The fleet prices
each order (`execution.pricing`) and times it by the same `Hardware`. It answers orders that do not
train; the first that do raise Planned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.device import DeviceId, Work, name_of, returns_learnt
from fedspine.core.fleet import Cost, Profile, Reply
from fedspine.core.outline import Outline, outline
from fedspine.core.server_optimiser import Server
from fedspine.core.task import Data
from fedspine.execution.pricing import Price, price
from fedspine.fleets.hardware import Hardware, Timing
from fedspine.storage.records import check_note


class Planned(Exception):
    """Raised once the training orders of a round are known, which is all that a plan needs."""


@dataclass(frozen=True)
class Quote:
    """The charge of one order and its reply on any device."""

    price: Price
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class PlannedExchange:
    """One order and its reply, as they would be charged."""

    device: DeviceId
    work: Work[Any, Any]
    order: Any
    quote: Quote
    timing: Timing

    @property
    def cost(self) -> Cost:
        """As the simulated fleet would charge it."""
        return Cost(
            bytes_down=self.quote.bytes_down,
            bytes_up=self.quote.bytes_up,
            flops=self.quote.price.flops,
            peak_memory_bytes=self.quote.price.peak_memory_bytes,
            seconds=self.timing.total,
            compute_seconds=self.timing.compute,
        )


@dataclass
class Prices:
    """Known prices by work and outline of the order; for devices without a memory, a price depends
    on nothing else.
    """

    base: Any
    data: Data
    _known: dict[tuple[str, Outline], Quote] = field(default_factory=dict)
    # by identity, since a method may send one order to many devices; the order is kept with it
    _sent: dict[int, tuple[Any, Outline]] = field(default_factory=dict)

    def of(self, work: Work[Any, Any], order: Any) -> Quote:
        """The cost of an order on any device."""
        if id(order) not in self._sent:
            self._sent[id(order)] = (order, outline(order))
        _, sent = self._sent[id(order)]
        key = (name_of(work), sent)
        if key not in self._known:
            found = price(work, order, base=self.base, data=self.data, memory={})
            self._known[key] = Quote(found, sent.bytes, outline(found.result).bytes)
        return self._known[key]


@dataclass
class PlannedFleet:
    """The devices that the first round asks; `ids` are those of the whole fleet, in the order of
    `hardware`.

    `ask` raises Planned when the method sends orders that train.
    """

    devices: tuple[Profile, ...]
    ids: tuple[DeviceId, ...]  # of the whole fleet
    hardware: Hardware
    prices: Prices
    aggregation: Aggregation = Mean()
    server: Server = field(default_factory=Server)
    now: float = 0.0
    exchanges: list[PlannedExchange] = field(default_factory=list)
    left_out: dict[DeviceId, str] = field(default_factory=dict)  # the reason, by device
    unusable: Mapping[DeviceId, str] = field(default_factory=dict)
    _asks: dict[DeviceId, int] = field(default_factory=dict)

    @property
    def base(self) -> Any:
        return self.prices.base

    def ask(
        self, work: Work[Any, Any], orders: Mapping[DeviceId, Any], *, within: float = inf
    ) -> list[Reply[Any]]:
        made = [self._exchange(work, id, order) for id, order in orders.items()]
        self.exchanges += made
        self.now += max((one.timing.total for one in made), default=0.0)
        if any(one.quote.price.trained for one in made) and returns_learnt(work):
            raise Planned
        return [
            Reply(device=one.device, value=one.quote.price.result, cost=one.cost, order=one.order)
            for one in made
        ]

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"a plan has no {name}")

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def note(self, **values: Any) -> None:
        check_note(values)
        if "left_out" in values:
            self.left_out[values["device"]] = values["left_out"]

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """As the simulated fleet does."""
        return self.hardware.seconds(
            self.ids.index(device),
            round=0,
            ask=None,
            flops=flops,
            launches=launches,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
        ).total

    def timing(self, device: DeviceId, quote: Quote, *, round: int, ask: int | None) -> Timing:
        """Seconds of an exchange of this cost, if the device served `ask` exchanges before; None:
        without jitter.
        """
        return self.hardware.seconds(
            self.ids.index(device),
            round=round,
            ask=ask,
            flops=quote.price.flops,
            launches=quote.price.launches,
            bytes_down=quote.bytes_down,
            bytes_up=quote.bytes_up,
        )

    def _exchange(self, work: Work[Any, Any], device: DeviceId, order: Any) -> PlannedExchange:
        quote, asked = self.prices.of(work, order), self._asks.get(device, 0)
        self._asks[device] = asked + 1
        return PlannedExchange(
            device, work, order, quote, self.timing(device, quote, round=0, ask=asked)
        )
