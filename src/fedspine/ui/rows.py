"""`fedspine predict` of a net on arrays: rows of a file or of a run's test rows, by number."""

import dataclasses
import json as jsonlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedspine.core.errors import BadInput
from fedspine.exports.given_rows import array_rows
from fedspine.exports.loaded import LoadedNet
from fedspine.exports.predict import predict
from fedspine.report.tables import counted, percent

SHOWN = 20  # lines of the table; --json has all rows


def print_labels(net: LoadedNet, data: str, numbers: Sequence[int], *, json: bool) -> None:
    """Print the label of each row of `data`, or of those with these numbers, from 0."""
    rows, rows_from = array_rows(data, net.reads)
    if wrong := [number for number in numbers if number >= len(rows)]:
        raise BadInput(
            f"--row {wrong[0]} was given, but {data} has {counted(len(rows), 'row')}, numbered "
            f"from 0 to {len(rows) - 1}"
        )
    chosen = np.array(numbers, np.int64) if numbers else np.arange(len(rows))
    rows = rows.take(chosen)
    found: list[dict[str, Any]] = []
    for number, code, one in zip(chosen, rows.labels, predict(net, rows.x), strict=True):
        true = net.labels[code] if code >= 0 else None
        found.append({"row": int(number), **dataclasses.asdict(one), "true_label": true})
    accuracy = rows.accuracy(np.array([net.labels.index(one["label"]) for one in found]))
    if json:
        print(jsonlib.dumps({"predictions": found, "rows_from": rows_from, "accuracy": accuracy}))
        return
    Console().print(_table(found, rows_from))
    if len(found) > SHOWN:
        print(f"and {counted(len(found) - SHOWN, 'more row')}; --json has all of them")
    if accuracy is not None:
        known = counted(int((rows.labels >= 0).sum()), "row")
        print(f"accuracy {percent(accuracy)} on {known} with labels")


def _table(found: Sequence[dict[str, Any]], rows_from: str) -> Table:
    labelled = any(one["true_label"] is not None for one in found)
    columns = ("row", "label", "probability", *(["true label"] if labelled else []))
    table = Table(*columns, title=rows_from, title_justify="left")
    for one in found[:SHOWN]:
        cells = [str(one["row"]), one["label"], f"{one['probability']:.3f}"]
        table.add_row(*map(Text, [*cells, *([one["true_label"] or ""] if labelled else [])]))
    return table
