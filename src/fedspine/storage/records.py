"""The records of a run: one JSON object per line, in the order of events."""

import json
import math
import os
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput


class Records:
    """An append-only file of rows; `position` is a byte offset to which a resumed run cuts it back.

    Raises BadInput for a file shorter than that.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        path.touch()
        if path.stat().st_size < position:
            raise BadInput(
                f"{path} has lost rows: {position} bytes were "
                "expected at least; restore it from a copy"
            )
        self._file = open(path, "r+b")  # noqa: SIM115 - held for the whole run
        self._file.truncate(position)
        self._file.seek(position)
        self.round = 0

    def write(self, row: str, **values: Any) -> None:
        """Append one row of this kind."""
        line = json.dumps({"row": row, "round": self.round, **plain(values)})
        self._file.write(line.encode() + b"\n")

    def flush(self) -> int:
        """Flush everything to disk; returns the position."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def plain(value: Any) -> Any:
    """The value with null in place of every number that is not finite, for which JSON has no name.

    >>> plain({"loss": float("nan"), "ranks": (4, 8)})
    {'loss': None, 'ranks': [4, 8]}
    """
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value
