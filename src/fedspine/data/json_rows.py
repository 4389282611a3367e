"""JSON as rows: one object per line, a list of objects, or the object of columns that pandas
writes.
"""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fedspine.core.errors import BadInput, listed
from fedspine.data.parts import Empty, FilePart, Pick, Unreadable, counted

_LINE_END = re.compile(r"\r\n|\r|\n")  # a string of JSON cannot contain one
HOW = 'df.to_json(path, orient="records", lines=True)'


def part(text: str, pick: Pick) -> FilePart:
    """The picked values of every object, None for a missing key. Raises Unreadable for a text
    without rows.
    """
    begin = text.lstrip()[:1]
    if not begin:
        raise Empty
    if begin == "[":
        rows = _whole(text)
    else:
        lines = [line for line in _LINE_END.split(text) if line.strip()]
        if _continues(lines[0]):
            return _of_object(_whole(text), pick)
        if not lines[1:]:
            found = _whole(text)
            if (columns := _columns(found)) or _is_nested(found, pick):
                return _of_object(columns or found, pick)
        rows = _lines(text)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise Unreadable(
            f"expected one object for each row, found {_first_other(rows)}", f"write it with {HOW}"
        )
    return _of_rows(rows, pick)


def _of_rows(rows: Sequence[dict[str, Any]], pick: Pick) -> FilePart:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(names[place]) for row in rows] for name, place in pick(names).items()}
    return FilePart(columns=columns, rows=len(rows))


def _of_object(found: Any, pick: Pick) -> FilePart:
    """The rows of one object, of columns or of rows by their index; pandas writes both."""
    if _is_nested(found, pick):
        rows = found.get("data")
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return _of_rows(rows, pick)  # orient="table"
        raise Unreadable(
            f"expected rows, found one object with lists of objects: {listed(found)}",
            f"write each list to a file of its own with {HOW}",
        )
    columns = _columns(found)
    if columns is None:
        keys = listed(found) if isinstance(found, dict) else type(found).__name__
        raise Unreadable(f"expected rows, found one object of {keys}", f"write it with {HOW}")
    values = list(columns.values())
    if not any(values):  # a table without rows
        return FilePart(columns={name: [] for name in pick(list(columns))}, rows=0)
    if isinstance(values[0], list):
        return _of_rows(
            [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)], pick
        )
    inner = list(values[0])
    try:
        pick(list(columns))
    except BadInput:
        try:
            pick(inner)
        except BadInput:
            pass
        else:
            return _of_rows(values, pick)  # orient="index"
    return _of_rows([{name: of[row] for name, of in columns.items()} for row in inner], pick)


def _is_nested(found: Any, pick: Pick) -> bool:
    """Whether an object holds lists of objects and is not a row with such values itself."""
    if not isinstance(found, dict):
        return False
    lists = [value for value in found.values() if isinstance(value, list)]
    if not any(value and all(isinstance(item, dict) for item in value) for value in lists):
        return False
    with suppress(BadInput):
        pick(list(found))
        return False
    return True


def _columns(found: Any) -> dict[str, Any] | None:
    """The columns as pandas writes them, each a list, or an object with the same row names; None
    for anything else.
    """
    if not isinstance(found, dict) or not found:
        return None
    if set(found) >= {"columns", "data"} and isinstance(found["data"], list):  # orient="split"
        try:
            rows = list(zip(*found["data"], strict=True))
            return {name: list(of) for name, of in zip(found["columns"], rows, strict=True)}
        except (TypeError, ValueError):
            return None
    values = list(found.values())
    if all(isinstance(value, dict) for value in values):
        alike = all(value.keys() == values[0].keys() for value in values)
        return found if alike else None
    if all(isinstance(value, list) for value in values):
        # a list of objects is a conversation, a value of one row
        alike = all(len(value) == len(values[0]) for value in values)
        plain = not any(isinstance(item, dict) for value in values for item in value)
        return found if alike and plain else None
    return None


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _broken(f"line {number}: {_reason(error)}") from None
    return rows


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"a number has more than {sys.get_int_max_str_digits():,} digits"  # Python's limit


def _continues(line: str) -> bool:
    """Whether the line begins an object that continues on the next one; a broken row does not
    count.
    """
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return bool(re.fullmatch(r"\s*\{\s*(\"[^\"]*\"\s*:\s*[\[{]?\s*)?", line))
    return False


def _broken(reason: str) -> Unreadable:
    return Unreadable(reason, f"repair the file or save it again with {HOW}")


def _first_other(rows: Sequence[Any]) -> str:
    kinds = {str: "a string", list: "a list", int: "a number", float: "a number"}
    other = [row for row in rows if not isinstance(row, dict)]
    if not other:
        return "none"
    return f"{kinds.get(type(other[0]), repr(other[0]))} in {counted(len(other), 'place')}"
