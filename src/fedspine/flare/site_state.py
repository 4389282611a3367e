"""What a run keeps of its sites and of its orders to them, and what it needs of the way there."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedspine.core.device import DeviceId, Work
from fedspine.core.fleet import Cost, Profile
from fedspine.core.message import message


class RelayLost(ConnectionError):
    """What passes messages on does not answer: its job, the server, or the way there is gone."""


class Link(Protocol):
    """The way to the sites; see `fedspine.flare.link`. May be used from many threads."""

    @property
    def relay(self) -> str | None:
        """Names what passes messages on at present; None where nothing does."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """Whom the present relay reaches."""
        ...

    def connected(self) -> tuple[str, ...]:
        """Whom a new relay would reach."""
        ...

    def exchange(self, site: str, payload: bytes, seconds: float) -> tuple[str, bytes]:
        """An outcome, "done" or what went wrong, and the reply; raises RelayLost."""
        ...

    def ping(self, site: str, seconds: float) -> bool:
        """Whether the site answers; raises RelayLost."""
        ...

    def mend(self, broken: str | None, give_up: Callable[[], bool]) -> None:
        """Replace the relay `broken`, unless that was done; raises RelayLost when `give_up` says so."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Patience:
    """How a run bears with its sites."""

    sites: int = 1  # that a new run waits for
    quorum: int = 1  # with fewer replies to an ask the run stops, and can be resumed
    within: float = 600.0  # seconds of an ask for which the method sets no limit
    outage: float = 300.0  # seconds that the run waits for a quorum of sites, or for the server


@message
class SiteStanding:
    """What is known of one site: `memory` is the version of its last reply's memory, None where it has none."""

    name: str
    examples: int
    memory_bytes: int
    asks: int
    memory: int | None


@message
class Sent:
    """An order that was sent and whose reply was not taken; without a reply it is sent again after a resume."""

    device: str
    work: str
    order: Any
    value: Any  # the result, where it has come
    cost: dict[str, float] | None


@message
class FlareSnapshot:
    """What a fleet of sites needs to go on after a resume; the sites keep their memory under the name of the run."""

    run: str
    now: float
    sites: tuple[SiteStanding, ...]  # in the order of joining, which numbers them
    pending: tuple[Sent, ...]


@dataclass
class Member:
    """One site: only its own thread and, between asks, the run's thread change it."""

    name: str
    examples: int
    memory_bytes: int
    asks: int = 0
    memory: int | None = None
    saved: tuple[int, ...] = ()  # versions that the last two snapshots name
    missed: bool = False
    line: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1)
    )  # its orders, one after another

    @property
    def profile(self) -> Profile:
        return Profile(
            id=self.name, site=self.name, examples=self.examples, memory_bytes=self.memory_bytes
        )


class Deadline:
    """When the time of an order is up; it moves on where the way to the site was lost meanwhile."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.at - time.monotonic()


@dataclass(frozen=True)
class Came:
    """What became of one order: a value, or why there is none."""

    cost: Cost
    value: Any = None
    samples: int = 0
    missing: str | None = None


@dataclass(eq=False)
class Pending:
    """An order under way that nobody waits for yet."""

    device: DeviceId
    work: Work[Any, Any]
    order: Any
    started: float
    came: Future[Came]
