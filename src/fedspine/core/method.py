"""The protocol of methods and their registration: a frozen dataclass whose fields are its
hyper-parameters.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from fedspine.core.device import DeviceId, R, Work, name_of
from fedspine.core.fleet import Fleet, Reply, none_left
from fedspine.core.message import Tensors
from fedspine.core.task import Task
from fedspine.core.tensors import finite, is_tensors, rebased

S = TypeVar("S")
T = TypeVar("T")


class Method(Protocol[S]):
    """A federated method: it owns the round, the fleet owns transport, time and bytes.

    The state is a message; `round` returns a new one and changes nothing in place. It has a field
    `round`, the rounds done so far. docs/python.md writes a method in one file.

    >>> from fedspine import FedLora, Method
    >>> def parts(method: Method) -> list[str]:
    ...     return [part for part in ("check", "start", "round", "deploy") if hasattr(method, part)]
    >>> parts(FedLora(rank=4))
    ['check', 'start', 'round', 'deploy']
    """

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds; the tests of every
        method use them.
        """
        ...

    def check(self, task: Task) -> None:
        """Raise BadInput if these settings cannot work on this task, before any computation."""
        ...

    def start(self, task: Task, rng: np.random.Generator) -> S: ...

    def round(self, state: S, fleet: Fleet) -> S: ...

    def deploy(self, state: S, device: DeviceId | None = None) -> Any:
        """The model that `device` will run, or the global one."""
        ...

    def unpruned(self, state: S) -> Any:
        """The trained weights on the unpruned base, for which a pruned model's adapter was not
        tuned.
        """
        ...


@runtime_checkable
class Prunes(Protocol):
    """A method that prunes on a schedule, from which the cost of later rounds is predicted."""

    def planned_sparsity(self, round: int, rounds: int) -> float:
        """The least sparsity of a device's model in `round` of `rounds`, counted from 0."""
        ...


def planned_sparsities(method: Any, rounds: int) -> list[float]:
    """The sparsity planned for each of `rounds` rounds, 0 for a method that does not prune."""
    if not isinstance(method, Prunes):
        return [0.0] * rounds
    return [method.planned_sparsity(round, rounds) for round in range(rounds)]


def usable(replies: Sequence[Reply[R]], fleet: Fleet) -> list[Reply[R]]:
    """The replies whose `loss` and all named tensors are finite; the others are noted and left out
    of the round.

    Raises AllLost if no reply came, Diverged if none of those that came is usable.
    """
    good, flaws = [], []
    for reply in replies:
        found = _flaw(reply.value)
        if found is None:
            good.append(reply)
        else:
            flaws.append(found)
            fleet.note(device=reply.device, left_out=found)
    if not good:
        raise none_left(len(fleet.devices), flaws)
    return good


def on_todays(replies: Sequence[Reply[R]], **today: Tensors) -> list[Reply[R]]:
    """The replies; in a late one the weights are what its device changed, on today's.

    `today` holds weights by the field that orders and results call them. So a device that began
    with older weights does not bring the server back to them. Names that are not in today's
    weights stay as they came.
    """

    def moved(reply: Reply[R]) -> Reply[R]:
        weights = {
            field: rebased(getattr(reply.value, field), getattr(reply.order, field), now)
            for field, now in today.items()
        }
        return replace(reply, value=replace(reply.value, **weights))  # type: ignore[type-var]

    return [moved(reply) if reply.late else reply for reply in replies]


def _flaw(result: Any) -> str | None:
    """The non-finite part of a result with a `loss`, None if there is none."""
    if not math.isfinite(result.loss):
        return f"loss is {result.loss}"
    sound = all(finite(value) for value in vars(result).values() if is_tensors(value))
    return None if sound else "weights are not finite"


_METHODS: dict[str, type] = {}  # filled at import time only


def method(
    name: str, *, merges_late: Work[Any, Any] | None = None, robust: bool = False
) -> Callable[[type[T]], type[T]]:
    """Register a method class under the name that recipes use.

    `merges_late` is the work whose results the method can merge in a later round than that of
    their order, which `fleet.quorum` below 1 needs; see `on_todays`.

    `robust` says that it merges all that devices send as `fleet.aggregation` says, which an
    aggregation other than the mean needs; see `core.merging.merged`.

    A method that can train nets on arrays says so by `models: ClassVar = ("transformer", "net")`;
    the others know transformers only, and a recipe that gives them a net is refused. Raises
    TypeError for a name that another class has; a class that is defined again, as in a notebook,
    replaces itself.

    >>> from dataclasses import dataclass
    >>> from fedspine import method
    >>> @method("fedlora")
    ... @dataclass(frozen=True)
    ... class Mine:
    ...     rank: int = 8
    Traceback (most recent call last):
        ...
    TypeError: the name 'fedlora' is taken by fedspine.methods.fedlora.FedLora; choose another
    """

    def register(cls: type[T]) -> type[T]:
        known = _METHODS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}; "
                "choose another"
            )
        _METHODS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        cls.merges_late = None if merges_late is None else name_of(merges_late)  # type: ignore[attr-defined]
        cls.robust = robust  # type: ignore[attr-defined]
        if "models" not in vars(cls):
            cls.models = ("transformer",)  # type: ignore[attr-defined]
        return cls

    return register


def registered() -> dict[str, type]:
    """The methods whose modules were imported, by name; `fedspine.methods.all_methods` imports them
    all.
    """
    return dict(sorted(_METHODS.items()))


def forget(names: Iterable[str]) -> None:
    """Undo the registration of methods, those of a file whose import failed after it."""
    for name in names:
        del _METHODS[name]
