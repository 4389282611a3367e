"""The parity report of every export: how close it is to the model of the run, and what it costs."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedspine.exports.card import PARITY


class Parity(Protocol):
    """A report of one format and kind of model: a dataclass of numbers."""

    @property
    def line(self) -> str:
        """The report in one line."""

    def check(self) -> None:
        """Raise BadInput if the export is outside its tolerance."""


# compares the export in a folder with the model of the run
ParityCheck: TypeAlias = Callable[[Path], Parity]


def write_parity(parity: Any, folder: Path) -> str:
    """Check a report and write it to `parity.json` in `folder`; returns the paragraph of the model
    card with the measurements.
    """
    parity.check()
    text = json.dumps(asdict(parity), indent=2) + "\n"
    (folder / PARITY).write_text(text, encoding="utf-8")
    return f"Measured at export (`{PARITY}`): {parity.line}.\n\n"
