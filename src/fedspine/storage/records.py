"""The records of a run: one JSON object per line, in the order of events."""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.strict import parsed

RECORDS = "records.jsonl"  # in a run's folder
CHUNK = 1 << 20  # bytes that are read at a time


class Records:
    """An append-only file of rows. It is first truncated to `position`, the byte offset of a
    resumed run.

    Raises BadInput for a file shorter than that.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        path.touch()
        if path.stat().st_size < position:
            raise BadInput(f"{path} {_lost(position)}; restore it from a copy")
        self._file = open(path, "r+b")  # noqa: SIM115 - held for the whole run
        self._digest = _digest(path, position)
        self._file.truncate(position)
        self._file.seek(position)
        self.round = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes written so far, in hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, row: str, **values: Any) -> None:
        """Append one row of the kind `row` with the current round."""
        line = json.dumps({"row": row, "round": self.round, **plain(values)}).encode() + b"\n"
        self._file.write(line)
        self._digest.update(line)

    def note(self, now: float, values: Mapping[str, Any]) -> None:
        """Append a remark; raises BadInput as `check_note` does."""
        check_note(values)
        self.write("note", now=now, values=values)

    def flush(self) -> int:
        """Flush everything to disk; returns the position in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def flaw(path: Path, position: int, sha256: str | None) -> str | None:
    """What is wrong with the first `position` bytes of a file of records; None if nothing is.

    Without a digest, which older versions did not keep, every line must be a row.
    """
    if not position or (sha256 is None and not path.exists()):  # which `Records` tells then
        return None
    if path.is_dir():
        return f"{path.name} is a folder"
    if not path.exists() or path.stat().st_size < position:
        return f"{path.name} {_lost(position)}"
    if sha256 == _digest(path, position).hexdigest():
        return None
    with open(path, "rb") as file:
        lines = file.read(position).split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            if not isinstance(parsed(line)["row"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            return f"line {number} of {path.name} is no row"
    if sha256 is None:
        return None if lines[-1] == b"" else f"{path.name} ends within a row"
    return f"{path.name} has other bytes than were written"


def has_rounds(path: Path) -> bool:
    """Whether a file of records has the row of a finished round."""
    return next(_rounds(path), None) is not None


def clock_of(path: Path) -> float:
    """The clock after the last finished round in a file of records, in seconds; 0 before the
    first.
    """
    last = deque(_rounds(path), maxlen=1)
    try:
        return float(json.loads(last[0])["now"]) if last else 0.0
    except ValueError:  # it is being written
        return 0.0


def _rounds(path: Path) -> Iterator[bytes]:
    """The rows of finished rounds."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (line for line in file if line.startswith(b'{"row": "round"'))


def _lost(position: int) -> str:
    return f"has lost rows: {position} bytes were expected at least"


def _digest(path: Path, position: int) -> Any:
    """A hash object, SHA-256, of a file's first `position` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while position and (chunk := file.read(min(position, CHUNK))):
            digest.update(chunk)
            position -= len(chunk)
    return digest


def check_note(values: Mapping[str, Any]) -> None:
    """Raise BadInput for a value of a remark that a record cannot state, such as a tensor of
    several entries.
    """
    for name, value in values.items():
        for part in _parts(plain(value)):
            if part is not None and not isinstance(part, bool | int | float | str):
                shape = getattr(part, "shape", None)
                of = "" if shape is None else f" of shape {tuple(shape)}"
                raise BadInput(
                    f"fleet.note got {name} with a {type(part).__name__}{of}, but numbers, texts, "
                    "None, and lists and dicts of these were expected; note its tolist(), or a "
                    "number or text in its place"
                )


def _parts(value: Any) -> Iterator[Any]:
    """The keys and values in plain lists and dicts, at every depth."""
    match value:
        case dict() | list():
            inside = (*value, *value.values()) if isinstance(value, dict) else value
            for item in inside:
                yield from _parts(item)
        case _:
            yield value


def plain(value: Any) -> Any:
    """The value with None in place of every number that is not finite, which JSON cannot express,
    and with numbers of numpy and torch as numbers.

    >>> import numpy as np
    >>> plain({"loss": float("nan"), "ranks": (4, np.int64(8)), "share": np.array(0.5)})
    {'loss': None, 'ranks': [4, 8], 'share': 0.5}
    """
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case object(ndim=0, item=number):  # a scalar, or an array or tensor without dimensions
            found = number()
            return found if type(found) is type(value) else plain(found)
    return value
