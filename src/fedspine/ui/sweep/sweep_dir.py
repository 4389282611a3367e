"""A sweep's folder: `cells/`, one run's folder for each, and what became of those that failed.

What a cell has done is read from its run alone, so that nothing has to be kept in step with it and a kill loses nothing.
"""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from fedspine.core.errors import BadInput
from fedspine.report.page import REPORT
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import STATE, make, recipe_of, summary_of
from fedspine.storage.store import LOCK, Store, lock, write_atomically
from fedspine.ui.sweep.plan import Cell

CELLS, CELL, FAILED, FILE, RUNNING = "cells", "cell.json", "failed", "sweep.toml", "running.json"
PATIENCE_SECONDS = 1.0  # somebody who looks whether a sweep is at work holds its lock for a moment

Status = Literal["done", "failed", "running", "half-done", "open"]


@dataclass(frozen=True)
class Standing:
    """How far a cell is; `reason` says why it failed, `summary` is that of a finished run."""

    cell: Cell
    status: Status
    rounds_done: int = 0
    reason: str | None = None
    summary: dict[str, Any] | None = None

    def table(self) -> dict[str, Any]:
        """As JSON can hold it."""
        cell = self.cell
        known = {
            "name": cell.name,
            "label": cell.label,
            "settings": cell.settings,
            "seed": cell.seed,
            "status": self.status,
            "rounds_done": self.rounds_done,
            "rounds": cell.recipe.run.rounds,
        }
        return known | ({} if self.reason is None else {"reason": self.reason})


@dataclass(frozen=True)
class Overview:
    """How far a sweep is; `strangers` are runs in its folder that its file does not describe."""

    folder: Path
    standings: tuple[Standing, ...]
    strangers: tuple[str, ...]

    @property
    def counts(self) -> dict[Status, int]:
        """How many cells have each status."""
        return {
            status: sum(each.status == status for each in self.standings)
            for status in get_args(Status)
        }

    def table(self) -> dict[str, Any]:
        """As JSON can hold it."""
        cells = [standing.table() for standing in self.standings]
        return {
            "folder": str(self.folder),
            **self.counts,
            "cells": cells,
            "strangers": list(self.strangers),
        }


class SweepFolder:
    """The folder of one sweep, read by anyone and written by the process that holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def run_of(self, cell: Cell) -> Path:
        """Where the cell's run is, a run's folder like any other."""
        return self.path / CELLS / cell.name

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise BadInput where the folder is something else, or holds runs of another recipe under the cells' names."""
        if self.path.is_file() or (self.path.is_dir() and not self._is_ours()):
            raise BadInput(
                f"{self.path} exists and is no sweep's folder (it has no {FILE}); choose another with --out"
            )
        for cell in cells:
            run = self.run_of(cell)
            if run.exists() and (difference := _differs(recipe_of(run), cell.recipe)):
                raise BadInput(
                    f"{run} was made from another version of the sweep's file: {difference}; undo the change, choose "
                    "a new folder with --out, or remove that run"
                )

    def overview(self, cells: Sequence[Cell]) -> Overview:
        """How far the sweep is, and what else lies in its folder, left over from an earlier version of the file."""
        known = {cell.name for cell in cells}
        found = (self.path / CELLS).glob("[!.]*")
        strangers = sorted(path.name for path in found if path.is_dir() and path.name not in known)
        return Overview(self.path, tuple(self.standings(cells)), tuple(strangers))

    def open(self, file: Path) -> None:
        """Take the folder for writing, keep the sweep's file in it, and clear away what a kill left half-made.

        Raises BadInput where another sweep is working on it.
        """
        text = file.read_bytes()
        for name in (CELLS, FAILED):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock = _patiently(self.path / LOCK, f"the sweep in {self.path}")
        write_atomically(self.path / FILE, text)
        for leftover in (self.path / CELLS).glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            self._lock.close()

    def standings(self, cells: Iterable[Cell]) -> list[Standing]:
        """How far each cell is, as its run and the failures tell."""
        running = self._running()
        return [self._standing(cell, running) for cell in cells]

    def standing(self, cell: Cell) -> Standing:
        """How far one cell is."""
        return self.standings([cell])[0]

    def rounds_done(self, cell: Cell) -> int:
        """The rounds of the cell's run that are saved."""
        return Store(self.run_of(cell) / STATE).rounds()

    def prepare(self, cell: Cell) -> Path:
        """The cell's run, ready to be resumed from wherever it is, if only from its start; an old failure is forgotten."""
        run = self.run_of(cell)
        if not run.exists():
            make(run, cell.recipe)
        told = {"label": cell.label, "settings": cell.settings, "seed": cell.seed}
        write_atomically(run / CELL, json.dumps(told, default=str).encode())
        self._failure(cell).unlink(missing_ok=True)
        return run

    def fail(self, cell: Cell, reason: str, said: str) -> None:
        """Keep why a cell failed, in one line, and below it all that its process said."""
        write_atomically(self._failure(cell), f"{reason}\n\n{said}".encode())

    def tell_running(self, cells: Iterable[Cell]) -> None:
        """Let others see which cells are being run."""
        write_atomically(self.path / RUNNING, json.dumps([cell.name for cell in cells]).encode())

    def _standing(self, cell: Cell, running: Sequence[str]) -> Standing:
        run, reason = self.run_of(cell), self._reason(cell)
        summary = summary_of(run)
        if (
            summary is not None and (run / REPORT).exists()
        ):  # without it, the run was killed between the two
            return Standing(cell, "done", summary["rounds"], summary=summary)
        rounds = self.rounds_done(cell)
        if cell.name in running:
            return Standing(cell, "running", rounds)
        if reason is not None:
            return Standing(cell, "failed", rounds, reason)
        return Standing(cell, "half-done" if rounds else "open", rounds)

    def _running(self) -> list[str]:
        """What another process is running; what it wrote holds only while it is at work."""
        # who holds the lock must not try it: POSIX lets go of a lock with the first file that is closed
        if self._lock is not None or not held(self.path / LOCK):
            return []
        try:
            return json.loads((self.path / RUNNING).read_bytes())
        except (FileNotFoundError, ValueError):
            return []

    def _failure(self, cell: Cell) -> Path:
        return self.path / FAILED / f"{cell.name}.txt"

    def _reason(self, cell: Cell) -> str | None:
        try:
            return self._failure(cell).read_text(encoding="utf-8").partition("\n")[0]
        except FileNotFoundError:
            return None

    def _is_ours(self) -> bool:
        """Whether a sweep has begun here, or nothing has."""
        names = {path.name for path in self.path.iterdir()}
        return FILE in names or names <= {CELLS, FAILED, LOCK, f"{FILE}.part"}


def _differs(begun: Recipe, wanted: Recipe) -> str | None:
    return begun.difference(wanted.settled_as(begun))


def held(path: Path) -> bool:
    """Whether another process holds this lock; nothing is made where there is none."""
    if not path.exists():
        return False
    try:
        lock(path, "").close()
    except BadInput:
        return True
    except OSError:  # a folder of somebody else's, in which only they can be at work
        return False
    return False


def _patiently(path: Path, what: str) -> BinaryIO:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return lock(path, what)
        except BadInput:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
