"""The registered methods, one file each: a new file here is found without being listed anywhere."""

import importlib
import pkgutil
from typing import Any

from fedspine.core.errors import unknown
from fedspine.core.method import registered


def all_methods() -> dict[str, type]:
    """Every method by name.

    >>> "fedlora" in all_methods()
    True
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return registered()


def find(name: str) -> type[Any]:
    """The method called `name`; BadInput names the nearest one otherwise."""
    methods = all_methods()
    if name not in methods:
        raise unknown("method", name, methods)
    return methods[name]
