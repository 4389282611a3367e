"""The table and the plot of `fedspine fit`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedspine.report.drawing import Panel, blank, legend_below, percent_ticks, styled
from fedspine.report.tables import bytes_text, decimal, percent

COLOURS = {"hf": "#2563eb", "onnx": "#ea580c", "executorch": "#9333ea", "gguf": "#16a34a"}


def fit_table(found: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> Table:
    """A table of these candidates, one per row."""
    batch, measure = found["batch"], found["measure"]
    predicted = bool(candidates) and candidates[0]["predicted"]
    tokens = "" if found["tokens"] is None else f"{found['tokens']} tokens a row, "
    title = f"{tokens}batch {batch}; {measure} on {found['rows']} rows ({found['rows_from']})"
    if predicted:
        title += f"; latency predicted for {found['device_kind']}"
    latency = f"ms{', predicted' if predicted else ''}"
    table = Table(
        *("run", "model", "alike", "format", "sparsity", measure, "peak memory", latency, "fits"),
        title=title,
        title_justify="left",
    )
    for column in table.columns[4:8]:
        column.justify = "right"
    for column in table.columns:
        column.overflow = "fold"  # no part of a name is lost
    places = {one["run"] for one in candidates}
    short = len({Path(place).name for place in places}) == len(places)
    for one in candidates:
        quality = percent(one["quality"]) if measure == "accuracy" else decimal(one["quality"])
        table.add_row(
            *map(
                Text,
                (
                    Path(one["run"]).name if short else one["run"],
                    one["device"],
                    str(one["alike"]),
                    " ".join(filter(None, (one["format"], one["quantize"]))),
                    percent(one["sparsity"]),
                    quality,
                    bytes_text(one["memory_bytes"]),
                    f"{1e3 * one['latency_seconds']:.1f}",
                    "yes" if one["excess"] <= 1 else f"{one['excess']:.2f} x",
                ),
            )
        )
    return table


def fit_panel(found: Mapping[str, Any]) -> Panel:
    """Quality over latency; a point's area is its memory, and it is filled if it fits."""
    with styled():
        figure, axes = blank()
        limits, measure = found["limits"], found["measure"]
        largest = max(one["memory_bytes"] for one in found["candidates"])
        named: set[str] = set()
        for one in found["candidates"]:
            colour = COLOURS[one["format"]]
            axes.scatter(
                1e3 * one["latency_seconds"],
                one["quality"],
                s=20 + 120 * one["memory_bytes"] / largest,
                facecolors=colour if one["excess"] <= 1 else "none",
                edgecolors=colour,
                label=None if one["format"] in named else one["format"],
            )
            named.add(one["format"])
        if found["best"] is not None:
            best = found["best"]
            axes.annotate(
                f"{best['device']}, {best['format']} {best['quantize'] or ''}".strip(),
                (1e3 * best["latency_seconds"], best["quality"]),
                xytext=(7, -14),
                textcoords="offset points",
            )
        axes.margins(0.12)
        if limits["latency_seconds"] is not None:
            axes.axvline(1e3 * limits["latency_seconds"], color="#94a3b8", linestyle="--")
        kind = "predicted" if found["candidates"][0]["predicted"] else "measured"
        axes.set(xlabel=f"latency, ms, {kind}", ylabel=measure)
        if measure == "accuracy":
            percent_ticks(axes)
        legend_below(figure, axes)
    caption = "Filled points fit; a point's area grows with its peak memory."
    return Panel("fit", "What fits the device", caption, figure)
