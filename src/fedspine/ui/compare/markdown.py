"""A comparison as Markdown: the same verdicts and tables, with the figures beside it as files."""

from collections.abc import Callable, Iterable

from fedspine.ui.compare.caveats import caveats
from fedspine.ui.compare.comparison import ComparisonReport, ComparisonSection
from fedspine.ui.compare.render_text import (
    Sheet,
    TableCell,
    methods_sheet,
    pairs_sheet,
    target_line,
    verdict,
)


def markdown(report: ComparisonReport, file_of: Callable[[str], str]) -> str:
    """The text; `file_of` names the file of a figure."""
    parts = ["# Comparison", ""]
    parts += [
        f"Left out: {escaped(left.folder)} ({escaped(left.why)})." for left in report.left_out
    ]
    for section in report.sections:
        parts += ["", *_section(section, file_of)]
    parts += ["", "## How to read this", "", *(f"- {escaped(line)}" for line in caveats(report))]
    return "\n".join(parts) + "\n"


def _section(section: ComparisonSection, file_of: Callable[[str], str]) -> list[str]:
    comparison = section.comparison
    verdicts = [verdict(comparison, pair) for pair in comparison.pairs]
    lines = [f"## {escaped(comparison.title)}", ""]
    lines += [f"- {escaped(each.text)}" for each in verdicts]
    lines += [
        "",
        escaped(target_line(comparison)),
        "",
        *_table(methods_sheet(comparison, section.latencies)),
    ]
    lines += [
        "",
        *(f"![{escaped(panel.title)}]({file_of(panel.name)})" for panel in section.panels),
    ]
    return [*lines, "", *_table(pairs_sheet(comparison))] if comparison.pairs else lines


def _table(sheet: Sheet) -> list[str]:
    heads = [f"{head} ({hint})" if hint else head for head, hint in sheet.head]
    rule = ["---" if number == 0 else "---:" for number in range(len(heads))]
    return [_row(heads), _row(rule), *(_row(map(_cell, row)) for row in sheet.rows)]


def _cell(cell: TableCell) -> str:
    return ", ".join(escaped(part) for part in (cell.text, cell.note, cell.badge) if part)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """The text with what Markdown would read as its own made plain.

    >>> escaped("a_b | <c>")
    'a\\\\_b \\\\| \\\\<c>'
    """
    for sign in "\\`*_<|[#":
        text = text.replace(sign, f"\\{sign}")
    return text
