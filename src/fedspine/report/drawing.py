"""How every figure is drawn: one look, the axes, ticks and legends, and a figure as text for a
page.

The only file that knows matplotlib: its object interface and no pyplot, so no global state.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from fedspine.report.tables import bytes_text

INK, FAINT, GRID = "#334155", "#94a3b8", "#e8ecf1"
SIZE_INCHES = (
    5.6,
    3.5,
)  # at 72 units an inch the text is legible on a phone and not too large on a desktop
LEGEND_LETTERS, LEGEND_ROW_INCHES = (
    80,
    0.2,
)  # that fit beside each other under a figure; height of a row
LEGEND_HANDLE_LETTERS = 10  # as wide as a line's sample and the spaces around it
FEW_ROUNDS = 40  # up to here every round gets its own mark

STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "fedspine",  # the same figure gives the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,  # a name may hold any sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Panel:
    """A figure with its title and one sentence on how to read it; `name` is unique on the page."""

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def element(self) -> str:
        """The figure, which must be finished, as an <svg> element; drawn once, since a comparison
        needs it for the page and for a file.
        """
        return _drawn(self)


def styled() -> AbstractContextManager[Any]:
    """Figures made in this context use the style of this file."""
    return matplotlib.rc_context(STYLE)


def svg(panel: Panel, *, background: bool = False) -> str:
    """The figure as an <svg> element to be put into a page: no XML header, no metadata, ids of its
    own.

    As a file of its own it needs a white `background`, since it may be shown on a dark page.
    """
    if not background:
        return panel.element
    tag, rest = panel.element.split(">", 1)
    return f'{tag}>\n <rect width="100%" height="100%" fill="#ffffff"/>{rest}'


def _drawn(panel: Panel) -> str:
    figure, out = panel.figure, StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set(facecolor="none", edgecolor="none")
    # a letter that the font lacks is measured as a box, and drawn by the reader's own font
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # not figure.savefig, which draws a figure with a layout once more to lay it out
        FigureCanvasSVG(figure).print_svg(out)
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # figures share a page, and matplotlib counts from figure_1 in each
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.title)}" ', 1).rstrip()


def curve(axes: Axes, times: list[float], values: list[float], colour: str, width: float) -> Line2D:
    """Draw a line, which is returned, and a ring around its last point."""
    style = {"linewidth": width, "marker": marker(values), "markersize": width + 2.4}
    (line,) = axes.plot(times, values, color=colour, **style)
    ring = {
        "markersize": 7 + width,
        "markerfacecolor": "none",
        "markeredgecolor": colour,
        "markeredgewidth": 1.8,
    }
    axes.plot(times[-1], values[-1], "o", **ring)
    return line


def canvas() -> Figure:
    """An empty figure of the usual size."""
    return Figure(figsize=SIZE_INCHES, layout="constrained")


def blank() -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = canvas()
    return figure, figure.subplots()


def legend(axes: Axes) -> None:
    """The legend above the axes, where there is no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=1.4,
    )


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend below the axes, in as many columns as the longest name allows; the figure grows by
    the legend's height.
    """
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    columns = max(
        1, min(4, len(names), LEGEND_LETTERS // (max(map(len, names)) + LEGEND_HANDLE_LETTERS))
    )
    rows = -(-len(names) // columns)
    figure.set_size_inches(SIZE_INCHES[0], SIZE_INCHES[1] + LEGEND_ROW_INCHES * rows)
    figure.legend(
        handles, names, loc="outside lower left", ncols=columns, borderpad=0, handlelength=2.6
    )


def marker(points: Any) -> str:
    return "o" if len(points) <= FEW_ROUNDS else ""


def percent_ticks(axes: Axes, most: int = 6) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(most, steps=(1, 2, 5, 10)))


def round_ticks(axes: Axes, rounds: Iterable[float]) -> None:
    rounds = list(rounds)
    margin = max(0.7, 0.02 * len(set(rounds)))
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))


def number_ticks(axes: Axes) -> None:
    """Unabbreviated numbers along x, with commas between thousands."""
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def byte_ticks(axis: Any) -> None:
    """Bytes with their units along one axis."""
    # without steps of 2.5, which the one decimal of bytes_text would round
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: "0" if not value else bytes_text(value))
    )


def count_ticks(axis: Any, most: int = 6) -> None:
    """Whole numbers along one axis."""
    axis.set_major_locator(MaxNLocator(most, integer=True))
