"""The observer of a run, which gets its progress. A run itself prints nothing."""

from dataclasses import dataclass
from typing import Protocol

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Progress of a run: `round` rounds are done, at `now` seconds of `clock`; bytes down and up
    since the start.
    """

    round: int
    now: float
    rounds: int | None = None  # expected in all; None: as announced at the start
    accuracy: float | None = None
    loss: float | None = None
    checked: int | None = None  # the round of accuracy, loss and sparsity; None: this one
    sparsity: float | None = None
    bytes_moved: int | None = None
    seconds_left: float | None = None  # of wall time until the run's end
    clock: str = "simulated"  # or "fleet": wall seconds between real machines


class RunObserver(Protocol):
    """Receives a run's progress. `close` must be called if a run fails; twice is harmless."""

    def stage(self, text: str) -> None:
        """A stage outside of rounds begins, such as loading a model."""
        ...

    def say(self, line: str) -> None:
        """Show a line that stays, such as a choice made for the user."""
        ...

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        """The rounds begin; a resumed run has `done` of them already."""
        ...

    def scored(self, done: int, models: int, seconds_left: float | None) -> None:
        """`done` of the deployed `models` have their final score."""
        ...

    def round_done(self, status: RunStatus) -> None:
        """One more round is done."""
        ...

    def finished(self, table: Table) -> None:
        """The run has ended; show its table and close."""
        ...

    def close(self) -> None:
        """Restore the terminal."""
        ...
