"""Checks of received messages: of a result before a method sees it, of an order before a site works
on it.

Types, shapes and numbers of a received message are never trusted. For every message, at every
depth, fields must have their declared types, numbers must be finite and within bounds, and tensors
of floats must be finite. A message states further conditions in a method `check(asked)`, which
raises Unusable; messages inside others are checked, too. A result without `check` must have tensors
and arrays like those of its order in fields of the same name, and the `examples` that its device
declared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedspine.core.fleet import Diverged
from fedspine.core.message import Tensors
from fedspine.core.schema import conforms
from fedspine.core.task import Task
from fedspine.core.tensors import extremes, is_tensors

MOST_WHOLE = 2**63 - 1  # of a whole number, as tensors hold them
MOST_ROWS = 2**31  # that a device may declare
# of a float: fp32 holds numbers below 2^128, so it holds sums over 2^20 devices of up to 2^31 rows
MOST_FLOAT = 2.0**76
MOST_ORDERED = 2.0**128  # of a float in an order, which a device does not sum over others
MOST_WEIGHT = 65504.0  # of a weight: what fp16 holds, in which weights cross the wire by default


class Unusable(ValueError):
    """A message that cannot be used. The text is one line with the reason, which repeats nothing of
    the message but numbers.
    """


@dataclass(frozen=True)
class Terms:
    """What is the same for all messages of a run."""

    base: Any  # the frozen base; for arrays the net
    classes: int  # 0 for language modelling
    longest: int  # tokens of a text at most, 1 for arrays

    @classmethod
    def of(cls, task: Task) -> "Terms":
        """The terms of a task."""
        return cls(base=task.base, classes=len(task.label_names), longest=task.max_tokens)


@dataclass(frozen=True)
class Asked:
    """What one message is checked against."""

    terms: Terms
    rows: int  # that the device declared
    order: Any = None  # that a result answers; None if it is not known, and for an order itself
    # what the device's earlier messages of this round fixed, as their `agreed` returned it
    agreed: Any = None

    @property
    def base(self) -> Any:
        return self.terms.base

    def examples(self, came: int) -> None:
        """Raise Unusable unless this is the number of rows that the device declared."""
        need(came == self.rows, f"examples is {short(came)}, the device declared {self.rows}")


@runtime_checkable
class Checking(Protocol):
    """A message that has conditions beyond its types.

    >>> from fedspine import message
    >>> @message
    ... class Guess:
    ...     share: float
    ...     def check(self, asked: Asked) -> None:
    ...         need(0 <= self.share <= 1, f"share is {self.share}, but 0 to 1 was expected")
    >>> why_unusable(Guess(share=1.5), Guess, Asked(Terms(None, 3, 16), rows=10))
    'share is 1.5, but 0 to 1 was expected'
    """

    def check(self, asked: Asked) -> None: ...


@runtime_checkable
class Agreeing(Protocol):
    """An order or a result that fixes conditions for later messages of its device in this round."""

    def agreed(self, before: Any, terms: Terms) -> Any:
        """What is fixed from now on, given what was fixed `before` (None: nothing)."""
        ...


@runtime_checkable
class Returning(Protocol):
    """An order whose result has other shapes than the order's fields of the same name."""

    def returned(self, asked: Asked) -> dict[str, Any]:
        """By field of the result, a value with the expected types and shapes."""
        ...


def why_unusable(value: Any, kind: Any, asked: Asked) -> str | None:
    """Why a decoded value cannot be used as a message of this declared type; None if it can.

    Raises nothing, whatever the value.
    """
    try:
        _typed(value, kind)
        _numbers(value, "it", MOST_ORDERED if asked.order is None else MOST_FLOAT)
        _own(value, asked)
        if not isinstance(value, Checking):
            as_ordered(value, asked)
    except Unusable as error:
        return str(error)
    except Exception as error:  # of a check, on what it was not written for
        return f"its check failed with {type(error).__name__}"
    return None


# --- what checks are made of ---


def check_state(state: Any) -> None:
    """Raise Diverged for a method's state with a weight that is not finite: no device could use it,
    and it must not replace the last usable state.
    """
    match state:
        case Tensor() if state.is_floating_point() and state.numel():
            if not all(map(isfinite, extremes(state))):
                raise Diverged("the weights after this round are not finite")
        case dict():
            for item in state.values():
                check_state(item)
        case tuple():
            for item in state:
                check_state(item)
        case _ if is_dataclass(state):
            for item in vars(state).values():
                check_state(item)


def check_rounds_done(state: Any, done: int, function: str) -> None:
    """Raise TypeError for what a method's `start` or `round` returned unless it is a message whose
    field `round` is the number of rounds done.
    """
    if not is_dataclass(state) or not hasattr(state, "round"):
        raise TypeError(
            f"{function} of the method returned {short(state)}, but a message with a field `round` "
            "was expected"
        )
    if state.round != done:
        raise TypeError(
            f"{function} of the method returned a state with round = {short(state.round)}, but "
            f"{done} was expected, the number of rounds done"
        )


def need(holds: bool, line: str) -> None:
    """Raise Unusable with this line unless it `holds`."""
    if not holds:
        raise Unusable(line)


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise Unusable for a number outside `low` to `high`."""
    need(low <= value <= high, f"{name} is {short(value)}, but {low:g} to {high:g} was expected")


def as_ordered(value: Any, asked: Asked) -> None:
    """Check that fields of a result that its order has, too, have the same types and shapes, and
    check `examples`. This is the check of results without one of their own; `check` methods may
    call it.
    """
    if not is_dataclass(value) or asked.order is None:
        return
    order = vars(asked.order) if is_dataclass(asked.order) else {}
    if isinstance(asked.order, Returning):
        order = order | asked.order.returned(asked)
    for name, came in vars(value).items():
        sent = order.get(name)
        if is_tensors(came) and is_tensors(sent):
            tensors_like(name, came, sent)
        elif isinstance(came, Tensor | np.ndarray) and type(came) is type(sent):
            tensor_of(name, came, sent.dtype, sent.shape)
    if "examples" in vars(value):
        asked.examples(value.examples)


def tensors_like(name: str, came: Tensors, sent: Tensors) -> None:
    """Raise Unusable unless the weights have the names, types and shapes of those sent."""
    specified = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in sent.items()}
    tensors_of(name, came, specified)


def tensors_of(
    name: str, came: Tensors, specified: "dict[str, tuple[torch.dtype, tuple[int, ...]]]"
) -> None:
    """Raise Unusable unless the weights have these names, types and shapes, and no fp32 or fp64
    entry exceeds `MOST_WEIGHT`.
    """
    if came.keys() != specified.keys():
        expected = len(specified)
        raise Unusable(f"{name} has {len(came)} tensors of other names; {expected} were expected")
    for key, tensor in came.items():
        dtype, shape = specified[key]
        tensor_of(name, tensor, dtype, shape)
        if dtype in (torch.float32, torch.float64) and tensor.numel():  # fp16 holds no more
            _bounded(name, *extremes(tensor), MOST_WEIGHT)


def tensor_of(name: str, came: Any, dtype: Any, shape: Iterable[int]) -> None:
    """Raise Unusable unless a tensor or an array is of this type and shape."""
    shape = tuple(shape)
    if tuple(came.shape) != shape:
        raise Unusable(f"{name} has a tensor of {tuple(came.shape)} where {shape} was expected")
    need(came.dtype == dtype, f"{name} has a tensor of {came.dtype} where {dtype} was expected")


def no_larger(name: str, tensor: Tensor, most: float, least: float | None = None) -> None:
    """Raise Unusable for an entry above `most`, or below `least` (default: -`most`)."""
    if tensor.numel():
        low, high = extremes(tensor)
        bound = -most if least is None else least
        worst = high if high > most else low
        need(
            bound <= low and high <= most,
            f"{name} has an entry of {short(worst)}, but {bound:g} to {most:g} was expected",
        )


def short(value: Any) -> str:
    """A number as short text, however many digits it has.

    >>> short(3), short(1e308), short(10**400)
    ('3', '1e+308', 'a number of 1329 bits')
    """
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        return f"a number of {value.bit_length()} bits"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- every message, at every depth ---


def _typed(value: Any, kind: Any) -> None:
    try:
        fits = conforms(value, kind)
    except NameError:  # a type that was imported for type checkers alone
        return
    expected, came = getattr(kind, "__name__", str(kind)), type(value).__name__
    need(fits, f"expected {expected}, got {came} with other fields or types")


def _numbers(value: Any, name: str, most: float) -> None:
    """Raise Unusable for a number or an entry that is not finite or too large. Keys of dictionaries
    are part of the received message, so the text does not repeat them.
    """
    match value:
        case None | bool() | str():
            return
        case int():
            need(abs(value) <= MOST_WHOLE, f"{name} is {short(value)}, which is too large")
        case float():
            need(isfinite(value), f"{name} is {value}")
            line = f"{name} is {short(value)}, which counts as not finite"
            need(abs(value) <= most, line)
        case Tensor():
            _entries(value, name, most)
        case np.ndarray():
            _entries(torch.from_numpy(value), name, most)
        case tuple():
            for item in value:
                _numbers(item, name, most)
        case dict():
            for item in value.values():
                _numbers(item, name, most)
        case _ if is_dataclass(value):
            # plain numbers first: where weights are not finite, the loss says more
            for inside, found in sorted(vars(value).items(), key=lambda item: not _plain(item[1])):
                _numbers(found, inside if name == "it" else f"{name}.{inside}", most)
        case _:
            raise Unusable(f"{name} is of a type that no message has")


def _plain(value: Any) -> bool:
    return isinstance(value, int | float)


def _entries(tensor: Tensor, name: str, most: float) -> None:
    need(not tensor.is_complex(), f"{name} has complex numbers")
    if tensor.is_floating_point() and tensor.numel():
        low, high = extremes(tensor)
        need(isfinite(low) and isfinite(high), f"an entry of {name} is not finite")
        _bounded(name, low, high, most)


def _bounded(name: str, low: float, high: float, most: float) -> None:
    line = f"an entry of {name} is {short(max(-low, high))}, which counts as not finite"
    need(max(-low, high) <= most, line)


def _own(value: Any, asked: Asked) -> None:
    """The checks of all messages in a value, the innermost first."""
    match value:
        case tuple():
            inside: Iterable[Any] = value
        case dict():
            inside = value.values()
        case _ if is_dataclass(value):
            inside = vars(value).values()
        case _:
            return
    for item in inside:
        if not isinstance(item, Tensor):
            _own(item, asked)
    if isinstance(value, Checking):
        value.check(asked)
