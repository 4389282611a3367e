"""The protocol of methods, and their registration. A method is a frozen dataclass whose fields are
its hyper-parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from fedspine.core.device import DeviceId, R, Work, name_of
from fedspine.core.fleet import Fleet, Reply, capped, largest_share, none_left, rows_of
from fedspine.core.message import Tensors
from fedspine.core.task import Task
from fedspine.core.tensors import rebased

S = TypeVar("S")
T = TypeVar("T")


class Method(Protocol[S]):
    """A federated method. It owns the round; the fleet owns transport, time and bytes.

    The state is a message with a field `round`, the number of rounds done. `round` returns a new
    state and changes nothing in place. docs/python.md writes a method in one file.

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

    def start(self, task: Task, rng: np.random.Generator) -> S:
        """The state before the first round."""
        ...

    def round(self, state: S, fleet: Fleet) -> S:
        """The state after one more round; raises AllLost if no device sent a usable reply."""
        ...

    def deploy(self, state: S, device: DeviceId | None = None) -> Any:
        """The model that `device` will run; None: the global one."""
        ...

    def unpruned(self, state: S) -> Any:
        """The trained weights on the unpruned base. For a method that prunes, the adapter was not
        tuned for that base.
        """
        ...


@runtime_checkable
class Prunes(Protocol):
    """A method that prunes on a schedule, from which the cost of later rounds is predicted."""

    def planned_sparsity(self, round: int, rounds: int) -> float:
        """The least sparsity of a device's model in `round` of `rounds`, counted from 0."""
        ...


@dataclass(frozen=True)
class LeastWork:
    """The least that a method may ask of a device: peak bytes of memory, and the settings that
    lower them.
    """

    memory_bytes: int
    settings: tuple[str, ...]


@runtime_checkable
class FitsMemory(Protocol):
    """A method that asks a device only for work that fits its memory, and does not ask a device in
    whose memory nothing fits.
    """

    def least_work(self, task: Task) -> LeastWork:
        """The least work that the method may ask of a device in the first round."""
        ...


@runtime_checkable
class Prunable(Protocol):
    """An order whose device prunes."""

    def pruned(self, layout: Any, sparsity: float) -> Self:
        """The same order for a device whose model has this sparsity; plans predict the cost of
        later rounds from it.
        """
        ...


def planned_sparsities(method: Any, rounds: int) -> list[float]:
    """The sparsity planned for each of `rounds` rounds, 0 for a method that does not prune."""
    if not isinstance(method, Prunes):
        return [0.0] * rounds
    return [method.planned_sparsity(round, rounds) for round in range(rounds)]


def usable(replies: Sequence[Reply[R]], fleet: Fleet) -> list[Reply[R]]:
    """The replies, each with its weight in an average: the rows that its device declared, capped.

    `fleets.checked` has already left out replies that cannot be used. Raises AllLost if no reply is
    left, Diverged if that is because numbers were not finite.
    """
    if not replies:
        raise none_left(len(fleet.devices), list(fleet.unusable.values()))
    declared = {reply.device: reply.weight for reply in replies} | rows_of(fleet)
    rows = {reply.device: declared[reply.device] for reply in replies}
    weights = capped(rows, largest_share(fleet))
    return [replace(reply, weight=weights[reply.device]) for reply in replies]


def on_todays(replies: Sequence[Reply[R]], **today: Tensors) -> list[Reply[R]]:
    """The replies, with the weights of late ones replaced by the current weights plus the change
    that the device made. So a device that began with older weights does not pull the server back.

    `today` has the current weights by field name of orders and results. Names that the current
    weights lack stay as they came.
    """

    def moved(reply: Reply[R]) -> Reply[R]:
        weights = {
            field: rebased(getattr(reply.value, field), getattr(reply.order, field), now)
            for field, now in today.items()
        }
        return replace(reply, value=replace(reply.value, **weights))  # type: ignore[type-var]

    return [moved(reply) if reply.late else reply for reply in replies]


_METHODS: dict[str, type] = {}  # filled at import time only


def method(
    name: str,
    *,
    merges_late: Work[Any, Any] | None = None,
    robust: bool = False,
    groups: int = 1,
    server_optimiser: bool = False,
    same_shapes: bool = False,
    changes_base: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Register a method class under the name that recipes use.

    - `merges_late`: the work whose results the method can merge in a later round than that of their
      order, which `fleet.quorum` below 1 needs; see `on_todays`.
    - `robust`: the method merges everything that devices send by `fleet.aggregation`, which any
      aggregation but the mean needs; see `core.merging.merged`.
    - `groups`: into how many groups of devices at most it divides a round, each merged by itself.
    - `server_optimiser`: everything that it merges takes the step of `fleet.server`, as
      `core.merging` does it.
    - `same_shapes`: a device trains tensors of the same names, shapes and meaning whenever it is
      asked, so it can keep values for each of their entries.
    - `changes_base`: a method that tunes adapters also changes the weights below them, which
      therefore cannot be held quantised (`run.frozen_bits`).

    A method that can train nets on arrays has `models: ClassVar = ("transformer", "net")`; without
    it, a recipe with a net is refused. `privacy: ClassVar = ("rows", "devices")` names the levels
    of `[privacy]` that a method supports; without it, none. Raises TypeError for a name that
    another class has, and for a class that is not a frozen dataclass whose fields have defaults; a
    class that is defined again, as in a notebook, replaces itself.

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
        _check_settings(cls)
        _METHODS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        late = None if merges_late is None else name_of(merges_late)
        cls.merges_late = late  # type: ignore[attr-defined]
        cls.robust = robust  # type: ignore[attr-defined]
        cls.groups = groups  # type: ignore[attr-defined]
        cls.server_optimiser = server_optimiser  # type: ignore[attr-defined]
        cls.same_shapes = same_shapes  # type: ignore[attr-defined]
        cls.changes_base = changes_base  # type: ignore[attr-defined]
        if "models" not in vars(cls):
            cls.models = ("transformer",)  # type: ignore[attr-defined]
        if "privacy" not in vars(cls):  # not what it extends: a method says so itself
            cls.privacy = ()  # type: ignore[attr-defined]
        return cls

    return register


def _check_settings(cls: type) -> None:
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise TypeError(
            f"{cls.__name__} is not a frozen dataclass; write @dataclass(frozen=True) between "
            "@method and the class"
        )
    for field in fields(cls):
        if field.default is MISSING:
            raise TypeError(
                f"the setting {field.name} of {cls.__name__} has no default value; write "
                f"{field.name}: ... = VALUE, such as a tuple in place of a list"
            )


def missing_functions(cls: type) -> list[str]:
    """The functions of `Method` that a run calls and this class lacks."""
    wanted = ("check", "start", "round", "deploy", "unpruned")
    return [name for name in wanted if not callable(getattr(cls, name, None))]


def registered() -> dict[str, type]:
    """The methods whose modules were imported, by name, in alphabetical order;
    `fedspine.methods.all_methods` imports all of them.
    """
    return dict(sorted(_METHODS.items()))


def forget(names: Iterable[str]) -> None:
    """Undo the registration of these methods, for a file whose import failed after it registered
    them.
    """
    for name in names:
        del _METHODS[name]
