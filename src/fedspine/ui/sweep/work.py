"""Runs the cells of a sweep, several at once, each in its own process, until all are done or have
failed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fedspine.core.errors import BadInput, Stopped
from fedspine.core.process import cores, farewell
from fedspine.report.tables import counted, decimal, percent, seconds_text
from fedspine.runs.run_dir import STATE
from fedspine.storage.store import LOCK
from fedspine.ui.compare.unpruned import rewrite_pages
from fedspine.ui.sweep.display import Listed, RunningCell, SweepProgress, SweepStatus
from fedspine.ui.sweep.eta import Ahead, seconds_left
from fedspine.ui.sweep.plan import Cell, plan
from fedspine.ui.sweep.sweep_dir import CellStatus, Overview, SweepFolder, held

POLL_SECONDS = 0.2
GOODBYE_SECONDS = 20.0  # for an interrupted run to end by itself


@dataclass
class CellProcess:
    """A cell's process; `began` rounds were saved before it started."""

    cell: Cell
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: int
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class SweepRunner:
    """Runs the open cells of a sweep, `jobs` at once."""

    def __init__(
        self,
        folder: SweepFolder,
        cell_statuses: Sequence[CellStatus],
        jobs: int,
        retry: bool,
        progress: SweepProgress,
    ) -> None:
        self._folder, self._slots, self._progress = folder, jobs, progress
        self._cells = len(cell_statuses)
        again = ("open", "half-done", "failed") if retry else ("open", "half-done")
        self._todo = [
            cell_status.cell for cell_status in cell_statuses if cell_status.status in again
        ]
        self._rounds = {
            cell_status.cell.name: cell_status.rounds_done for cell_status in cell_statuses
        }  # before anything is run
        self._jobs: list[CellProcess] = []
        self._seconds: dict[str, list[float]] = defaultdict(list)  # of finished cells, by label
        for cell_status in cell_statuses:
            if cell_status.summary is not None:
                self._seconds[cell_status.cell.label].append(cell_status.summary["wall_seconds"])
        self._done = sum(cell_status.status == "done" for cell_status in cell_statuses)
        self._failed = self._cells - self._done - len(self._todo)

    def run(self) -> None:
        """Run all open cells. Any early end also ends the cells' processes, which keep their saved
        rounds.
        """
        try:
            while self._todo or self._jobs:
                self._start_some()
                for job in [job for job in self._jobs if job.process.poll() is not None]:
                    self._judge(job)
                self._progress.update(self._status())
                if self._jobs or self._todo:
                    time.sleep(POLL_SECONDS)
        finally:
            self._progress.close()
            self._end_all()

    def _start_some(self) -> None:
        while len(self._jobs) < self._slots and (cell := self._next()) is not None:
            self._todo.remove(cell)
            self._jobs.append(self._start(cell))
            self._folder.write_running(job.cell for job in self._jobs)

    def _next(self) -> Cell | None:
        """The next cell whose run is not locked, for example by a process that a killed sweep left
        behind.
        """
        return next(
            (cell for cell in self._todo if not held(self._folder.run_of(cell) / STATE / LOCK)),
            None,
        )

    def _start(self, cell: Cell) -> CellProcess:
        run = self._folder.prepare(cell)
        command = [sys.executable, "-m", "fedspine.ui.sweep.cell", str(os.getpid())]
        command += ["fedspine", "run", "--resume", str(run), "--json"]
        if self._slots > 1:  # alone, a cell has all cores, as its recipe says
            command += ["--set", f"run.workers={max(1, cores() // self._slots)}"]
        output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the sweep, which ends its cells
        )
        return CellProcess(cell, process, output, self._rounds[cell.name])

    def _judge(self, job: CellProcess) -> None:
        """Record the result of a process that has ended."""
        self._jobs.remove(job)
        self._folder.write_running(other.cell for other in self._jobs)
        with job.output:
            job.output.seek(0)
            output = job.output.read().decode(errors="replace")
        cell_status = self._folder.cell_status(job.cell)
        if cell_status.summary is not None and cell_status.status == "done":
            self._done += 1
            # loading included, where the whole cell was run here
            whole = cell_status.summary["wall_seconds"] if job.began else job.seconds
            self._seconds[job.cell.label].append(whole)
            words = f"{result_text(cell_status.summary)}, {seconds_text(job.seconds)}"
            with suppress(BadInput):  # of another cell; a page can be written again
                rewrite_pages(self._folder.run_of(job.cell))
        else:
            self._failed += 1
            reason = reason_of(job.process.returncode, output)
            self._folder.fail(job.cell, reason, output)
            words = f"failed: {reason}"
        self._progress.ended(job.cell.name, words, self._status())

    def _status(self) -> SweepStatus:
        rounds = {job.cell.name: self._folder.rounds_done(job.cell) for job in self._jobs}
        expected = {
            job.cell.name: self._folder.rounds_expected(job.cell, rounds[job.cell.name])
            for job in self._jobs
        }
        ahead = [
            Ahead(
                job.cell.label,
                rounds[job.cell.name],
                expected[job.cell.name],
                job.began,
                job.seconds,
            )
            for job in self._jobs
        ]
        ahead += [
            Ahead(cell.label, self._rounds[cell.name], cell.recipe.run.rounds)
            for cell in self._todo
        ]
        return SweepStatus(
            cells=self._cells,
            done=self._done,
            failed=self._failed,
            seconds_left=seconds_left(ahead, self._seconds, self._slots),
            running=tuple(
                RunningCell(job.cell.name, rounds[job.cell.name], expected[job.cell.name])
                for job in self._jobs
            ),
        )

    def _end_all(self) -> None:
        """End the running processes: first by SIGTERM, then by SIGKILL.

        Not by SIGINT, which a cell ignores where its sweep does.
        """
        try:
            for job in self._jobs:
                job.process.terminate()
            deadline = time.monotonic() + GOODBYE_SECONDS
            for job in self._jobs:
                with suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # a second Ctrl-C does not wait
            for job in self._jobs:
                job.process.kill()
                job.process.wait()
                job.output.close()


def default_folder(file: Path) -> Path:
    """The default folder of a sweep."""
    return Path("sweeps") / file.stem


def overview_of(file: Path, path: Path | None) -> Overview:
    """The status of the sweep in `file`; runs and changes nothing."""
    cells, folder = plan(file), SweepFolder(path or default_folder(file))
    folder.check(cells)
    return folder.overview(cells)


def listed(overview: Overview) -> list[Listed]:
    """The overview as lines to show."""
    return [
        Listed(
            name=cell_status.cell.name,
            status=cell_status.status,
            round=cell_status.rounds_done,
            rounds=cell_status.cell.recipe.run.rounds,
            remark=result_text(cell_status.summary)
            if cell_status.summary
            else cell_status.reason or "",
        )
        for cell_status in overview.cell_statuses
    ]


def carry_out(
    file: Path, path: Path | None, *, jobs: int, retry: bool, progress: Callable[[], SweepProgress]
) -> Overview:
    """Run the unfinished cells of the sweep in `file` in the folder `path`; failed ones only with
    `retry`.

    Raises BadInput before anything is run, Stopped after Ctrl-C or SIGTERM. `progress` is called
    when the first cell may start.
    """
    cells, folder = plan(file), SweepFolder(path or default_folder(file))
    folder.check(cells)
    folder.open(file)
    try:
        SweepRunner(folder, folder.cell_statuses(cells), jobs, retry, progress()).run()
        return folder.overview(cells)
    except KeyboardInterrupt as interrupt:
        word, exit_code = farewell(interrupt)
        done = sum(cell_status.status == "done" for cell_status in folder.cell_statuses(cells))
        again = (
            f"fedspine sweep {file}"
            + (f" --jobs {jobs}" if jobs > 1 else "")
            + (f" --out {path}" if path else "")
        )
        raise Stopped(
            f"{word}; {done} of {counted(len(cells), 'cell')} done; resume with: {again}",
            exit_code,
        ) from None
    finally:
        folder.close()


def result_text(summary: dict[str, Any]) -> str:
    if summary.get("accuracy") is not None:
        return f"accuracy {percent(summary['accuracy'])}"
    return f"loss {decimal(summary.get('loss'))}"


def reason_of(code: int, output: str) -> str:
    """Why a process failed, in one line: what the command line said, or how it ended."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (
            ", perhaps for its memory" if name == "SIGKILL" else ""
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    messages = [line.removeprefix("fedspine: ") for line in lines if line.startswith("fedspine: ")]
    return (messages or lines or [f"its process ended with exit code {code}"])[-1]
