"""What goes between a run and a site, around the messages of the method: the only types that either side decodes.

A site sends `Opened`, `SiteAnswer` and `NotDone`, and in an answer the result of the work it was asked for; nothing else.
Whatever comes is measured before it is decoded and compared with the types that were declared before it is used.
"""

import re
from typing import Any, Literal, TypeAlias

import numpy as np

from fedspine.core.message import NotAMessage, message, unpack
from fedspine.flare.framing import MOST_BYTES
from fedspine.flare.run_terms import Terms
from fedspine.flare.schema import conforms

RUN = re.compile(
    r"[0-9a-f]{32}"
)  # names a run's folder on a site, so it can name nothing else there

Why: TypeAlias = Literal[
    "not opened", "bad order", "work not allowed", "memory lost", "work failed", "refused"
]


@message
class Opening:
    """A run introduces itself; the site loads what the terms ask for, or refuses."""

    run: str  # as RUN
    terms: Terms


@message
class Opened:
    """The site takes part, and declares what a `Profile` says of it."""

    examples: int
    memory_bytes: int


@message
class SiteOrder:
    """One ask of the site: everything that its result may depend on, but for the data, the base and the memory.

    The site works from the memory that it wrote as version `memory` (None: it has none yet) and writes `version`. So an
    ask may be repeated, and gives the same bytes. Versions other than these and `needed` are removed.
    """

    run: str
    work: str
    order: np.ndarray  # uint8, packed
    seed: tuple[int, ...]
    round: int
    memory: int | None
    version: int
    needed: tuple[int, ...]


@message
class SiteAnswer:
    """What came of an order: the packed result and what the work spent."""

    result: np.ndarray  # uint8
    flops: float
    launches: int
    samples: int
    peak_memory_bytes: int


@message
class NotDone:
    """The site did not do it. `told` says no more than was fixed beforehand: details stay in the site's own log."""

    why: Why
    told: str = ""


def decoded(payload: bytes, *kinds: Any) -> Any:
    """The message in `payload`, which must be of one of these types.

    Raises NotAMessage for what is too large, no message, of another type, or with fields of other types than declared.
    """
    if len(payload) > MOST_BYTES:
        raise NotAMessage(f"a message of {len(payload)} bytes came; at most {MOST_BYTES} are read")
    value = unpack(payload)
    if not any(conforms(value, kind) for kind in kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise NotAMessage(
            f"{names} was expected, {type(value).__name__} with other fields or types came"
        )
    return value


def as_array(payload: bytes) -> np.ndarray:
    """Bytes as they stand inside another message."""
    return np.frombuffer(payload, np.uint8)
