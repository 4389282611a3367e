"""Checks that a decoded value conforms to the annotations of its message type, recursively.

The codec checks field names only; a message from an untrusted peer needs its types checked before
use.
"""

import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union

import numpy as np


def conforms(value: Any, kind: Any) -> bool:
    """Whether `value` has the type `kind`: a class such as a message, tensor or array, a tuple,
    dict, union or Literal, bool, int, float or str, None, or Any.

    An int conforms to float, but a bool does not conform to int. Nothing conforms to any other
    annotation.

    >>> conforms((1, 2.0), tuple[float, ...]), conforms((1, "2"), tuple[float, ...])
    (True, False)
    >>> conforms(True, int)
    False
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin is Union or origin is types.UnionType:
        return any(conforms(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _items(value, arguments)
    if origin is dict:
        inside = isinstance(value, dict) and all(conforms(key, arguments[0]) for key in value)
        return inside and all(conforms(item, arguments[1]) for item in value.values())
    if kind in (bool, int, str):
        return type(value) is kind
    if kind is float:
        return type(value) in (float, int)
    return isinstance(kind, type) and isinstance(value, kind) and _fields(value)


def _items(value: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if len(kinds) == 2 and kinds[1] is ...:
        return all(conforms(item, kinds[0]) for item in value)
    return len(value) == len(kinds) and all(map(conforms, value, kinds))


def _fields(value: Any) -> bool:
    if not is_dataclass(value):
        return True
    kinds = _kinds(type(value))
    return all(conforms(getattr(value, field.name), kinds[field.name]) for field in fields(value))


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return _hints(cls)


@cache
def work_kinds(work: Callable[..., Any]) -> tuple[Any, Any]:
    """The declared types of a work's order and result."""
    hints = _hints(work)
    result = hints.pop("return")
    return list(hints.values())[-1], result


@cache
def result_kind(work: Callable[..., Any]) -> Any:
    """The declared type of a work's result; Any if there is none, or none that can be resolved."""
    try:
        return _hints(work).get("return", Any)
    except NameError:  # imported for type checkers alone
        return Any


def _hints(annotated: Any) -> dict[str, Any]:
    import torch

    # an alias that is a string cannot stand in a union
    return typing.get_type_hints(
        annotated, localns={"torch": torch, "np": np, "Tensors": dict[str, torch.Tensor]}
    )
