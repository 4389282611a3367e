"""The table of `fedspine plan`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedspine.report.tables import MISSING, bytes_text, counted, percent, seconds_text


def kind_table(plan: Mapping[str, Any]) -> Table:
    """A column for each kind of device of a plan."""
    kinds = plan["kinds"]
    title = (
        f"{plan['method']} on {plan['model']}: {plan['architecture']}, {plan['layers']} "
        f"blocks, {plan['parameters']:,} parameters; {plan['steps']} steps of {plan['batch']} "
        f"rows of {plan['tokens']} tokens"
    )
    heads = [f"{kind['kind']}, {counted(kind['devices'], 'device')}" for kind in kinds]
    table = Table("", title=Text(title), title_justify="left")
    for head in heads:
        table.add_column(Text(head))
    for label, cells in _rows(plan, kinds):
        table.add_row(Text(label), *map(Text, cells))
    return table


def summary_lines(plan: Mapping[str, Any]) -> list[str]:
    """The lines below the table: the first round, the run, and the assumptions."""
    first, run = plan["round"], plan["run"]
    lines = [
        f"first round, {counted(first['devices'], 'device')}: {seconds_text(first['seconds'])}, "
        f"{bytes_text(first['bytes_down'])} down, {bytes_text(first['bytes_up'])} up"
    ]
    if run["seconds"] is not None:
        lines.append(
            f"run of {counted(run['rounds'], 'round')}: {seconds_text(run['seconds'])}, "
            f"{bytes_text(run['bytes_down'])} down, {bytes_text(run['bytes_up'])} up"
        )
    if not first["devices"]:
        lines = ["nothing would be trained: no device of the first round has enough memory"]
    return [*lines, *(f"note: {remark}" for remark in plan["remarks"])]


def _rows(
    plan: Mapping[str, Any], kinds: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    rows = [
        (
            "total, usable memory",
            [_sizes(kind["memory_bytes"], kind["usable_bytes"]) for kind in kinds],
        ),
        (
            f"unpruned, rank {plan['rank']}",
            [_fitting(kind["dense_memory_bytes"], kind["dense_fits"]) for kind in kinds],
        ),
        ("  largest depth", [str(kind["largest"]["depth"]) for kind in kinds]),
        ("  largest rank", [str(kind["largest"]["rank"]) for kind in kinds]),
        ("  largest batch", [str(kind["largest"]["batch"]) for kind in kinds]),
    ]
    for part, title in (("training", "first training"), ("pruned", "training when pruned")):
        present = any(kind[part] for kind in kinds)
        if present or part == "training":
            rows.append((title, [kind["left_out"] or "" for kind in kinds]))
            rows += [
                (f"  {label}", [cell(kind[part]) if kind[part] else MISSING for kind in kinds])
                for label, cell in (_CELLS if present else ())
            ]
    return rows


def _sizes(memory: int, usable: int) -> str:
    return f"{bytes_text(memory)}, {bytes_text(usable)}"


def _fitting(size: int, fits: bool) -> str:
    return f"{bytes_text(size)}, {'fits' if fits else 'does not fit'}"


def _whole(span: Sequence[float]) -> str:
    low, high = span
    return f"{low}" if low == high else f"{low} to {high}"


def _bytes(span: Sequence[float]) -> str:
    low, high = map(bytes_text, span)
    return low if low == high else f"{low} to {high}"


def _seconds(span: Sequence[float]) -> str:
    low, high = map(seconds_text, span)
    return low if low == high else f"{low} to {high}"


_CELLS = (
    ("rank", lambda part: _whole(part["rank"])),
    ("blocks trained", lambda part: _whole(part["blocks"])),
    ("depth", lambda part: _whole(part["depth"])),
    ("sparsity", lambda part: percent(part["sparsity"])),
    ("peak memory", lambda part: _fitting(part["peak_memory_bytes"], part["fits"])),
    ("bytes down", lambda part: _bytes(part["bytes_down"])),
    ("bytes up", lambda part: _bytes(part["bytes_up"])),
    ("compute", lambda part: _seconds(part["seconds"]["computing"])),
    ("down", lambda part: _seconds(part["seconds"]["down"])),
    ("up", lambda part: _seconds(part["seconds"]["up"])),
    ("total", lambda part: _seconds(part["seconds"]["total"])),
)
