"""The messages between a run and a site, which wrap those of the method.

A site sends only `Opened`, `NotDone`, and `SiteAnswer` with the result of the work that was asked.
The size of a message is checked before it is decoded, and its types before it is used.
"""

import re
from typing import Any, Literal, TypeAlias

import numpy as np

from fedspine.core.message import NotAMessage, message, unpack
from fedspine.core.schema import conforms
from fedspine.flare.framing import MOST_BYTES
from fedspine.flare.run_terms import RunTerms

# of a run: it names the run's folder at a site, and can name nothing else there
RUN = re.compile(r"[0-9a-f]{32}")

FailureReason: TypeAlias = Literal[
    "not opened",
    "bad order",
    "work not allowed",
    "memory lost",
    "work failed",
    "refused",
    "its privacy budget is spent",
]


@message
class Opening:
    """Opens a run at a site, which loads what the terms name, or refuses."""

    run: str  # as RUN
    terms: RunTerms


@message
class Opened:
    """The site has joined; it declares the numbers of its `Profile`."""

    examples: int
    memory_bytes: int


@message
class SiteOrder:
    """One ask of a site: everything its result depends on, except for data, base and memory.

    The site reads the memory version `memory` (None: it has none yet) and writes `version`, so an
    ask can be repeated with the same result. It removes versions other than these and `needed`.
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
    """The packed result of an order and the resources that the work used.

    In a private run the resources are 0, since they reveal something about the rows.
    """

    result: np.ndarray  # uint8
    flops: float
    launches: int
    samples: int
    peak_memory_bytes: int
    compute_seconds: float = 0.0  # of the work and of reading and writing its messages
    epsilon: float | None = None  # spent by the site in this run, if it promises privacy
    noise: float | None = None  # relative to the change of weights; None: none was added


@message
class NotDone:
    """The site did not do the work. `detail` is a fixed line, or says what is wrong with the order;
    everything else stays in the site's log.
    """

    reason: FailureReason
    detail: str = ""


def decoded(payload: bytes | np.ndarray, *kinds: Any) -> Any:
    """The message in `payload`, bytes or uint8 [bytes], which must have one of these types.

    Raises NotAMessage for a payload of more than MOST_BYTES, one that is no message or has another
    type, and one whose fields do not have their declared types.
    """
    if isinstance(payload, np.ndarray) and (payload.ndim, payload.dtype) != (1, np.uint8):
        shape = str(payload.shape)[:60]
        raise NotAMessage(f"expected uint8 [bytes], got {payload.dtype} of shape {shape}")
    size = len(payload)
    if size > MOST_BYTES:
        raise NotAMessage(f"expected a message of at most {MOST_BYTES} bytes, got {size}")
    value = unpack(payload)
    if not any(conforms(value, kind) for kind in kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise NotAMessage(
            f"expected {names}, got {type(value).__name__} with other fields or types"
        )
    return value


def as_array(payload: bytes) -> np.ndarray:
    """Bytes as a uint8 array, the form in which a message holds another one."""
    return np.frombuffer(payload, np.uint8)
