"""Composed settings: a method's field that holds one of several dataclasses, chosen by `name`.

A part is a frozen dataclass with a class variable `name`. In TOML it is a nested table with that
name and the part's own settings; without a name it is the method's default part.
"""

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fedspine.core import strict
from fedspine.core.errors import BadInput, unknown

T = TypeVar("T")


@cache
def choices_of(cls: type) -> Mapping[str, dict[str, type]]:
    """The classes that each composed field of a dataclass may hold, by field, then by name."""
    hints = get_type_hints(cls)
    found = {field.name: _members(hints[field.name]) for field in dataclasses.fields(cls)}
    return {
        key: {part.name: part for part in members}
        for key, members in found.items()
        if members and all(map(is_part, members))
    }


def is_part(value: Any) -> bool:
    """Whether a class, or an object of it, is a part."""
    return dataclasses.is_dataclass(value) and isinstance(getattr(value, "name", None), str)


def quiet(default: T) -> T:
    """A field that a recipe states only if it differs from the default, so that recipes from before
    the field existed describe the same results.

    >>> from typing import ClassVar
    >>> @dataclasses.dataclass(frozen=True)
    ... class Some:
    ...     name: ClassVar = "some"
    ...     rank: int = 8
    ...     held: bool = quiet(False)
    >>> table_of(Some()), table_of(Some(held=True))
    ({'name': 'some', 'rank': 8}, {'name': 'some', 'rank': 8, 'held': True})
    """
    made: T = dataclasses.field(default=default, metadata={"quiet": True})
    return made


def table_of(value: Any) -> Any:
    """A field's value in the form of TOML: a table for a part, a list for a tuple."""
    if is_part(value):
        settings = {
            f.name: table_of(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("quiet") and getattr(value, f.name) == f.default)
        }
        return {"name": value.name} | settings
    return list(value) if isinstance(value, tuple) else value


def part(where: str, choices: dict[str, type], default: Any, table: Any) -> Any:
    """The part that a table describes. Settings that it leaves out are those of `default`, or, if
    it names another class, that class's defaults.

    `where` is the table's key in errors. Raises BadInput for a value that is no table, an unknown
    name or key, and an invalid value.
    """
    if not isinstance(table, dict):
        raise BadInput(
            f"{where} is {table!r}, but a table was expected; name one of "
            f"{', '.join(sorted(choices))} as {where}.name"
        )
    settings = {key: value for key, value in table.items() if key != "name"}
    name = table.get("name", default.name)
    if not isinstance(name, str) or name not in choices:
        raise unknown(f"{where}.name", str(name), choices)
    cls = choices[name]
    strict.known_keys(
        f"key of [{where}] for {name}", settings, [field.name for field in dataclasses.fields(cls)]
    )
    made = strict.validated(where, cls, settings, by_json=True)
    begun = default if type(default) is cls else cls()
    return dataclasses.replace(begun, **{key: getattr(made, key) for key in settings})


def nested(table: dict[str, Any]) -> dict[str, Any]:
    """A method's table with its dotted keys as nested tables.

    >>> nested({"rank": 8, "controller.name": "fixed", "controller.rank": 4})
    {'rank': 8, 'controller': {'name': 'fixed', 'rank': 4}}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        head, dot, rest = key.partition(".")
        value = nested({rest: value}) if dot else value
        both = isinstance(found.get(head), dict) and isinstance(value, dict)
        found[head] = {**found[head], **value} if both else value
    return found


def dotted(table: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `nested`: nested tables as dotted keys.

    >>> dotted({"rank": 8, "controller": {"name": "fixed", "rank": 4}})
    {'rank': 8, 'controller.name': 'fixed', 'controller.rank': 4}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        below = dotted(value) if isinstance(value, dict) else {}
        found |= {f"{key}.{name}": item for name, item in below.items()} or {key: value}
    return found


def fitted(table: dict[str, Any], cls: type) -> dict[str, Any]:
    """The settings of another method's table that a method of class `cls` has, too, in nested form.

    Of a part, they are the settings that the default part of `cls` has.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    fitting: dict[str, Any] = {}
    for key, value in nested(table).items():
        if key not in fields:
            continue
        if isinstance(value, dict) and is_part(fields[key].default):
            own = {field.name for field in dataclasses.fields(fields[key].default)}
            value = {name: setting for name, setting in value.items() if name in own}
        fitting[key] = value
    return fitting


def laid_over(table: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """A method's table with another laid over it, in nested form. If the overlay names another
    part, the settings of the part below are dropped.

    >>> laid_over({"controller": {"name": "fixed", "rank": 4}}, {"controller.rank": 8})
    {'controller': {'name': 'fixed', 'rank': 8}}
    >>> laid_over({"controller": {"name": "fixed", "rank": 4}}, {"controller.name": "random"})
    {'controller': {'name': 'random'}}
    """
    laid = nested(table)
    for key, value in nested(overlay).items():
        below = laid.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            other = "name" in value and value["name"] != below.get("name")
            value = value if other else {**below, **value}
        laid[key] = value
    return laid


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
