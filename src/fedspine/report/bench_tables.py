"""Tables of measured costs of exported models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedspine.report.tables import bytes_text, counted, decimal, percent

FP32 = (None, "none")  # what a report calls numbers that are stored as they are


def bench_table(found: Mapping[str, Any]) -> Table:
    """Measured costs of one model, or of two side by side with their ratios."""
    model, against, ratios = found["model"], found.get("against"), found.get("ratio", {})
    title = _measured(model)
    table = Table(
        "", "model", *(("against", "ratio") if against else ()), title=title, title_justify="left"
    )
    for batch in model["latency_seconds"]:
        _bench_row(
            table,
            f"latency, batch {batch}",
            found,
            lambda b, n=batch: f"{1e3 * b['latency_seconds'][n]:.1f} ms",
            ratios.get("latency", {}).get(batch),
        )
    for label, key, text in (
        ("weights in the blocks", "block_parameters", "{:,}".format),
        ("parameters in all", "parameters", "{:,}".format),
        ("weight file", "file_bytes", bytes_text),
        ("peak memory, libraries included", "peak_memory_bytes", bytes_text),
        ("format", "format", str),
        ("run by", "runtime", str),
    ):
        if model[key] is None:  # nets have no blocks that are pruned
            continue
        _bench_row(table, label, found, lambda b, k=key, t=text: t(b[k]), ratios.get(key))
    return table


def benches_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Measured costs of several models, one a row, and how they predict the same rows."""
    first = entries[0]
    shared = first["same_rows"]
    title = f"{_measured(first)}; predictions on {counted(shared['rows'], 'row')} "
    title += f"({shared['rows_from']})"
    batches = list(first["latency_seconds"])
    columns = ["format", "run by", *(f"ms, batch {batch}" for batch in batches), "weights"]
    columns += ["peak memory", "parameters", "as the first"]
    measure = next((key for key in ("accuracy", "perplexity") if shared[key] is not None), None)
    columns += [measure] if measure else []
    table = Table("", *columns, title=title, title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    for entry in entries:
        cells = [entry["folder"], _numbers(entry), entry["runtime"]]
        cells += [f"{1e3 * entry['latency_seconds'][batch]:.1f}" for batch in batches]
        cells += [bytes_text(entry["file_bytes"]), bytes_text(entry["peak_memory_bytes"])]
        cells.append(f"{entry['parameters']:,}")
        cells.append(percent(entry["same_rows"]["equal_predictions"]))
        if measure:
            value = entry["same_rows"][measure]
            cells.append(percent(value) if measure == "accuracy" else decimal(value))
        table.add_row(*map(Text, cells))
    return table


def _numbers(entry: Mapping[str, Any]) -> str:
    """The format, with how its numbers are stored where that is not fp32."""
    return " ".join([entry["format"], *([q] if (q := entry["quantize"]) not in FP32 else [])])


def _measured(model: Mapping[str, Any]) -> str:
    tokens = "" if model["tokens"] is None else f", {model['tokens']} tokens a row"
    return f"measured on {counted(model['threads'], 'thread')}{tokens}"


def _bench_row(
    table: Table,
    label: str,
    found: Mapping[str, Any],
    text: Callable[[Mapping[str, Any]], str],
    ratio: float | None,
) -> None:
    cells = [text(found["model"])]
    if found.get("against"):
        cells += [text(found["against"]), decimal(ratio)]
    table.add_row(label, *cells)
