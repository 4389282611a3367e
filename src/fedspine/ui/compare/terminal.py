"""A comparison on the terminal: verdicts and one table for each setting."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedspine.report.tables import counted
from fedspine.ui.compare.comparison import Found
from fedspine.ui.compare.render_text import methods_sheet, target_line, told_first, verdict

WIDE = 120  # columns where nobody's window sets a limit


def show(found: Found) -> None:
    """Print what the page says first."""
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for left in found.left_out:
        console.print(Text(f"left out: {left.folder} ({left.why})"))
    for section in found.sections:
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
        console.print(table)
        first, rest = told_first(comparison)
        for pair in first:
            console.print(Text(verdict(comparison, pair).text))
        if rest:
            console.print(f"{counted(len(rest), 'other pair')}: on the page")
        console.print(Text(target_line(comparison)))
    for note in found.notes:
        console.print(Text(note))
