"""A sweep's folder: `cells/` with one run directory per cell, and the reasons of failed cells.

A cell's status is read from its run directory only, so there is nothing to keep in sync and a kill
loses nothing.
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
from fedspine.runs.run_dir import RECORDS, STATE, make, recipe_of, summary_of
from fedspine.storage.records import clock_of
from fedspine.storage.store import LOCK, Store, lock, write_atomically
from fedspine.ui.sweep.plan import Cell

CELLS, CELL, FAILED, FILE, RUNNING = "cells", "cell.json", "failed", "sweep.toml", "running.json"
# a process that checks whether a sweep is running holds its lock for a moment
TIMEOUT_SECONDS = 1.0

Status = Literal["done", "failed", "running", "half-done", "open"]


@dataclass(frozen=True)
class CellStatus:
    """The status of a cell; `reason` says why it failed, `summary` is that of a finished run."""

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
    """The status of a sweep; `unlisted` are runs in its folder that its file does not describe."""

    folder: Path
    cell_statuses: tuple[CellStatus, ...]
    unlisted: tuple[str, ...]

    @property
    def counts(self) -> dict[Status, int]:
        """How many cells have each status."""
        return {
            status: sum(each.status == status for each in self.cell_statuses)
            for status in get_args(Status)
        }

    def table(self) -> dict[str, Any]:
        """As JSON can hold it."""
        cells = [cell_status.table() for cell_status in self.cell_statuses]
        return {
            "folder": str(self.folder),
            **self.counts,
            "cells": cells,
            "unlisted": list(self.unlisted),
        }


class SweepFolder:
    """The folder of one sweep; only the process that holds its lock writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def run_of(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.path / CELLS / cell.name

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise BadInput if the folder is no sweep's, or holds runs of other recipes under the
        cells' names.
        """
        if self.path.is_file() or (self.path.is_dir() and not self._is_ours()):
            raise BadInput(
                f"{self.path} exists but is not the folder of a sweep "
                f"(it has no {FILE}); choose another with --out"
            )
        for cell in cells:
            run = self.run_of(cell)
            if run.exists() and (difference := _differs(recipe_of(run), cell.recipe)):
                raise BadInput(
                    f"{run} was made from another version of the sweep's file: {difference}; undo "
                    "the change, choose a new folder with --out, or remove that run"
                )

    def overview(self, cells: Sequence[Cell]) -> Overview:
        """The status of the sweep, and the runs left over from an earlier version of its file."""
        known = {cell.name for cell in cells}
        found = (self.path / CELLS).glob("[!.]*")
        unlisted = sorted(path.name for path in found if path.is_dir() and path.name not in known)
        return Overview(self.path, tuple(self.cell_statuses(cells)), tuple(unlisted))

    def open(self, file: Path) -> None:
        """Lock the folder, copy the sweep's file into it, and remove what a kill left half made.

        Raises BadInput if another process is running the sweep.
        """
        text = file.read_bytes()
        for name in (CELLS, FAILED):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock = _patiently(self.path / LOCK, f"the sweep in {self.path}")
        write_atomically(self.path / FILE, text)
        for leftover in (self.path / CELLS).glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def cell_statuses(self, cells: Iterable[Cell]) -> list[CellStatus]:
        """The status of each cell, from its run directory and the recorded failures."""
        running = self._running()
        return [self._cell_status(cell, running) for cell in cells]

    def cell_status(self, cell: Cell) -> CellStatus:
        """The status of one cell."""
        return self.cell_statuses([cell])[0]

    def rounds_done(self, cell: Cell) -> int:
        """The rounds of the cell's run that are saved."""
        return Store(self.run_of(cell) / STATE).rounds()

    def rounds_expected(self, cell: Cell, done: int) -> int:
        """The rounds that the run of a cell will have; if it ends by time, judged by the `done`
        ones.
        """
        run = cell.recipe.run
        now = clock_of(self.run_of(cell) / RECORDS) if run.seconds else 0.0
        return run.expected_rounds(done, now)

    def prepare(self, cell: Cell) -> Path:
        """The cell's run directory, ready for a resume; an old failure is removed."""
        run = self.run_of(cell)
        if not run.exists():
            make(run, cell.recipe)
        about_cell = {"label": cell.label, "settings": cell.settings, "seed": cell.seed}
        write_atomically(run / CELL, json.dumps(about_cell, default=str).encode())
        self._failure(cell).unlink(missing_ok=True)
        return run

    def fail(self, cell: Cell, reason: str, output: str) -> None:
        """Record why a cell failed: one line, and below it the output of its process."""
        write_atomically(self._failure(cell), f"{reason}\n\n{output}".encode())

    def write_running(self, cells: Iterable[Cell]) -> None:
        """Publish which cells are running."""
        write_atomically(self.path / RUNNING, json.dumps([cell.name for cell in cells]).encode())

    def _cell_status(self, cell: Cell, running: Sequence[str]) -> CellStatus:
        run, reason = self.run_of(cell), self._reason(cell)
        summary = summary_of(run)
        if (
            summary is not None and (run / REPORT).exists()
        ):  # a run without it was killed between the two
            return CellStatus(cell, "done", summary["rounds"], summary=summary)
        rounds = self.rounds_done(cell)
        if cell.name in running:
            return CellStatus(cell, "running", rounds)
        if reason is not None:
            return CellStatus(cell, "failed", rounds, reason)
        return CellStatus(cell, "half-done" if rounds else "open", rounds)

    def _running(self) -> list[str]:
        """The cells that another process is running; its list is valid only while it holds the
        lock.
        """
        # the holder must not try its own lock: POSIX releases a lock with the first close of the
        # file
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
    """Whether another process holds this lock; creates no lock file."""
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
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            return lock(path, what)
        except BadInput:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
