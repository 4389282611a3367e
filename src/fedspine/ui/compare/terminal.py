"""A comparison on the terminal: verdicts and one table for each setting."""

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedspine.report.tables import counted
from fedspine.ui.compare.comparison import ComparisonReport, ComparisonSection
from fedspine.ui.compare.render_text import methods_sheet, shown_first, target_line, verdict

WIDE = 120  # columns where there is no window


def show(report: ComparisonReport) -> None:
    """Print the verdicts and tables."""
    Console(width=None if sys.stdout.isatty() else WIDE).print(rendered(report))


def rendered(report: ComparisonReport) -> Group:
    """The verdicts and tables, for a terminal or a notebook."""
    parts: list[RenderableType] = [
        Text(f"left out: {left.folder} ({left.why})") for left in report.left_out
    ]
    for section in report.sections:
        parts += _section(section)
    return Group(*parts, *(Text(note) for note in report.notes))


def _section(section: ComparisonSection) -> Iterator[RenderableType]:
    comparison = section.comparison
    sheet = methods_sheet(comparison, section.latencies)
    table = Table(
        title=Text(comparison.title),
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, (head, _) in enumerate(sheet.head):
        table.add_column(head, justify="right" if number else "left")
    for row in sheet.rows:
        table.add_row(*(Text(cell.text) for cell in row))
    yield table
    first, rest = shown_first(comparison)
    for pair in first:
        yield Text(verdict(comparison, pair).text)
    if rest:
        yield Text(f"{counted(len(rest), 'other pair')}: on the page")
    yield Text(target_line(comparison))
