"""The methods and how they are found: each is a frozen dataclass whose fields are its hyper-parameters."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from fedspine.device import DeviceId
from fedspine.errors import unknown
from fedspine.fleet import Fleet

if TYPE_CHECKING:
    from fedspine.lm.model import Model
    from fedspine.task import Task

S = TypeVar("S")
T = TypeVar("T")


class Method(Protocol[S]):
    """A federated method: it owns the round, the fleet owns transport, time and bytes.

    The state is a message; `round` returns a new one and changes nothing in place.
    """

    def check(self, task: "Task") -> None:
        """Raise BadInput where these settings cannot work on this task, before anything is spent."""
        ...

    def start(self, task: "Task", rng: np.random.Generator) -> S: ...

    def round(self, state: S, fleet: Fleet) -> S: ...

    def deploy(self, state: S, device: DeviceId | None = None) -> "Model":
        """The model that `device` will run, or the one for everybody."""
        ...


_METHODS: dict[str, type] = {}  # filled at import time only


def method(name: str) -> Callable[[type[T]], type[T]]:
    """Register a method class under the name that recipes use."""

    def register(cls: type[T]) -> type[T]:
        _METHODS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return register


def all_methods() -> dict[str, type]:
    """Every method by name; a new file in `fedspine.methods` is found without being listed anywhere."""
    import fedspine.methods

    for module in pkgutil.iter_modules(fedspine.methods.__path__):
        importlib.import_module(f"fedspine.methods.{module.name}")
    return dict(sorted(_METHODS.items()))


def find(name: str) -> type[Any]:
    """The method called `name`; BadInput names the nearest one otherwise."""
    methods = all_methods()
    if name not in methods:
        raise unknown("method", name, methods)
    return methods[name]
