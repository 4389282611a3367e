"""The state of a run's sites and of its orders to them, and the protocol of the link to them."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedspine.core.device import DeviceId, Work
from fedspine.core.fleet import Cost, Profile
from fedspine.core.message import message


class RelayLost(ConnectionError):
    """The relay does not answer, because its job, the server or the connection is gone."""


class Link(Protocol):
    """A connection to the sites; see `fedspine.flare.link`. Safe for use from many threads."""

    @property
    def relay(self) -> str | None:
        """The id of the current relay; None if there is none."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the current relay reaches."""
        ...

    def connected(self) -> tuple[str, ...]:
        """The sites that a new relay would reach."""
        ...

    def exchange(self, site: str, payload: bytes, seconds: float) -> tuple[str, bytes]:
        """A status, "done" or what went wrong, and the reply; raises RelayLost."""
        ...

    def ping(self, site: str, seconds: float) -> bool:
        """Whether the site answers; raises RelayLost."""
        ...

    def mend(self, broken: str | None, give_up: Callable[[], bool]) -> None:
        """Replace the relay `broken`, unless that was done; raises RelayLost once `give_up()` is
        true.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Timeouts:
    """How long a run waits for its sites, and how many replies it needs."""

    sites: int = 1  # to wait for at the start of a run
    quorum: int = 1  # fewer replies to an ask stop the run, which can be resumed
    within: float = 600.0  # seconds for an ask without a limit of its own
    outage: float = 300.0  # seconds to wait for a quorum of sites, or for the server
    # of the weights of an average: the most that one site of three or more may have
    largest_share: float = 0.5


@message
class SiteSnapshot:
    """One site in a snapshot; `memory` is the version that its last reply wrote, None if it has
    none.
    """

    name: str
    examples: int
    memory_bytes: int
    asks: int
    memory: int | None


@message
class Sent:
    """An order whose reply the method has not received; without a reply it is sent again after a
    resume.
    """

    device: str
    round: int  # in which it was sent
    work: str
    order: Any
    value: Any  # the result, if it has arrived
    cost: dict[str, float] | None


@message
class FlareSnapshot:
    """The saved state of a fleet of sites; they keep their memory under the name of the run."""

    run: str
    now: float
    sites: tuple[SiteSnapshot, ...]  # in the order of joining, which numbers them
    pending: tuple[Sent, ...]


@message
class ServedFlareSnapshot(FlareSnapshot):
    """The saved state of a fleet whose server remembers something."""

    server: dict[str, Any]  # as `core.server_optimiser.Server` gives it


@dataclass
class SiteState:
    """One site; changed only by its own thread and, between asks, by the run's thread."""

    name: str
    examples: int
    memory_bytes: int
    asks: int = 0
    memory: int | None = None
    saved: tuple[int, ...] = ()  # versions that the last two snapshots name
    missed: bool = False
    # runs its orders one after another
    line: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    @property
    def profile(self) -> Profile:
        return Profile(
            id=self.name, site=self.name, examples=self.examples, memory_bytes=self.memory_bytes
        )


class TimeLimit:
    """The time limit of an order; an outage of the link extends it."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the limit; negative after it."""
        return self.at - time.monotonic()


@dataclass(frozen=True)
class AskResult:
    """The outcome of one order: a value, or the reason why it is missing."""

    cost: Cost
    value: Any = None
    samples: int = 0
    missing: str | None = None
    epsilon: float | None = None  # spent by the site in this run
    noise: float | None = None  # that the site added, relative to the change of weights


@dataclass(eq=False)
class InFlight:
    """A pending order: its reply has not been taken yet."""

    device: DeviceId
    round: int  # in which it was sent
    work: Work[Any, Any]
    order: Any
    started: float
    came: Future[AskResult]
