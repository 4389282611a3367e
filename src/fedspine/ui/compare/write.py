"""The files of a comparison: the page, the Markdown table, the numbers, and every figure beside
them.
"""

import json
from pathlib import Path

from fedspine.core.errors import BadInput
from fedspine.report.drawing import svg
from fedspine.storage.records import plain
from fedspine.storage.store import write_atomically
from fedspine.ui.compare.comparison import ComparisonReport
from fedspine.ui.compare.markdown import markdown
from fedspine.ui.compare.page import page

PAGE, TABLE, NUMBERS = "compare.html", "compare.md", "compare.json"


def write(report: ComparisonReport, out: Path) -> Path:
    """Write all files into the folder, in place of those of an earlier comparison; returns the
    page's path.

    Raises BadInput where the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"output folder {out} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    for section in report.sections:
        for panel in section.panels:
            write_atomically(out / _file(panel.name), svg(panel, background=True).encode())
    write_atomically(out / TABLE, markdown(report, _file).encode())
    write_atomically(out / NUMBERS, json.dumps(plain(report.table()), indent=1).encode())
    write_atomically(out / PAGE, page(report).encode())
    return out / PAGE


def _file(name: str) -> str:
    return f"{name}.svg"
