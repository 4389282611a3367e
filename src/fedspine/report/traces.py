"""Figures that compare methods: a line for each with its band over seeds, distinguished by colour,
dash and mark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedspine.report.drawing import (
    INK,
    SIZE_INCHES,
    Axes,
    Panel,
    blank,
    byte_ticks,
    legend_below,
    number_ticks,
    percent_ticks,
    round_ticks,
    styled,
)
from fedspine.report.series import Floats

# Okabe and Ito's colours without yellow, which is hard to see on white, and with a grey; never the
# only difference
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8f98")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LONGEST_NAME = 28  # letters beside an axis
FEW_MARKS = 8  # on a line; checks of several seeds lie close together
Along = Literal["rounds", "seconds", "bytes"]
QualityName = Literal["accuracy", "loss"]
WORDS: Mapping[Along, str] = {"rounds": "rounds", "seconds": "simulated time", "bytes": "bytes"}
LABELS: Mapping[Along, str] = {
    "rounds": "rounds",
    "seconds": "simulated seconds",
    "bytes": "bytes down and up, all devices",
}


@dataclass(frozen=True)
class Trace:
    """One method's quality along the costs `xs`: the mean over seeds and, with two seeds or more,
    its band.

    `number` picks colour, dash and mark, the same in every figure; `end` is the last cost, the
    final quality and its spread, where all seeds have them.
    """

    name: str
    number: int
    xs: Floats
    mean: Floats
    low: Floats | None
    high: Floats | None
    end: tuple[float, float, float | None] | None


@dataclass(frozen=True)
class Gap:
    """The distance of a method's final quality from the best one's: per common seed, the mean and
    its interval.
    """

    name: str
    number: int
    seeds: Sequence[float]
    mean: float | None
    low: float | None
    high: float | None


def colour_of(number: int) -> str:
    """The colour of the method with this number."""
    return COLOURS[number % len(COLOURS)]


def mark_of(number: int) -> str:
    """The mark of the method with this number; the second one of a colour has another."""
    return MARKS[(number + number // len(COLOURS)) % len(MARKS)]


def trace_panel(
    name: str,
    quality: QualityName,
    caption: str,
    traces: Sequence[Trace],
    along: Along,
    target: float | None,
) -> Panel:
    """Quality along one cost, with the target as a dotted line where there is one."""
    with styled():
        figure, axes = blank()
        for trace in traces:
            _draw(axes, trace, steps=along != "rounds")
        if target is not None:
            axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="target")
        axes.set(
            xlabel=LABELS[along], ylabel="accuracy" if quality == "accuracy" else "loss (nats)"
        )
        _ticks(axes, traces, along)
        if quality == "accuracy":
            percent_ticks(axes)
        legend_below(figure, axes)
    return Panel(name, f"{quality.capitalize()} over {WORDS[along]}", caption, figure)


def gap_panel(
    name: str, quality: QualityName, caption: str, best: str, gaps: Sequence[Gap]
) -> Panel:
    """One row for each method, in points or nats; a method that shares no seed with the best one
    has an empty row.
    """
    scale = 100 if quality == "accuracy" else 1
    with styled():
        figure, axes = blank()
        figure.set_size_inches(SIZE_INCHES[0], min(SIZE_INCHES[1], 0.9 + 0.4 * len(gaps)))
        axes.axvline(0, color=INK, linewidth=1)
        for row, gap in enumerate(gaps):
            colour = colour_of(gap.number)
            axes.plot(
                [scale * seed for seed in gap.seeds],
                [row + 0.22] * len(gap.seeds),
                "o",
                color=colour,
                alpha=0.35,
            )
            if gap.low is not None and gap.high is not None:
                axes.plot(
                    [scale * gap.low, scale * gap.high], [row, row], color=colour, linewidth=2.2
                )
            if gap.mean is not None:
                axes.plot(scale * gap.mean, row, mark_of(gap.number), color=colour, markersize=8)
        axes.set_yticks(range(len(gaps)), [shortened(gap.name) for gap in gaps])
        axes.set_ylim(len(gaps) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set(
            xlabel=f"{quality} minus that of {shortened(best)}, {'points' if scale > 1 else 'nats'}"
        )
    return Panel(name, f"Final {quality} against {best}", caption, figure)


def shortened(name: str) -> str:
    """A name that leaves the figure room.

    >>> shortened("magnitude pruning, then FedLoRA at rank 8")
    'magnitude pruning, then Fed…'
    """
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _draw(axes: Axes, trace: Trace, *, steps: bool) -> None:
    colour = colour_of(trace.number)
    again = trace.number // len(COLOURS)  # more methods than colours: the dashes move on by one
    dash, mark = DASHES[(trace.number + again) % len(DASHES)], mark_of(trace.number)
    if trace.low is not None and trace.high is not None:
        step = "post" if steps else None
        axes.fill_between(
            trace.xs, trace.low, trace.high, step=step, color=colour, alpha=0.1, linewidth=0
        )
    style = {"drawstyle": "steps-post" if steps else "default", "marker": mark}
    style |= {"markevery": max(1, len(trace.xs) // FEW_MARKS)}
    # which would be left out of the legend
    label = f" {trace.name}" if trace.name.startswith("_") else trace.name
    axes.plot(trace.xs, trace.mean, color=colour, linestyle=dash, label=label, **style)
    if trace.end is not None:
        x, y, spread = trace.end
        ring = {
            "markersize": 8,
            "markerfacecolor": "white",
            "markeredgewidth": 1.8,
            "elinewidth": 1.4,
            "zorder": 3,
        }
        axes.errorbar(x, y, yerr=spread, fmt=mark, color=colour, markeredgecolor=colour, **ring)


def _ticks(axes: Axes, traces: Sequence[Trace], along: Along) -> None:
    reached = [float(x) for trace in traces for x in (*trace.xs, *(trace.end or ())[:1])]
    if along == "rounds":
        round_ticks(axes, reached or [0])
        return
    axes.set_xlim(0, 1.04 * max(reached, default=0) or 1)
    if along == "bytes":
        byte_ticks(axes.xaxis)
    else:
        number_ticks(axes)
