"""The server's side of an exchange: the interface between a method and the fleet that transports
its messages.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from fedspine.core.aggregation import Aggregation
from fedspine.core.device import DeviceId, O, R, Work
from fedspine.core.server_optimiser import Server

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """What a device declares about itself; never its true speed, which a method has to estimate."""

    id: DeviceId
    site: str
    examples: int
    memory_bytes: int
    largest_share: float = 1.0  # the largest weight of the device in an average


@dataclass(frozen=True)
class Cost:
    """The cost of one exchange; `seconds` run from the order's dispatch to the reply's arrival.

    `compute_seconds` of them are the device's own work, as it measures it; the rest is traffic. 0
    where the device does not tell.
    """

    bytes_down: int
    bytes_up: int
    flops: float
    peak_memory_bytes: int
    seconds: float
    compute_seconds: float = 0.0


@dataclass(frozen=True)
class EarlyExchange:
    """An exchange before the first round, on which the task itself depends; the fleet that is
    charged for it determines its seconds.
    """

    device: DeviceId
    work: str
    bytes_down: int
    bytes_up: int
    flops: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Reply(Generic[R]):
    """A device's result, its cost, and the order that it answers, as it was sent.

    `late` counts the rounds since the order was sent: 0, unless the run ends rounds at a quorum.
    """

    device: DeviceId
    value: R
    cost: Cost
    order: Any
    late: int = 0
    weight: float = 1  # in an average; see `core.method.usable`


class Fleet(Protocol):
    """The devices of a run. A simulated and a real fleet look the same to a method.

    >>> from types import SimpleNamespace
    >>> from fedspine import Fleet
    >>> def largest(fleet: Fleet) -> str:
    ...     return max(fleet.devices, key=lambda device: device.memory_bytes).id
    >>> a, b = (Profile(id, "here", examples=9, memory_bytes=m) for id, m in (("a", 1), ("b", 2)))
    >>> largest(SimpleNamespace(devices=(a, b)))
    'b'
    """

    @property
    def devices(self) -> tuple[Profile, ...]: ...

    @property
    def now(self) -> float:
        """Seconds, simulated or wall; never goes back."""
        ...

    @property
    def base(self) -> Any:
        """The frozen base (for arrays: the net), for methods that also compute on the server."""
        ...

    @property
    def aggregation(self) -> Aggregation:
        """How a method merges the replies of a round; see `core.merging`."""
        ...

    @property
    def server(self) -> Server:
        """The server optimiser, and what the server remembers beside the method's state;
        `core.merging` applies it.
        """
        ...

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        """Send every order and wait; devices that are lost or later than `within` seconds are
        absent.

        Replies come in the order of `orders`. A mapping may build its orders when they are read. If
        rounds end at a quorum (`fleets.semi_async`), replies to the work that a method merges late
        come in the order of arrival, including replies to orders of earlier rounds.
        """
        ...

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        """Send orders and do not wait; their replies come from `next`."""
        ...

    def next(self) -> Reply[Any]:
        """The next pending reply to arrive; raises Idle if none is pending."""
        ...

    def only(self, ids: Iterable[DeviceId]) -> "Fleet":
        """The part of the fleet with these devices, on the same clock."""
        ...

    def together(
        self, job: Callable[[str, "Fleet"], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        """Run `job(name, part)` for every group in parallel and return its results by name; the
        clock advances by the longest.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Let this much time pass."""
        ...

    def note(self, **values: Any) -> None:
        """Write a method's remark to the records."""
        ...

    @property
    def unusable(self) -> Mapping[DeviceId, str]:
        """The reason, by device, why the reply to its last order was left out."""
        ...

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """Seconds of an exchange of this cost in this round, without random jitter.

        Known only to simulated fleets, for the oracle controller; None elsewhere.
        """
        ...


class Idle(LookupError):
    """`next` was called while no reply is pending."""


class AllLost(RuntimeError):
    """A round got no usable reply, or fewer than the quorum, so the run stops; its last state is
    saved.
    """


class Diverged(AllLost):
    """All replies of a round hold non-finite numbers; training from the same state gives them
    again.
    """


class NoMemory(AllLost):
    """None of a round's devices has enough memory for its part, so retrying does not help."""


def capped(weights: Mapping[DeviceId, float], largest_share: float) -> dict[DeviceId, float]:
    """The weights, with none above `largest_share` of their sum; all equal if that is impossible.

    Two devices are not capped, since nothing shows which of them is right.

    >>> capped({"a": 10, "b": 20, "c": 1000}, 0.5)
    {'a': 10, 'b': 20, 'c': 30.0}
    >>> capped({"a": 10, "b": 1000}, 0.5), capped({"a": 1, "b": 2, "c": 3}, 0.1)
    ({'a': 10, 'b': 1000}, {'a': 1, 'b': 1, 'c': 1})
    """
    if len(weights) < 3 or max(weights.values()) <= largest_share * sum(weights.values()):
        return dict(weights)
    falling = sorted(weights.values(), reverse=True)
    for cut in range(1, len(falling)):
        left = 1 - cut * largest_share  # of all, for those that are not cut
        if left <= 0:
            break
        most = largest_share * sum(falling[cut:]) / left
        if falling[cut] <= most:
            return {id: min(weight, most) for id, weight in weights.items()}
    return dict.fromkeys(weights, 1)


def rows_of(fleet: Fleet) -> dict[DeviceId, int]:
    """How many rows each device declared."""
    return {profile.id: profile.examples for profile in fleet.devices}


def largest_share(fleet: Fleet) -> float:
    """The largest share of an average, 0 to 1, that any device of the fleet may have."""
    return min((profile.largest_share for profile in fleet.devices), default=1.0)


def weights_of(fleet: Fleet, devices: Iterable[DeviceId]) -> dict[DeviceId, float]:
    """The weight of each of these devices in an average: the rows that it declared, capped."""
    rows = rows_of(fleet)
    return capped({id: rows[id] for id in devices}, largest_share(fleet))


def none_left(asked: int, flaws: Sequence[str]) -> AllLost:
    """The error for a round that asked `asked` devices and got no usable reply; `flaws` has a line,
    such as "loss is nan", about each reply. It is Diverged if numbers are not finite.

    >>> str(none_left(2, ["loss is nan", "loss is nan"]))
    'the training loss of all 2 devices is not finite (nan)'
    """
    if not flaws:
        return AllLost(f"of {asked} devices asked, 0 replied")
    who = f"all {asked} devices" if asked > 1 else "the one device asked"
    if len(flaws) < asked:
        who = f"all {len(flaws)} devices that replied, of {asked} asked,"
    losses = [flaw.removeprefix("loss is ") for flaw in flaws if flaw.startswith("loss is ")]
    if len(losses) == len(flaws):
        values = ", ".join(sorted(set(losses) - {"not finite"}))
        return Diverged(
            f"the training loss of {who} is not finite" + (f" ({values})" if values else "")
        )
    listed = ", ".join(sorted(set(flaws)))
    if any(flaw.endswith(("is nan", "is inf", "is -inf", "not finite")) for flaw in flaws):
        return Diverged(f"what {who} sent is not finite ({listed})")
    return AllLost(f"what {who} sent cannot be used ({listed})")
