"""The page of a comparison: verdicts, the table, the figures, all pairs; one HTML file that fetches
nothing.
"""

from typing import Any

import fedspine
from fedspine.report.html import Figure, rendered
from fedspine.report.tables import counted
from fedspine.report.traces import colour_of
from fedspine.ui.compare.caveats import caveats
from fedspine.ui.compare.comparison import ComparisonReport, ComparisonSection
from fedspine.ui.compare.render_text import (
    BEYOND,
    WITHIN,
    methods_sheet,
    pairs_sheet,
    shown_first,
    target_line,
    verdict,
)

BADGES = {BEYOND: "beyond", WITHIN: "within"}


def page(report: ComparisonReport) -> str:
    """The page as text."""
    several = len(report.sections) > 1
    return rendered(
        "compare.html",
        title="Comparison" if several else report.sections[0].comparison.title,
        what=_what(report),
        left_out=report.left_out,
        sections=[_section(section) for section in report.sections],
        colours={name: colour_of(number) for name, number in report.numbers.items()},
        badges=BADGES,
        caveats=caveats(report),
        footer=(
            f"fedspine {fedspine.__version__}. Simulated numbers come from a model of the devices."
        ),
    )


def _what(report: ComparisonReport) -> str:
    """One line on the compared runs."""
    results = [each for section in report.sections for each in section.comparison.results]
    methods = {result.method.name for result in results}
    seeds = sorted({seed for result in results for seed in result.final.values})
    parts = [
        counted(len(methods), "method"),
        counted(report.runs, "finished run"),
        f"seeds {', '.join(map(str, seeds))}",
    ]
    parts += [f"{len(report.sections)} settings"] if len(report.sections) > 1 else []
    return ", ".join(parts)


def _section(section: ComparisonSection) -> dict[str, Any]:
    """The template's values for one comparison."""
    comparison = section.comparison
    first, later = shown_first(comparison)
    return {
        "title": comparison.title,
        "shown_first": [verdict(comparison, pair) for pair in first],
        "told_later": [verdict(comparison, pair) for pair in later],
        "later": counted(len(later), "other pair"),
        "target": target_line(comparison),
        "methods": methods_sheet(comparison, section.latencies),
        "figures": [Figure.of(panel) for panel in section.panels],
        "pairs": pairs_sheet(comparison) if comparison.pairs else None,
    }
