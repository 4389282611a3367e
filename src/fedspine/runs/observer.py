"""What a run tells whoever watches it. A run itself prints nothing."""

from dataclasses import dataclass
from typing import Protocol

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run is: `round` rounds are done, at `now` seconds of `clock`; bytes down and up since the start."""

    round: int
    now: float
    rounds: int | None = (
        None  # that there will be, as far as can be told; None: as was said at the start
    )
    accuracy: float | None = None
    loss: float | None = None
    sparsity: float | None = None
    bytes_moved: int | None = None
    seconds_left: float | None = None  # of wall time until the run's end
    clock: str = "simulated"  # or "fleet": wall seconds between real machines


class Progress(Protocol):
    """Told by a run how far it is. `close` may be called twice and must be called where a run fails."""

    def stage(self, text: str) -> None:
        """What is being done outside of rounds, such as loading a model."""
        ...

    def say(self, line: str) -> None:
        """A line that stays, such as what was chosen for the user."""
        ...

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        """The rounds begin; `done` of `rounds` were done before, where a run is resumed."""
        ...

    def scored(self, done: int, models: int, seconds_left: float | None) -> None:
        """Of the deployed models that are scored at the end, so many are done."""
        ...

    def round_done(self, standing: Standing) -> None:
        """One more round is done."""
        ...

    def finished(self, table: Table) -> None:
        """The run is over; shows its table and closes."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found."""
        ...
