"""Reads the records of a run: the rows of records.jsonl as small dataclasses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.strict import parsed

UNKNOWN_CLASS = "unknown"


@dataclass(frozen=True)
class Exchange:
    """One order and its result; `seconds` on the fleet's clock, `kind` the device's class."""

    round: int
    device: str
    kind: str
    seconds: float
    bytes_down: int
    bytes_up: int
    peak_memory_bytes: int
    lost: bool
    epsilon: float | None = None  # spent by the device so far, where the run promises privacy
    noise: float | None = None  # share that the device added beside the change of its weights


@dataclass(frozen=True)
class Note:
    """A method's note on one device in one round; None for what it did not note."""

    round: int
    device: str
    rank: float | None
    sparsity: float | None
    left_out: str | None
    loss: float | None = None  # of its training
    bounded: str | None = None  # which part of its change was scaled down to a usual size
    share: float | None = None  # share of that part that counted


@dataclass(frozen=True)
class ScoreRow:
    """Quality at `now`; accuracies are None for language modelling. Only the `final` one is of all
    test rows.
    """

    round: int
    now: float
    accuracy: float | None
    accuracy_global: float | None
    loss: float | None
    loss_global: float | None
    sparsity: float | None
    final: bool
    accuracy_dense: float | None = None  # of the unpruned model, as the next
    loss_dense: float | None = None


@dataclass(frozen=True)
class Warned:
    """A warning about a run that does not learn, in one line."""

    round: int
    line: str


@dataclass(frozen=True)
class Round:
    """A finished round; `waiting_seconds` is its devices' mean idle time."""

    round: int
    now: float
    waiting_seconds: float


@dataclass(frozen=True)
class AnswerRow:
    """The answers of models, by their names, to the prompt of a test row, and the one it gives."""

    prompt: str
    reference: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class RunRows:
    """A run's records by kind of row, in the order they were written."""

    exchanges: tuple[Exchange, ...] = ()
    notes: tuple[Note, ...] = ()
    scores: tuple[ScoreRow, ...] = ()
    rounds: tuple[Round, ...] = ()
    warnings: tuple[Warned, ...] = ()
    answers: tuple[AnswerRow, ...] = ()


def read_rows(path: Path) -> RunRows:
    """The records of a run. A torn last line, as a killed run leaves it, is ignored; so are unknown
    rows and keys.

    Raises BadInput for any other line that is not a JSON object with a "row".
    """
    found: dict[str, list[Any]] = {name: [] for name in READERS}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
            name = row["row"]
        except (ValueError, TypeError, KeyError) as error:
            # a line that was finished ends in a newline, after which there is one more part
            if number == len(lines):
                break
            raise BadInput(
                f"expected a JSON object with 'row' in line {number} of {path.name}; "
                "remove that line"
            ) from error
        if name in READERS and (read := READERS[name](row)) is not None:
            found[name].append(read)
    return RunRows(*(tuple(rows) for rows in found.values()))


def _exchange(row: Mapping[str, Any]) -> Exchange:
    return Exchange(
        round=_count(row, "round"),
        device=str(row.get("device")),
        kind=str(row.get("kind") or UNKNOWN_CLASS),
        seconds=_number(row, "seconds") or 0.0,
        bytes_down=_count(row, "bytes_down"),
        bytes_up=_count(row, "bytes_up"),
        peak_memory_bytes=_count(row, "peak_memory_bytes"),
        lost=bool(row.get("lost")),
        epsilon=_number(row, "epsilon"),
        noise=_number(row, "noise"),
    )


def _note(row: Mapping[str, Any]) -> Note | None:
    values = row.get("values") or {}
    # a note on the whole round appears only in the records
    if "device" not in values:
        return None
    left_out, bounded = values.get("left_out"), values.get("bounded")
    return Note(
        round=_count(row, "round"),
        device=str(values["device"]),
        rank=_number(values, "rank"),
        sparsity=_number(values, "sparsity"),
        left_out=None if left_out is None else str(left_out),
        loss=_number(values, "loss"),
        bounded=None if bounded is None else str(bounded),
        share=_number(values, "share"),
    )


def _score(row: Mapping[str, Any]) -> ScoreRow:
    return ScoreRow(
        round=_count(row, "round"),
        now=_number(row, "now") or 0.0,
        accuracy=_number(row, "accuracy"),
        accuracy_global=_number(row, "accuracy_global"),
        loss=_number(row, "loss"),
        loss_global=_number(row, "loss_global"),
        sparsity=_number(row, "sparsity"),
        final=bool(row.get("final")),
        accuracy_dense=_number(row, "accuracy_dense"),
        loss_dense=_number(row, "loss_dense"),
    )


def _round(row: Mapping[str, Any]) -> Round:
    return Round(
        _count(row, "round"), _number(row, "now") or 0.0, _number(row, "waiting_seconds") or 0.0
    )


def _warned(row: Mapping[str, Any]) -> Warned:
    return Warned(_count(row, "round"), str(row.get("line") or ""))


def _answer(row: Mapping[str, Any]) -> AnswerRow:
    answers = row.get("answers")
    texts = answers.items() if isinstance(answers, Mapping) else ()
    return AnswerRow(
        prompt=str(row.get("prompt") or ""),
        reference=str(row.get("reference") or ""),
        answers={str(name): str(text) for name, text in texts},
    )


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None: plots cannot show nan, nor a method's list of ranks."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def _count(row: Mapping[str, Any], name: str) -> int:
    return int(_number(row, name) or 0)


# in the order of the fields of RunRows
READERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "exchange": _exchange,
    "note": _note,
    "score": _score,
    "round": _round,
    "warning": _warned,
    "answer": _answer,
}
