"""What a person sees of a sweep: one display while it goes on, on stderr, and the table of `fedspine sweep --list`."""

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

LINE_SECONDS = 60.0  # between two lines that say no more than that the sweep goes on
STYLES = {"done": "green", "failed": "red", "running": "cyan", "half-done": "yellow", "open": "dim"}


@dataclass(frozen=True)
class AtWork:
    """A cell that is being run: `round` of `rounds` are saved; none yet, it may be loading, and after the last, scoring."""

    name: str
    round: int
    rounds: int

    @property
    def stage(self) -> str:
        return (
            "loading" if self.round == 0 else "scoring" if self.round == self.rounds else "rounds"
        )


@dataclass(frozen=True)
class Outlook:
    """Where a sweep is; `seconds_left` is estimated, None where nothing is known yet."""

    cells: int
    done: int
    failed: int
    seconds_left: float | None
    at_work: tuple[AtWork, ...] = ()

    def words(self) -> str:
        failed = [f"{self.failed} failed"] if self.failed else []
        left = (
            "time left not known yet"
            if self.seconds_left is None
            else f"about {seconds_text(self.seconds_left)} left"
        )
        return ", ".join([f"{self.done} of {counted(self.cells, 'cell')} done", *failed, left])


@dataclass(frozen=True)
class Listed:
    """A line of the list: a cell's name, its status, how many rounds are saved, and what else there is to say."""

    name: str
    status: str
    round: int
    rounds: int
    remark: str = ""


class SweepProgress(Protocol):
    """Told by a sweep how far it is; `close` may be called twice."""

    def update(self, outlook: Outlook) -> None:
        """Time has passed."""
        ...

    def ended(self, name: str, words: str, outlook: Outlook) -> None:
        """A cell is finished or has failed, as `words` say."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found."""
        ...


def sweep_progress_for(json: bool) -> SweepProgress:
    """Silence where the caller wants JSON, a live display on a terminal, otherwise lines."""
    if json:
        return Silent()
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return Live(console)
    return Lines(sys.stderr)


class Silent:
    """Says nothing."""

    def update(self, outlook: Outlook) -> None:
        pass

    def ended(self, name: str, words: str, outlook: Outlook) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A flushed line for every cell that ends, and one a minute meanwhile, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = -LINE_SECONDS

    def update(self, outlook: Outlook) -> None:
        if monotonic() - self.last >= LINE_SECONDS:
            at_work = [f"{cell.name} {cell.round}/{cell.rounds}" for cell in outlook.at_work]
            self._say("; ".join([outlook.words(), *at_work]))

    def ended(self, name: str, words: str, outlook: Outlook) -> None:
        self._say(f"{name}: {words}; {outlook.words()}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        self.last = monotonic()


class Live:
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

    def update(self, outlook: Outlook) -> None:
        self.bar.start()
        failed = f"{outlook.failed} failed, " if outlook.failed else ""
        left = (
            ""
            if outlook.seconds_left is None
            else f"about {seconds_text(outlook.seconds_left)} left"
        )
        over = outlook.done + outlook.failed
        self.bar.update(self.total, total=outlook.cells, completed=over, words=failed + left)
        for name in self.tasks.keys() - {cell.name for cell in outlook.at_work}:
            self.bar.remove_task(self.tasks.pop(name))
        for cell in outlook.at_work:
            if cell.name not in self.tasks:
                self.tasks[cell.name] = self.bar.add_task(cell.name, total=cell.rounds, words="")
            self.bar.update(self.tasks[cell.name], completed=cell.round, words=cell.stage)

    def ended(self, name: str, words: str, outlook: Outlook) -> None:
        self.bar.console.print(f"{escape(name)}: {escape(words)}", highlight=False)
        self.update(outlook)

    def close(self) -> None:
        self.bar.stop()


def print_overview(
    listed: Sequence[Listed], folder: Path, strangers: Sequence[str], *, everything: bool
) -> None:
    """Every cell with its status, or only those that failed; then how many there are of each, and what to do next."""
    shown = [cell for cell in listed if everything or cell.status == "failed"]
    if shown:
        Console().print(_table(shown))
    counts = Counter(cell.status for cell in listed)
    told = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
    print(f"{counted(len(listed), 'cell')} in {folder}: {told}")
    if counts["failed"]:
        print(
            f"why in full: {folder / 'failed'}; the same command with --retry tries again what failed"
        )
    if counts["done"] == len(listed):
        print(f"what came of it: fedspine compare {folder}")
    if strangers:
        print(
            f"{counted(len(strangers), 'run')} there that the file does not describe: {', '.join(strangers)}"
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
