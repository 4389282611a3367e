"""The series and table lines of a report, computed from a run's rows by pure functions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.report.rows import UNKNOWN_CLASS, Exchange, Note, RunRows

FIRST_CLASSES = ("tx2", "nx", "agx")  # slow to fast; other classes follow by name
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value of one device class over rounds."""

    rounds: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Waiting:
    """Per round: its length and the mean idle time per device, in seconds of the fleet's clock."""

    rounds: Floats
    seconds: Floats
    lengths: Floats

    @property
    def shares(self) -> Floats:
        return np.divide(
            self.seconds, self.lengths, out=np.zeros_like(self.seconds), where=self.lengths > 0
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes of all devices together since the start, per round."""

    rounds: Floats
    down: Floats
    up: Floats


@dataclass(frozen=True)
class Checks:
    """The scores during the run, one entry each; nan where a score lacks a number.

    Each is of a fixed part of the test rows and the mean over a few device models. The final score
    is not among them, since it is of all test rows.
    """

    rounds: Floats  # done by then
    seconds: Floats  # of the fleet's clock
    bytes: Floats  # of all devices, down and up, since the start
    accuracy: Floats
    loss: Floats
    sparsity: Floats


@dataclass(frozen=True)
class DeviceClass:
    """A row of the table of device classes; None where nothing was noted or everything was lost."""

    kind: str
    devices: int
    sparsity: float | None
    rank: float | None
    seconds: float | None
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class Trouble:
    """A device that was lost or whose result was left out; `reason` is the last one noted."""

    device: str
    kind: str
    exchanges: int
    lost: int
    left_out: int
    reason: str


def has_accuracy(rows: RunRows, summary: Mapping[str, Any]) -> bool:
    """Whether the run is judged by accuracy; otherwise by loss."""
    return summary.get("accuracy") is not None or any(
        score.accuracy is not None for score in rows.scores
    )


def kinds(rows: RunRows) -> dict[str, str]:
    """Each device's class."""
    return {exchange.device: exchange.kind for exchange in rows.exchanges}


def class_names(rows: RunRows) -> list[str]:
    """Classes of the run, from slow to fast where that is known, others by name."""
    present = {exchange.kind for exchange in rows.exchanges}
    known = [name for name in FIRST_CLASSES if name in present]
    return known + sorted(present.difference(known))


def bands(rows: RunRows, value: Callable[[Note], float | None]) -> dict[str, Band]:
    """Per class, the devices' notes over rounds; a class without notes is absent."""
    kind_of = kinds(rows)
    noted: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for note in rows.notes:
        number = value(note)
        if number is not None:
            noted[kind_of.get(note.device, UNKNOWN_CLASS)][note.round].append(number)
    names = [*class_names(rows), UNKNOWN_CLASS]
    return {name: _band(noted[name]) for name in dict.fromkeys(names) if name in noted}


def waiting(rows: RunRows) -> Waiting:
    """The length of rounds and the devices' idle time."""
    ends = np.array([0.0, *(row.now for row in rows.rounds)])
    seconds = _floats(row.waiting_seconds for row in rows.rounds)
    return Waiting(_floats(row.round for row in rows.rounds), seconds, np.diff(ends))


def traffic(rows: RunRows) -> Traffic:
    """Bytes down and up, summed since the start."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for exchange in rows.exchanges:
        sums[exchange.round][0] += exchange.bytes_down
        sums[exchange.round][1] += exchange.bytes_up
    rounds = sorted(sums)
    down, up = (np.cumsum(_floats(sums[number][way] for number in rounds)) for way in (0, 1))
    return Traffic(_floats(rounds), down, up)


def checks(rows: RunRows) -> Checks:
    """The scores of the models during the run."""
    scores = [score for score in rows.scores if not score.final]
    rounds, moved = _floats(score.round for score in scores), traffic(rows)
    sums = np.concatenate([[0.0], moved.down + moved.up])
    accuracy, loss, sparsity = (
        np.array([getattr(score, name) for score in scores], dtype=np.float64)
        for name in ("accuracy", "loss", "sparsity")
    )
    return Checks(
        rounds=rounds + 1,
        seconds=_floats(score.now for score in scores),
        bytes=sums[np.searchsorted(moved.rounds, rounds, side="right")],
        accuracy=accuracy,
        loss=loss,
        sparsity=sparsity,
    )


def exchange_seconds(rows: RunRows) -> dict[str, Floats]:
    """Per class, the seconds of every exchange that was not lost."""
    found = {name: _seconds(exchanges) for name, exchanges in _by_class(rows).items()}
    return {name: seconds for name, seconds in found.items() if len(seconds)}


def device_classes(rows: RunRows) -> list[DeviceClass]:
    """One line per class. Sparsity is the mean of what its devices noted last; rank is the mean
    over all notes.
    """
    kind_of = kinds(rows)
    last: dict[str, dict[str, float]] = defaultdict(dict)
    ranks: dict[str, list[float]] = defaultdict(list)
    for note in rows.notes:
        kind = kind_of.get(note.device, UNKNOWN_CLASS)
        if note.sparsity is not None:
            last[kind][note.device] = note.sparsity
        if note.rank is not None:
            ranks[kind].append(note.rank)
    return [
        DeviceClass(
            kind=kind,
            devices=len({exchange.device for exchange in exchanges}),
            sparsity=_mean(last[kind].values()),
            rank=_mean(ranks[kind]),
            seconds=_mean(_seconds(exchanges)),
            bytes_down=sum(exchange.bytes_down for exchange in exchanges),
            bytes_up=sum(exchange.bytes_up for exchange in exchanges),
        )
        for kind, exchanges in _by_class(rows).items()
    ]


def troubles(rows: RunRows) -> list[Trouble]:
    """Devices that were lost or left out at least once, the worst first."""
    kind_of = kinds(rows)
    asked: dict[str, int] = defaultdict(int)
    lost: dict[str, int] = defaultdict(int)
    reasons: dict[str, list[str]] = defaultdict(list)
    for exchange in rows.exchanges:
        asked[exchange.device] += 1
        lost[exchange.device] += exchange.lost
    for note in rows.notes:
        if note.left_out is not None:
            reasons[note.device].append(note.left_out)
    found = [
        Trouble(
            name,
            kind_of.get(name, UNKNOWN_CLASS),
            asked[name],
            lost[name],
            len(reasons[name]),
            (reasons[name] or [""])[-1],
        )
        for name in sorted({*asked, *reasons})
    ]
    found = [line for line in found if line.lost or line.left_out]
    return sorted(found, key=lambda line: -(line.lost + line.left_out))


def summary_so_far(rows: RunRows) -> dict[str, Any]:
    """The part of summary.json that follows from the records alone, for an unfinished run."""
    found: dict[str, Any] = {"rounds": len(rows.rounds), "devices": len(kinds(rows))}
    if rows.scores:
        last = rows.scores[-1]
        found |= {
            name: getattr(last, name)
            for name in ("accuracy", "accuracy_global", "loss", "loss_global", "sparsity")
        }
    if rows.rounds:
        found |= {
            "simulated_seconds": rows.rounds[-1].now,
            "waiting_seconds": float(waiting(rows).seconds.sum()),
        }
    if rows.exchanges:
        found["bytes_down"] = sum(exchange.bytes_down for exchange in rows.exchanges)
        found["bytes_up"] = sum(exchange.bytes_up for exchange in rows.exchanges)
        found["peak_memory_bytes_simulated"] = max(
            exchange.peak_memory_bytes for exchange in rows.exchanges
        )
    return found


def _by_class(rows: RunRows) -> dict[str, list[Exchange]]:
    return {name: [row for row in rows.exchanges if row.kind == name] for name in class_names(rows)}


def _seconds(exchanges: Iterable[Exchange]) -> Floats:
    return _floats(exchange.seconds for exchange in exchanges if not exchange.lost)


def _band(noted: Mapping[int, list[float]]) -> Band:
    rounds = sorted(noted)
    mean, low, high = (
        _floats(of(noted[number]) for number in rounds) for of in (np.mean, min, max)
    )
    return Band(_floats(rounds), mean, low, high)


def _mean(values: Iterable[float]) -> float | None:
    numbers = _floats(values)
    return float(numbers.mean()) if len(numbers) else None


def _floats(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)
