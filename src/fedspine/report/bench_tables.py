"""Tables of measured costs of exported models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedspine.report.tables import bytes_text, counted, decimal, percent


def bench_table(found: Mapping[str, Any]) -> Table:
    """Measured costs of one model, or of two side by side with their ratios."""
    model, against, ratios = found["model"], found.get("against"), found.get("ratio", {})
    title = f"measured on {counted(model['threads'], 'thread')}, {model['tokens']} tokens a row"
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
        _bench_row(table, label, found, lambda b, k=key, t=text: t(b[k]), ratios.get(key))
    return table


def benches_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Measured costs of several models, one a row, and how they predict the same rows."""
    first = entries[0]
    title = f"measured on {counted(first['threads'], 'thread')}, {first['tokens']} tokens a row"
    shared = first.get("same_rows")
    if shared:
        title += f"; predictions on {counted(shared['rows'], 'row')} ({shared['rows_from']})"
    batches = list(first["latency_seconds"])
    columns = ["format", "run by", *(f"ms, batch {batch}" for batch in batches), "weights"]
    columns += ["peak memory", "parameters"]
    quality = shared and ("loss" if shared["accuracy"] is None else "accuracy")
    if shared:
        columns += ["as the first", *([quality] if _quality_of(shared) is not None else [])]
    table = Table("", *columns, title=title, title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    for entry in entries:
        cells = [entry["folder"], entry["format"], entry["runtime"]]
        cells += [f"{1e3 * entry['latency_seconds'][batch]:.1f}" for batch in batches]
        cells += [bytes_text(entry["file_bytes"]), bytes_text(entry["peak_memory_bytes"])]
        cells.append(f"{entry['parameters']:,}")
        if shared:
            cells.append(percent(entry["same_rows"]["equal_predictions"]))
            if (value := _quality_of(entry["same_rows"])) is not None:
                cells.append(percent(value) if quality == "accuracy" else decimal(value))
        table.add_row(*map(Text, cells))
    return table


def _quality_of(rows: Mapping[str, Any]) -> float | None:
    value = rows["accuracy"] if rows["mean_loss"] is None else rows["mean_loss"]
    return None if value is None else float(value)


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
