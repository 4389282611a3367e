"""Tables of measured costs of exported models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedspine.report.tables import bytes_text, counted, decimal, percent

USUAL = {
    "hf": "PyTorch",
    "peft": "PyTorch",
    "onnx": "ONNX",
    "executorch": "ExecuTorch",
    "gguf": "llama.cpp",
}  # runtimes
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
    measure = next((key for key in ("accuracy", "perplexity") if shared[key] is not None), None)
    unusual = any(not one["runtime"].startswith(USUAL[one["format"]]) for one in entries)
    table = Table("", "format", title=title, title_justify="left")
    columns = [*(f"ms, batch {batch}" for batch in batches), "weights", "peak memory", "parameters"]
    for name in (*columns, "as the first", *([measure] if measure else [])):
        table.add_column(name, justify="right")
    if unusual:
        table.add_column("run by")
    for column in table.columns:
        column.overflow = "fold"  # no part of a name is lost
    names = _short([entry["folder"] for entry in entries])
    for name, entry in zip(names, entries, strict=True):
        same = entry["same_rows"]
        cells = [name, _numbers(entry)]
        cells += [f"{1e3 * entry['latency_seconds'][batch]:.1f}" for batch in batches]
        cells += [bytes_text(entry["file_bytes"]), bytes_text(entry["peak_memory_bytes"])]
        cells += [f"{entry['parameters'] / 1e6:.2f} M", percent(same["equal_predictions"])]
        if measure:
            value = same[measure]
            cells.append(percent(value) if measure == "accuracy" else decimal(value))
        table.add_row(*map(Text, [*cells, *([entry["runtime"]] if unusual else [])]))
    return table


def _short(places: Sequence[str]) -> list[str]:
    """The last parts of the paths, if they differ.

    >>> _short(["models/a", "models/b"]), _short(["x/a", "y/a"])
    (['a', 'b'], ['x/a', 'y/a'])
    """
    last = [Path(place).name for place in places]
    return last if len(set(last)) == len(set(places)) else list(places)


def _numbers(entry: Mapping[str, Any]) -> str:
    """The format, with the stored number type if it is not fp32."""
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
