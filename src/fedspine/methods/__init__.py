"""The methods, one file each: a new file here is found without being listed anywhere.

Installed packages bring further ones by entry points of the group `fedspine.methods`, whose names
are those of the methods and whose objects are their classes; docs/python.md has an example.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedspine.core.errors import BadInput, one_line, unknown
from fedspine.core.method import forget, registered

GROUP = "fedspine.methods"


@dataclass(frozen=True)
class Broken:
    """An installed method that cannot be used, and why."""

    name: str
    package: str  # name and version
    why: str

    @property
    def line(self) -> str:
        return f"method {self.name!r} of {self.package} cannot be used: {self.why}"


def all_methods() -> dict[str, type]:
    """Every method by name, those of installed packages too, but for those that are `broken`.

    >>> "fedlora" in all_methods()
    True
    """
    _import_own()
    _installed()
    return registered()


def find(name: str) -> type[Any]:
    """The method called `name`; BadInput names the nearest one, or says why it cannot be used.

    No package is imported for a method that comes with fedspine.
    """
    if comes_with_fedspine(name):
        return registered()[name]
    methods = all_methods()
    if name in methods:
        return methods[name]
    for one in broken():
        if one.name == name:
            raise BadInput(f"{one.line}; install a version of it that fits, or remove it")
    raise unknown("method", name, methods)


def comes_with_fedspine(name: str) -> bool:
    """Whether this is a method of fedspine itself."""
    _import_own()
    cls = registered().get(name)
    return cls is not None and cls.__module__.startswith(f"{__name__}.")


def sends_features(cls: type) -> bool:
    """Whether devices send features of single rows in this method: whether it is a split method."""
    from fedspine.split.baseline import SplitTraining

    return issubclass(cls, SplitTraining)


def packages() -> Mapping[str, str]:
    """Name and version of the package that brings a method, for those of installed packages."""
    return _installed()[0]


def broken() -> tuple[Broken, ...]:
    """The installed methods that cannot be used."""
    return _installed()[1]


@cache
def _import_own() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


@cache
def _installed() -> tuple[dict[str, str], tuple[Broken, ...]]:
    """Import the methods of installed packages, once; one that fails leaves the others alone."""
    _import_own()  # first, so that their names cannot be taken
    packages, failed = {}, []
    for entry in entry_points(group=GROUP):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
        before = registered().keys()
        try:
            _check(entry, entry.load())
            packages[entry.name] = package
        except Exception as error:  # whatever the package's code raises
            forget(registered().keys() - before)
            why = one_line(error)
            failed.append(Broken(entry.name, package, f"{type(error).__name__}: {why}"))
    return packages, tuple(failed)


def _check(entry: EntryPoint, cls: Any) -> None:
    if registered().get(entry.name) is not cls:
        raise TypeError(
            f"{entry.value} is not the class registered as {entry.name!r}; decorate it with "
            f"@method({entry.name!r})"
        )
