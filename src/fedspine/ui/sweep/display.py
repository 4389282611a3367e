"""The display of a running sweep, on stderr, and the table of `fedspine sweep --list`."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from fedspine.report.tables import counted, seconds_text

LINE_SECONDS = 60.0  # between two status lines
STYLES = {"done": "green", "failed": "red", "running": "cyan", "half-done": "yellow", "open": "dim"}


@dataclass(frozen=True)
class RunningCell:
    """A running cell: `round` of `rounds` are saved; before the first it is loading, after the last
    scoring.
    """

    name: str
    round: int
    rounds: int

    @property
    def stage(self) -> str:
        return (
            "loading" if self.round == 0 else "scoring" if self.round == self.rounds else "rounds"
        )


@dataclass(frozen=True)
class SweepStatus:
    """The status of a sweep; `seconds_left` is an estimate, None while nothing is known."""

    cells: int
    done: int
    failed: int
    seconds_left: float | None
    running: tuple[RunningCell, ...] = ()

    def text(self) -> str:
        failed = [f"{self.failed} failed"] if self.failed else []
        left = (
            "time left not known yet"
            if self.seconds_left is None
            else f"about {seconds_text(self.seconds_left)} left"
        )
        return ", ".join([f"{self.done} of {counted(self.cells, 'cell')} done", *failed, left])


@dataclass(frozen=True)
class Listed:
    """A line of the list: a cell's name, its status, its saved rounds, and a remark."""

    name: str
    status: str
    round: int
    rounds: int
    remark: str = ""


class SweepProgress(Protocol):
    """Receives the progress of a sweep; `close` may be called twice."""

    def update(self, status: SweepStatus) -> None:
        """Time has passed."""
        ...

    def ended(self, name: str, words: str, status: SweepStatus) -> None:
        """A cell is finished or has failed, as `words` say."""
        ...

    def close(self) -> None:
        """Restore the terminal."""
        ...


def sweep_progress_for(json: bool) -> SweepProgress:
    """Silence where the caller wants JSON, a live display on a terminal, otherwise lines."""
    if json:
        return SilentSweep()
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return SweepBars(console)
    return SweepLines(sys.stderr)


class SilentSweep:
    """Shows nothing."""

    def update(self, status: SweepStatus) -> None:
        pass

    def ended(self, name: str, words: str, status: SweepStatus) -> None:
        pass

    def close(self) -> None:
        pass


class SweepLines:
    """A flushed line for every cell that ends, and one a minute meanwhile, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = -LINE_SECONDS

    def update(self, status: SweepStatus) -> None:
        if monotonic() - self.last >= LINE_SECONDS:
            running = [f"{cell.name} {cell.round}/{cell.rounds}" for cell in status.running]
            self._say("; ".join([status.text(), *running]))

    def ended(self, name: str, words: str, status: SweepStatus) -> None:
        self._say(f"{name}: {words}; {status.text()}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        self.last = monotonic()


class SweepBars:
    """A bar for the sweep and one for each cell at work, redrawn in place below what has ended."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Bar(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)
            ),
            BarColumn(bar_width=18),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[words]}",
                markup=False,
                style="cyan",
                table_column=Column(no_wrap=True),
            ),
            console=console,
            transient=True,
        )
        self.total = self.bar.add_task("cells", total=None, words="")
        self.tasks: dict[str, int] = {}

    def update(self, status: SweepStatus) -> None:
        self.bar.start()
        failed = f"{status.failed} failed, " if status.failed else ""
        left = (
            "" if status.seconds_left is None else f"about {seconds_text(status.seconds_left)} left"
        )
        over = status.done + status.failed
        self.bar.update(self.total, total=status.cells, completed=over, words=failed + left)
        for name in self.tasks.keys() - {cell.name for cell in status.running}:
            self.bar.remove_task(self.tasks.pop(name))
        for cell in status.running:
            if cell.name not in self.tasks:
                self.tasks[cell.name] = self.bar.add_task(cell.name, total=cell.rounds, words="")
            self.bar.update(self.tasks[cell.name], completed=cell.round, words=cell.stage)

    def ended(self, name: str, words: str, status: SweepStatus) -> None:
        self.bar.console.print(f"{escape(name)}: {escape(words)}", highlight=False)
        self.update(status)

    def close(self) -> None:
        self.bar.stop()


def print_overview(
    listed: Sequence[Listed], folder: Path, unlisted: Sequence[str], *, everything: bool
) -> None:
    """Every cell with its status, or only those that failed; then how many there are of each, and
    what to do next.
    """
    shown = [cell for cell in listed if everything or cell.status == "failed"]
    if shown:
        Console().print(_table(shown))
    counts = Counter(cell.status for cell in listed)
    text = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
    print(f"{counted(len(listed), 'cell')} in {folder}: {text}")
    if counts["failed"]:
        print(
            f"full reasons: {folder / 'failed'}; the same command with --retry runs the failed "
            "cells again"
        )
    if counts["done"] == len(listed):
        print(f"compare the results: fedspine compare {folder}")
    if unlisted:
        print(
            f"{counted(len(unlisted), 'run')} in the folder that the file does not describe: "
            f"{', '.join(unlisted)}"
        )


def _table(listed: Sequence[Listed]) -> Table:
    table = Table("cell", "status", "rounds", "result", box=box.SIMPLE)
    for cell in listed:
        table.add_row(
            Text(cell.name),
            Text(cell.status, STYLES[cell.status]),
            f"{cell.round}/{cell.rounds}",
            Text(cell.remark),
        )
    return table
