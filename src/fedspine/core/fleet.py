"""The server's side of an exchange: the one seam between a method and whatever carries its messages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from fedspine.core.device import DeviceId, O, R, Work

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """What a device declares: never its true speed, which a method has to find out."""

    id: DeviceId
    site: str
    examples: int
    memory_bytes: int


@dataclass(frozen=True)
class Cost:
    """What one exchange cost; `seconds` from the order's dispatch to the reply's arrival."""

    bytes_down: int
    bytes_up: int
    flops: float
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Reply(Generic[R]):
    device: DeviceId
    value: R
    cost: Cost


class Fleet(Protocol):
    """Devices, reached by asking. A simulated and a real fleet look the same to a method.

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
        """The frozen base (for arrays: the net), which the server has too: for methods that compute a part there."""
        ...

    def ask(
        self, work: Work[O, R], orders: Mapping[DeviceId, O], *, within: float = inf
    ) -> list[Reply[R]]:
        """Send every order and wait; devices that are lost or later than `within` seconds are absent.

        Replies come in the order of `orders`. A mapping may build its orders when they are read.
        """
        ...

    def send(self, work: Work[O, R], orders: Mapping[DeviceId, O]) -> None:
        """Send orders and do not wait; their replies come from `next`."""
        ...

    def next(self) -> Reply[Any]:
        """The reply that arrives first of all that are under way; raises Idle when none will."""
        ...

    def only(self, ids: Iterable[DeviceId]) -> "Fleet":
        """The part of the fleet with these devices, on the same clock."""
        ...

    def together(
        self, job: Callable[[str, "Fleet"], T], groups: Mapping[str, Iterable[DeviceId]]
    ) -> dict[str, T]:
        """Run `job(name, part)` for every group side by side in time; the clock moves on by the longest."""
        ...

    def wait(self, seconds: float) -> None:
        """Let this much time pass."""
        ...

    def note(self, **values: Any) -> None:
        """A method's remark, to the records."""
        ...

    def foresee(
        self, device: DeviceId, *, flops: float, launches: float, bytes_down: int, bytes_up: int
    ) -> float | None:
        """Seconds that an exchange of this cost takes the device in this round, but for what chance adds to one of them.

        Only a simulated fleet knows, for a control that is told the truth; None elsewhere.
        """
        ...


class Idle(LookupError):
    """`next` was called while no reply is under way."""


class AllLost(RuntimeError):
    """A round got no reply that can be used, so the run cannot go on; its last state is saved."""


class Diverged(AllLost):
    """All replies of a round hold numbers that are not finite: what training from the same state gives again."""


class NoMemory(AllLost):
    """None of a round's devices has the memory for its part, and none will have."""


def none_left(asked: int, flaws: Sequence[str]) -> AllLost:
    """The error for a round of so many devices in which every reply has a flaw, such as "loss is nan".

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
    return Diverged(f"what {who} sent is not finite ({', '.join(sorted(set(flaws)))})")
