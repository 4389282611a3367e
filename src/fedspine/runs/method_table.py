"""The [method] table of a recipe: the method that it names, its settings checked."""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from fedspine.core import parts, strict
from fedspine.core.errors import BadInput
from fedspine.core.method import missing_functions, registered
from fedspine.methods import all_methods, find
from fedspine.runs.recipe_format import GONE, MOVED, OF_THE_FLEET, TABLES


def method_of(given: Any) -> Any:
    """The method that a name, a table or an instance stands for, its settings checked."""
    match given:
        case str():
            table = {"name": given}
        case dict():
            table = dict(given)
        case _ if type(given) in registered().values():
            table = parts.table_of(given)
        case type() if given in registered().values():
            raise BadInput(f"method is the class {given.__name__}; write {given.__name__}()")
        case _:
            raise BadInput(
                f"method is {given!r}, which is not an instance of a registered method; decorate "
                "its class with @method(NAME), or give the name of a method"
            )
    name = table.pop("name", "fedspine")
    if not isinstance(name, str):
        raise BadInput(f"method.name must be a name in quotes, got {name!r}")
    cls = find(name)
    if missing := missing_functions(cls):
        raise BadInput(
            f"the method {name} cannot run, because {cls.__name__} does not define "
            f"{', '.join(missing)}; fedspine.Method says what each returns"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in (key for key in table if key not in fields):
        _refuse_moved(name, cls, key)
    strict.known_keys(f"key of [method] for {name}", table, fields)
    composed = {}
    for key, choices in parts.choices_of(cls).items():
        if key in table:
            _refuse_plain(key, table[key], choices)
            default = fields[key].default
            composed[key] = parts.part(f"method.{key}", choices, default, table.pop(key))
    made = strict.validated("method", cls, table, by_json=True)
    return dataclasses.replace(made, **composed)


def _refuse_plain(key: str, value: Any, choices: Collection[str]) -> None:
    """Raise BadInput for a plain value of what is a table by now."""
    if not isinstance(value, str | int | float):
        return
    named = f"{key} = {{{{name = {{value}}}}}}" if value in choices else None
    if template := TABLES.get(key, named):
        write = template.format(value=json.dumps(value))
        raise BadInput(f"method.{key} is {json.dumps(value)}, but it is a table now; write {write}")


def _refuse_moved(name: str, cls: type[Any], key: str) -> None:
    """Raise BadInput for a key that has another name or place by now, or belongs to a method that
    extends this one.
    """
    if key in OF_THE_FLEET:
        raise BadInput(
            f"method.{key} is no longer a setting of methods; write fleet.{OF_THE_FLEET[key]}"
        )
    extended = {
        other: found
        for other, found in all_methods().items()
        if issubclass(found, cls) and found is not cls
    }
    for other, found in {name: cls, **extended}.items():
        now = (MOVED | getattr(found, "renamed", {})).get(key, key)
        if now.partition(".")[0] in _keys(found):
            write = f"write {now}" if other == name else f'write name = "{other}"'
            of_key = "" if " for " in now else f" for {key}"
            also = f" and {now}{of_key}" if other != name and now != key else ""
            if other == name and extended and key in MOVED:  # which is what it was by default
                also = f'; for its earlier form write name = "{next(iter(extended))}"'
            raise BadInput(f"method.{key} is no longer a setting of {name}; {write}{also}")
    if key in GONE:
        raise BadInput(f"method.{key} is no longer a setting of methods; leave it out")


def _keys(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
