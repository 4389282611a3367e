"""The display of a running run. It uses stderr only, so that stdout stays clean for --json."""

import sys
from dataclasses import replace
from time import monotonic
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from fedspine.report.tables import MISSING, bytes_text, decimal, percent, print_table, seconds_text
from fedspine.runs.observer import RunObserver, RunStatus

QUIET_SECONDS = 5.0  # between two lines about scoring


def progress_for(json: bool) -> RunObserver:
    """Silence where the caller wants JSON, a live bar on a terminal, otherwise a line per round."""
    if json:
        return Silent()
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return Live(console)
    return Lines(sys.stderr)


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        pass

    def scored(self, done: int, models: int, seconds_left: float | None) -> None:
        pass

    def round_done(self, status: RunStatus) -> None:
        pass

    def finished(self, table: Table) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """One flushed line per event, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.rounds, self.said = 0, monotonic()

    def stage(self, text: str) -> None:
        if self.rounds:  # silent while loading, so that an error in the input is the only line
            self._say(text)

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        self.rounds = rounds
        self._say(f"{title}: {rounds} rounds" + (f", {done} of them done before" if done else ""))

    def round_done(self, status: RunStatus) -> None:
        self.rounds = status.rounds or self.rounds
        parts = (f"round {status.round}/{self.rounds}", *_parts(status), *_eta(status))
        self._say("  ".join(parts))

    def say(self, line: str) -> None:
        self._say(line)

    def scored(self, done: int, models: int, seconds_left: float | None) -> None:
        if done == models:
            self._say(f"scored all {models} deployed models")
        elif seconds_left is not None and monotonic() - self.said >= QUIET_SECONDS:
            self._say(
                f"scored {done} of {models} deployed models  about {time_left(seconds_left)} left"
            )

    def finished(self, table: Table) -> None:
        print_table(table, self.stream)
        self.stream.flush()

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        self.said = monotonic()
        print(text, file=self.stream, flush=True)


class Live:
    """One bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # on a narrow terminal the bar gives way, since only it may wrap
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=18),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[numbers]}", markup=False, style="cyan"),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, numbers="", left="")

    def say(self, line: str) -> None:
        self.console.print(Text(line))

    def stage(self, text: str) -> None:
        self.bar.start()
        self.bar.update(self.task, description=text, refresh=True)

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        self.bar.start()
        # a reset discards the loading time, which says nothing about rounds
        self.bar.reset(self.task, total=rounds, completed=done, description=title)

    def round_done(self, status: RunStatus) -> None:
        numbers = "  ".join(_parts(replace(status, bytes_moved=None)))
        total = {} if status.rounds is None else {"total": status.rounds}
        self.bar.update(
            self.task,
            completed=status.round,
            numbers=numbers,
            left="  ".join(_eta(status)),
            refresh=True,
            **total,
        )

    def scored(self, done: int, models: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"about {time_left(seconds_left)} left"
        self.bar.update(
            self.task,
            description="scoring the deployed models",
            completed=done,
            total=models,
            left=left,
            refresh=True,
        )

    def finished(self, table: Table) -> None:
        self.close()
        self.console.print(table)

    def close(self) -> None:
        self.bar.stop()


def time_left(seconds: float) -> str:
    """A remaining time, as text of limited precision.

    >>> time_left(0.2), time_left(48.3), time_left(287.4)
    ('1 s', '48 s', '4 min 47 s')
    """
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 60 else seconds_text(seconds)


def _eta(status: RunStatus) -> list[str]:
    """The estimated time left, if known."""
    if status.seconds_left is None:
        return []
    return [f"about {time_left(status.seconds_left)} left"]


def _parts(status: RunStatus) -> list[str]:
    """The numbers that are known, each with its name."""
    judged = status.accuracy is not None
    known = percent(status.accuracy) if judged else decimal(status.loss)
    if known != MISSING and status.checked not in (None, status.round):
        known += f" (round {status.checked})"
    named = (
        ("accuracy" if judged else "loss", known),
        ("sparsity", percent(status.sparsity)),
        (status.clock, seconds_text(status.now)),
        ("traffic", bytes_text(status.bytes_moved)),
    )
    return [f"{name} {text}" for name, text in named if text != MISSING]
