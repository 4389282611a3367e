"""Loads the runs of a comparison: recipe, summary, and quality over rounds, simulated seconds and
bytes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.report.rows import RunRows, read_rows
from fedspine.report.series import Floats, checks
from fedspine.runs.run_dir import RECIPE, RECORDS, SUMMARY, recipe_of, summary_of

if TYPE_CHECKING:
    from fedspine.runs.config import Recipe

CELLS, CELL, FAILED = "cells", "cell.json", "failed"  # of a sweep's folder
NEEDED = (  # of a summary
    *("test_rows", "simulated_seconds", "waiting_seconds", "bytes_up", "bytes_down"),
    *("peak_memory_bytes_simulated", "state_sha256"),
)


@dataclass(frozen=True)
class Curve:
    """The checks during the run, one entry each: rounds done, simulated seconds, bytes both ways,
    and the quality.
    """

    rounds: Floats
    seconds: Floats
    bytes: Floats
    quality: Floats


@dataclass(frozen=True)
class Run:
    """A finished run. `label` and `settings` are those of a sweep's cell; a run given by hand has
    None.
    """

    folder: Path
    label: str | None
    settings: Mapping[str, Any] | None
    recipe: "Recipe"
    summary: Mapping[str, Any]
    curve: Curve

    @property
    def seed(self) -> int:
        return self.recipe.run.seed


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    folder: str
    why: str


@dataclass(frozen=True)
class SelectedRuns:
    """The selected runs. Those of a `sweep` are sorted into comparisons; others form one."""

    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    sweep: bool


def select(paths: Iterable[Path]) -> SelectedRuns:
    """The runs in these folders, each a run's or a sweep's; those that are not finished are left
    out.

    Raises BadInput where a folder is neither, and where no finished run is left.
    """
    named = list(paths)
    if not named:
        raise BadInput("no run was named; name the folders of runs, or the folder of a sweep")
    sweep = any((path / CELLS).is_dir() for path in named)
    folders = {folder.resolve(): folder for path in named for folder in _folders(path)}
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for folder in folders.values():
        found = _run(folder)
        (runs if isinstance(found, Run) else left_out).append(found)
    if not runs:
        first = left_out[0]
        raise BadInput(
            f"none of {len(left_out)} named runs is finished "
            f"({first.folder}: {first.why}); finish one first"
        )
    return SelectedRuns(tuple(runs), tuple(left_out), sweep)


def _folders(path: Path) -> list[Path]:
    """The folder itself, or every cell of a sweep."""
    if not (path / CELLS).is_dir():
        return [path]
    cells = sorted(found.parent for found in (path / CELLS).glob(f"[!.]*/{CELL}"))
    if not cells:
        raise BadInput(f"the sweep in {path} has no cell yet; start it with: fedspine sweep")
    return cells


def _run(folder: Path) -> Run | LeftOut:
    cell = cell_of(folder)
    if cell and not (folder / RECIPE).is_file():
        return LeftOut(str(folder), "not begun")
    recipe, summary = recipe_of(folder), summary_of(folder)
    if summary is None:
        return LeftOut(str(folder), _failure(folder) or "not finished")
    if "fleet_seconds" in summary:
        raise BadInput(
            f"{folder} ran at the sites of a real fleet, whose wall-clock seconds cannot be "
            f"compared with simulated ones; leave it out, and see it with: fedspine show {folder}"
        )
    if lacking := [key for key in NEEDED if key not in summary]:
        raise BadInput(
            f"{folder / SUMMARY} lacks {lacking[0]!r}; remove it and resume the run, which writes "
            "it again"
        )
    label, settings = cell.get("label"), cell.get("settings")
    rows = read_rows(folder / RECORDS)
    return Run(
        folder,
        label,
        settings,
        recipe,
        summary,
        curve_of(rows, language=recipe.task.kind == "causal-lm"),
    )


def cell_of(folder: Path) -> dict[str, Any]:
    """A sweep's entry of its cell; empty for a run outside of a sweep."""
    try:
        cell = json.loads((folder / CELL).read_bytes())
        return {"label": str(cell["label"]), "settings": dict(cell["settings"])}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder / CELL} is damaged ({error}); restore it, or leave this run out"
        ) from None


def _failure(folder: Path) -> str | None:
    """Why a sweep's cell failed, in one line."""
    file = (
        folder.parents[1] / FAILED / f"{folder.name}.txt" if folder.parent.name == CELLS else None
    )
    return (
        f"failed: {file.read_text('utf-8').partition(chr(10))[0]}"
        if file is not None and file.is_file()
        else None
    )


def curve_of(rows: RunRows, *, language: bool) -> Curve:
    """The checks during the run: a fixed part of the test rows and a few device models, the mean
    over these models.

    The final score is none of them, because it is measured on all test rows. A check that is not
    finite is left out.
    """
    found = checks(rows)
    quality = found.loss if language else found.accuracy
    known = ~np.isnan(quality)
    return Curve(
        rounds=found.rounds[known],
        seconds=found.seconds[known],
        bytes=found.bytes[known],
        quality=quality[known],
    )
