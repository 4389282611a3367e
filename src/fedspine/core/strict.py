"""Strict checks of hand-written TOML tables: no conversions, no unknown keys."""

import json
import math
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from fedspine.core.errors import BadInput, one_line, unknown

HINTS = {  # by pydantic's type of error
    "tuple_type": ", a list in brackets such as [4, 8]",
    "dict_type": ", a table in braces such as {tx2 = 2, nx = 1}",
}


class Section(pydantic.BaseModel):
    """A table whose keys are the fields of the class."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError for any other text, even one nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_toml(path: Path, what: str, instead: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises BadInput for a file that is missing or cannot be read; its
    text says `what` the file is and, if it is missing, what to do `instead`.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(f"{what} {path} does not exist; {instead}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{what} {path} cannot be read: {one_line(error)}") from None


def section(name: str, cls: type[Section], table: dict[str, Any]) -> Any:
    """The table called `name` as a `cls`; raises BadInput for an invalid value, and for an unknown
    key with the nearest valid one.
    """
    known_keys(f"key of [{name}]", table, cls.model_fields)
    return validated(name, cls, table)


def known_keys(what: str, table: Iterable[str], known: Iterable[str]) -> None:
    """Raise BadInput for the first name that is not one of `known`."""
    known = set(known)
    for key in table:
        if key not in known:
            raise unknown(what, key, known)


def validated(section: str, cls: type, table: Any, *, by_json: bool = False) -> Any:
    """The table or instance as a valid `cls`; raises BadInput with one line that names the key.

    `by_json` is for plain dataclasses, which pydantic reads strictly from JSON only; TOML's dates
    then become text.
    """
    for key, value in table.items() if isinstance(table, dict) else ():
        if value == "":  # as of `--set task.data=`, which as a path would be the current folder
            raise BadInput(f"{section}.{key} is empty; give it a value, or leave it out")
    adapter = _adapter(cls)
    try:
        made = (
            adapter.validate_json(json.dumps(table, default=str), strict=True)
            if by_json
            else adapter.validate_python(table)
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(said := first.get("ctx", {}).get("error"), BadInput):
            raise said from None  # a part of the recipe has a line of its own
        where = ".".join([section, *(str(part) for part in first["loc"])])
        if first["type"] == "literal_error":
            expected = re.split(", | or ", first["ctx"]["expected"])
            choices = [choice.strip("'") for choice in expected]
            raise unknown(where, str(first["input"]), choices) from None
        if first["type"] == "missing":
            raise BadInput(f"{where} is missing; it must be given") from None
        hint = HINTS.get(first["type"], "")
        raise BadInput(f"{where} is {first['input']!r}: {first['msg']}{hint}") from None
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, float) and not math.isfinite(
            value
        ):  # which fields of a dataclass let pass
            raise BadInput(f"{section}.{key} is {value}: a finite number was expected")
    return made


@cache
def _adapter(cls: type) -> pydantic.TypeAdapter[Any]:
    """It takes some 60 times as long to build as a table to check, and a sweep has a thousand."""
    return pydantic.TypeAdapter(cls)
