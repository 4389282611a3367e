"""The figures of a run's report, each drawn where the run has data for it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from fedspine.report.drawing import (
    FAINT,
    FEW_ROUNDS,
    INK,
    Axes,
    Figure,
    Panel,
    blank,
    byte_ticks,
    canvas,
    count_ticks,
    curve,
    legend,
    marker,
    number_ticks,
    percent_ticks,
    round_ticks,
    styled,
)
from fedspine.report.rows import RunRows
from fedspine.report.series import Band, bands, exchange_seconds, has_accuracy, traffic, waiting
from fedspine.report.tables import (
    UnprunedRun,
    bytes_text,
    decimal,
    percent,
    references,
    unpruned_base,
)

DEVICES, GLOBAL = "#7c3aed", "#0891b2"
DOWN, UP = "#475569", "#e11d48"
REFERENCE, REFERENCE_STYLES = "#64748b", ((0, (1, 2)), (0, (4, 1.5, 1, 1.5)))
DASHES = ((0, (5, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
IDLE, BUSY = "#f59e0b", "#dbe2ea"
CLASS_COLOURS = {"tx2": "#2563eb", "nx": "#ea8a0c", "agx": "#0d9f6e"}
OTHER_COLOURS = ("#c026d3", "#0ea5e9", "#be123c", "#78716c", "#4d7c0f")
WIDE_RANGE = 10  # classes whose medians differ more are compared on a logarithmic axis


def panels(
    rows: RunRows, summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun] = ()
) -> list[Panel]:
    """The figures for which this run has data, in reading order."""
    with styled():
        drawn = (
            _quality(rows, summary, unpruned),
            _exchange_seconds(rows),
            _sparsity(rows),
            _rank(rows),
            _waiting(rows),
            _traffic(rows),
        )
    return [panel for panel in drawn if panel is not None]


def _quality(
    rows: RunRows, summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun]
) -> Panel | None:
    if not rows.scores:
        return None
    name, form = ("accuracy", percent) if has_accuracy(rows, summary) else ("loss", decimal)
    figure, axes = blank()
    # the wider line is drawn first, so that both are seen where they are one
    for label, key, colour, width in (
        ("devices", name, DEVICES, 3.6),
        ("global", f"{name}_global", GLOBAL, 1.6),
    ):
        scores = [score for score in rows.scores if getattr(score, key) is not None]
        if scores:
            line = curve(
                axes,
                [score.now for score in scores],
                [getattr(score, key) for score in scores],
                colour,
                width,
            )
            line.set_label(f"{label} {form(getattr(scores[-1], key))}")
    dashed, said = _unpruned_lines(name, summary, unpruned)
    for (what, value), style in zip(dashed, cycle(DASHES)):
        axes.axhline(
            value, color=INK, linewidth=1.2, linestyle=style, label=f"{what} {form(value)}"
        )
    drawn = references(summary)
    for (what, _, value), style in zip(drawn, REFERENCE_STYLES, strict=False):
        axes.axhline(value, color=REFERENCE, linewidth=1.2, linestyle=style, zorder=1)
        # beside its line and not in the legend, whose names are those of the run's own models
        axes.annotate(
            f"{what} {form(value)}",
            (0.01, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            color=REFERENCE,
            fontsize=8.5,
            zorder=4,
        )
    axes.set(xlabel="simulated seconds", ylabel="accuracy" if name == "accuracy" else "loss (nats)")
    number_ticks(axes)
    axes.set_xlim(0, 1.04 * max(score.now for score in rows.scores) or 1)
    if name == "accuracy":
        percent_ticks(axes)
    legend(axes)
    caption = (
        f"Mean {name} of the models that devices run and {name} of the global model, on the test "
        f"rows; rings mark the last scores, which the legend repeats{said}."
    )
    if drawn:
        axes.margins(y=0.09)  # room for a name above the highest line
        caption += " Grey lines are references: values that need no federated training."
    return Panel("quality", f"{name.capitalize()} over simulated time", caption, figure)


def _unpruned_lines(
    name: str, summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun]
) -> tuple[list[tuple[str, float]], str]:
    """The unpruned curves drawn beside a pruned run, and their caption."""
    runs = [(run.name, value) for run in unpruned if (value := run.quality(name)) is not None]
    if runs:
        return runs, ", and dashed lines are the final scores of unpruned runs of the same budget"
    base = unpruned_base(summary)
    if base is None:
        return [], ""
    value, note = base
    return [("unpruned base", value)], f", and the dashed line is the unpruned base ({note})"


def _sparsity(rows: RunRows) -> Panel | None:
    found = bands(rows, lambda note: note.sparsity)
    # no figure for a method that does not prune
    if not any(band.high.any() for band in found.values()):
        return None
    figure, axes = _band_figure(found, "sparsity")
    percent_ticks(axes)
    caption = (
        "Share of prunable parameters removed: the line is the mean of the class's devices in that "
        "round, the band reaches from the least to the most pruned."
    )
    return Panel("sparsity", "Sparsity by device class", caption, figure)


def _rank(rows: RunRows) -> Panel | None:
    found = bands(rows, lambda note: note.rank)
    # a single rank is a number for the table
    if len({value for band in found.values() for value in (*band.low, *band.high)}) < 2:
        return None
    figure, axes = _band_figure(found, "LoRA rank")
    count_ticks(axes.yaxis)
    caption = (
        "LoRA rank that devices trained with: the line is the class's mean in that round, "
        "the band reaches from the lowest to the highest."
    )
    return Panel("rank", "Rank by device class", caption, figure)


def _exchange_seconds(rows: RunRows) -> Panel | None:
    found = exchange_seconds(rows)
    if not found:
        return None
    figure, axes = blank()
    colours = class_colours(found)
    boxes = axes.boxplot(
        [*found.values()],
        orientation="horizontal",
        tick_labels=[*found],
        whis=(5, 95),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
        whiskerprops={"color": FAINT},
        capprops={"color": FAINT},
    )
    for box, median, colour in zip(boxes["boxes"], boxes["medians"], colours.values(), strict=True):
        box.set(facecolor=(colour, 0.3), edgecolor=colour)
        median.set(color=colour, linewidth=3)
    medians = [float(line.get_xdata()[0]) for line in boxes["medians"]]
    if min(medians) > 0 and max(medians) / min(medians) > WIDE_RANGE:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    number_ticks(axes)
    axes.set(xlabel="simulated seconds per exchange")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    caption = (
        "From order to result: the box holds the middle half of a class's exchanges with the "
        "median as a thick line, the whiskers nine tenths; lost exchanges are not counted."
    )
    return Panel("seconds", "Time per exchange by device class", caption, figure)


def _waiting(rows: RunRows) -> Panel | None:
    found = waiting(rows)
    if not found.seconds.any():
        return None
    figure = canvas()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    busy = (found.lengths - found.seconds).clip(min=0)
    width = 0.75 if len(found.rounds) <= FEW_ROUNDS else 1.0
    top.bar(found.rounds, busy, width, color=BUSY, label="mean device busy")
    top.bar(
        found.rounds, found.seconds, width, bottom=busy, color=IDLE, label="mean device waiting"
    )
    top.set(ylabel="simulated seconds")
    total = found.seconds.sum() / max(found.lengths.sum(), 1e-9)
    bottom.plot(found.rounds, found.shares, color=IDLE, marker=marker(found.rounds))
    bottom.axhline(
        total, color=INK, linewidth=1, linestyle=(0, (5, 3)), label=f"whole run {percent(total)}"
    )
    bottom.set(xlabel="round", ylabel="waiting share")
    bottom.set_ylim(0, max(1.25 * found.shares.max(), 0.05))
    for axes in (top, bottom):
        axes.grid(visible=False, axis="x")
        legend(axes)
    percent_ticks(bottom, 3)
    round_ticks(bottom, found.rounds)
    caption = (
        "A bar is one round, as long as its slowest device; the orange part is what the mean "
        "device spent waiting for it, and below is the same as a share."
    )
    return Panel("waiting", "Waiting per round", caption, figure)


def _traffic(rows: RunRows) -> Panel | None:
    found = traffic(rows)
    if not len(found.rounds):
        return None
    figure, axes = blank()
    for label, sums, colour in (
        ("down to devices", found.down, DOWN),
        ("up to the server", found.up, UP),
    ):
        text = f"{label} {bytes_text(sums[-1])}"
        axes.plot(found.rounds, sums, color=colour, label=text, marker=marker(sums))
    axes.set(xlabel="round", ylabel="bytes since the start")
    axes.set_ylim(0, 1.06 * max(found.down[-1], found.up[-1]) or 1)
    byte_ticks(axes.yaxis)
    round_ticks(axes, found.rounds)
    legend(axes)
    caption = (
        "Bytes of all devices together since the start, "
        "as packed; a steeper line is a costlier round."
    )
    return Panel("traffic", "Traffic", caption, figure)


def class_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour per device class; the known classes keep theirs in every figure and every run."""
    others = sorted(name for name in names if name not in CLASS_COLOURS)
    cycled = {
        name: OTHER_COLOURS[number % len(OTHER_COLOURS)] for number, name in enumerate(others)
    }
    return {name: CLASS_COLOURS.get(name) or cycled[name] for name in names}


def _band_figure(found: Mapping[str, Band], label: str) -> tuple[Figure, Axes]:
    """A band and its mean for each class of devices, over the rounds, from 0 on."""
    figure, axes = blank()
    for name, colour in class_colours(found).items():
        band = found[name]
        axes.fill_between(band.rounds, band.low, band.high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(band.rounds, band.mean, color=colour, label=name, marker=marker(band.rounds))
    round_ticks(axes, [number for band in found.values() for number in band.rounds])
    legend(axes)
    axes.set(xlabel="round", ylabel=label)
    axes.set_ylim(bottom=0)
    return figure, axes
