"""What an order declares that it reads of a device's rows, and how many rows are behind an answer.

A site checks the declaration (`flare.site_terms`) before any row is read. The device notes the rows
that it used (`Device.uses`), which are counted before the answer leaves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedspine.core.message import message

# AdamW that starts from the moments of earlier training: where these are of far larger gradients,
# its steps are proportional to the gradient, as those of SGD
KEPT_ADAMW = "adamw-kept"


@message
class Descent:
    """How the steps of training turn gradients into what leaves."""

    kind: str  # "adamw", KEPT_ADAMW or "sgd"
    learning_rates: tuple[float, ...]  # of all that is trained
    weight_decay: float
    clip: float | None  # of the gradient's norm; None: never
    penalty: float = 0.0  # weight of what is minimised beside the loss


@message
class Reads:
    """What one part of an order reads, and what leaves about single rows because of it.

    An answer depends on at most `lasting * batch` rows. A field that is None declares nothing.
    """

    steps: int = 1  # optimiser steps, or passes over a batch, behind one answer
    batch: int | None = None  # rows of a step
    lasting: int | None = None  # the steps that show in the answer; None: all
    cut: int | None = None  # blocks that features have passed which leave; None: no features leave
    labels: bool = False  # whether the label of each row leaves with its features
    classes: int | None = None  # of which shares are asked
    names: tuple[str, ...] = ()  # of weights that the order brings beside the model's own
    descent: Descent | None = None  # of training of which weights leave, not features
    scale: float | None = None  # of the adapter's product
    rank: int | None = None  # the adapter's largest, where the order itself does not bring one
    merged: int | None = None  # the rank of a change of the frozen weights that the order brings


@runtime_checkable
class Declares(Protocol):
    """A message that declares what it reads."""

    @property
    def reads(self) -> Reads: ...


@runtime_checkable
class PredictsReads(Protocol):
    """A method that predicts what its orders will read, so that a site can refuse before the first
    one.
    """

    def predicted_reads(self, base: Any) -> Reads: ...


def reads_of(order: Any) -> Iterator[Reads]:
    """What the parts of an order declare, at every depth."""
    if isinstance(order, Declares):
        yield order.reads
    match order:
        case dict():
            parts = list(order.values())
        case tuple():
            parts = list(order)
        case _ if is_dataclass(order):
            parts = [getattr(order, field.name) for field in fields(order)]
        case _:
            parts = []
    for part in parts:
        yield from reads_of(part)


def lasting(steps: int, forgotten: float) -> int:
    """The steps that still show in an average, or in weights that decay, if each step forgets the
    share `forgotten` of what came before: those that weigh at least 1 / e of the last one; at least
    1.

    >>> lasting(20, 0.1), lasting(20, 2e-4), lasting(20, 1.0), lasting(20, 11.0)
    (10, 20, 1, 1)
    """
    if forgotten <= 0:
        return steps
    return max(1, min(steps, round(min(1 / forgotten, 1e9)))) if forgotten < 1 else 1


def largest_share(texts: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> float:
    """The largest share that one text has in the mean over steps of each step's mean over labels.

    For each step, `texts` has the text of each row and `counts` the row's number of labels.

    >>> largest_share([np.array([7, 8]), np.array([8, 9])], [np.array([1, 1]), np.array([3, 1])])
    0.625
    """
    _, place = np.unique(np.concatenate(texts), return_inverse=True)
    shares = np.concatenate([each / each.sum() for each in counts])
    return float(np.bincount(place, shares).max()) / len(texts)


def last_steps(rows: Sequence[np.ndarray], least: int, fewest: int) -> int:
    """The number of last steps over which a mean has to be taken: `least`, or as many as have
    `fewest` distinct rows, or all if there are not so many. `rows` has the rows of each step.

    >>> last_steps([np.array([row]) for row in range(9)], 5, 0)
    5
    >>> last_steps([np.array([row % 4, 8]) for row in range(9)], 2, 4)
    3
    """
    if not fewest:
        return least
    seen: set[int] = set()
    for count, chosen in enumerate(reversed(rows), 1):
        seen.update(chosen.tolist())
        if count >= least and len(seen) >= fewest:
            return count
    return max(least, len(rows))
