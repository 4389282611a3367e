"""A run's report page: one HTML file that contains its style and figures and fetches nothing."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.strict import parsed
from fedspine.report import figures
from fedspine.report.html import Figure, rendered
from fedspine.report.rows import AnswerRow, RunRows, read_rows
from fedspine.report.series import DeviceClass, Trouble, device_classes, summary_so_far, troubles
from fedspine.report.tables import (
    MISSING,
    UnprunedRun,
    answer_rows,
    bytes_text,
    counted,
    decimal,
    headlines,
    percent,
    seconds_text,
    summary_line,
)
from fedspine.report.trust import RECIPE, RECORDS, promised_in, trust, trust_lines

REPORT, SUMMARY = "report.html", "summary.json"


def write_page(folder: Path, unpruned: Sequence[UnprunedRun] = ()) -> Path:
    """Write `folder`/report.html from what is in the folder so far, atomically; returns its path.

    `unpruned` are runs of the same budget that a pruned one is read against. Raises BadInput where
    the folder has neither records nor a summary, or where one of them cannot be read.
    """
    records, summary_file, recipe = folder / RECORDS, folder / SUMMARY, folder / RECIPE
    if not records.exists() and not summary_file.exists():
        raise BadInput(
            f"a run's folder with {RECORDS} was expected, "
            f"{folder} has none; name the folder of a run"
        )
    rows = read_rows(records) if records.exists() else RunRows()
    summary = _read_summary(summary_file) if summary_file.exists() else None
    recipe_text = recipe.read_text("utf-8") if recipe.exists() else ""
    text = page(folder.resolve().name, rows, summary, recipe_text, unpruned)
    part = folder / f".{REPORT}.part"
    part.write_text(text, "utf-8")
    os.replace(part, folder / REPORT)
    return folder / REPORT


def page(
    title: str,
    rows: RunRows,
    summary: Mapping[str, Any] | None,
    recipe: str,
    unpruned: Sequence[UnprunedRun] = (),
) -> str:
    """The page as text; a run without a `summary` is shown as unfinished, from its rows alone."""
    numbers = summary_so_far(rows) | {
        name: value for name, value in (summary or {}).items() if value is not None
    }
    classes = device_classes(rows)
    colours = figures.class_colours([line.kind for line in classes])
    return rendered(
        "report.html",
        title=title,
        what=summary_line(numbers),
        unfinished=not summary,
        # the warnings of a run that does not learn
        warnings=numbers.get("warnings") or [warned.line for warned in rows.warnings],
        headlines=headlines(numbers, unpruned),
        figures=[Figure.of(panel) for panel in figures.panels(rows, numbers, unpruned)],
        classes=[_class_row(line, colours[line.kind]) for line in classes],
        trust=trust_lines(trust(rows, promised_in(recipe))),
        troubles=[_trouble_row(line) for line in troubles(rows)],
        answer_scores=answer_rows(numbers),
        answers=[_answers(row) for row in _last_answers(rows, numbers)],
        recipe=_without_folders(recipe),
        footer=_footer(numbers),
    )


def _without_folders(recipe: str) -> str:
    """A recipe with the last part of every absolute path, which is all that another machine knows.

    >>> _without_folders('model = "/home/ann/bert"'), _without_folders('data = "ann/rows"')
    ('model = "bert"', 'data = "ann/rows"')
    """
    return re.sub(r'"/[^"\n]*/([^"/\n]+)/?"', r'"\1"', recipe)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return dict(parsed(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"expected a JSON object in {path.name}; remove the file to see the records alone"
        ) from error


def _class_row(line: DeviceClass, colour: str) -> dict[str, Any]:
    cells = (
        f"{line.devices:,}",
        percent(line.sparsity),
        decimal(line.rank, 1),
        seconds_text(line.seconds),
        bytes_text(line.bytes_down),
        bytes_text(line.bytes_up),
    )
    return {"kind": line.kind, "colour": colour, "cells": cells}


def _trouble_row(line: Trouble) -> dict[str, str]:
    return {
        "device": line.device,
        "kind": line.kind,
        "lost": f"{line.lost} of {counted(line.exchanges, 'exchange')}",
        "left_out": counted(line.left_out, "time") if line.left_out else MISSING,
        "reason": line.reason or MISSING,
    }


def _last_answers(rows: RunRows, summary: Mapping[str, Any]) -> Sequence[AnswerRow]:
    """The answers of the last attempt to end the run."""
    return rows.answers[-int(summary.get("answers") or len(rows.answers)) :]


def _answers(row: AnswerRow) -> dict[str, Any]:
    said = [("asked", row.prompt), ("in the data", row.reference), *row.answers.items()]
    return {"said": said}


def _footer(summary: Mapping[str, Any]) -> str:
    state = summary.get("state_sha256")
    clock = "Simulated numbers come from a model of the devices, not from measuring them."
    return f"{clock} State sha256 {state}." if state else clock
