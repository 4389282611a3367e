"""The report that every export has: how near it is to the model of the run, and what it costs."""

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
        """Raise BadInput where the export is outside its tolerance."""


Prove: TypeAlias = Callable[[Path], Parity]  # compares the export in a folder with the run's model


def proved(parity: Any, folder: Path) -> str:
    """Check a report, write it to `parity.json` in `folder`, and give the paragraph of the model
    card that says what was measured.
    """
    parity.check()
    text = json.dumps(asdict(parity), indent=2) + "\n"
    (folder / PARITY).write_text(text, encoding="utf-8")
    return f"Measured when it was written (`{PARITY}`): {parity.line}.\n\n"
