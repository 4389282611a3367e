"""What a run writes down while it goes: one JSON object a line, in the order of events."""

import json
import math
import os
from pathlib import Path
from typing import Any


class Records:
    """An append-only file of rows; `position` is a byte offset to which a resumed run cuts it back."""

    def __init__(self, path: Path, position: int = 0) -> None:
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115 - held for the whole run
        self._file.truncate(position)
        self._file.seek(position)
        self.round = 0

    def write(self, row: str, **values: Any) -> None:
        """Append one row of this kind; values that are not finite become null, as JSON has no name for them."""
        line = json.dumps({"row": row, "round": self.round, **_clean(values)})
        self._file.write(line.encode() + b"\n")

    def flush(self) -> int:
        """Put everything on disk; returns the position."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _clean(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _clean(item) for key, item in value.items()}
        case list() | tuple():
            return [_clean(item) for item in value]
    return value
