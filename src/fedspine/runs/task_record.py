"""The task record in a run directory: classes, preprocessing, digests of the data and the base.

`task.json` holds the record, `base/` the base's configuration and tokenizer without weights. A
resumed or exported run reads these; from outside it takes only rows and weights, and their digests
must be the recorded ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from fedspine.core.errors import BadInput, listed, reason_of
from fedspine.core.strict import parsed
from fedspine.core.task import TaskKind
from fedspine.storage.store import write_atomically

if TYPE_CHECKING:
    from fedspine.data.dataset import ArrayRows, Dataset, Rows
    from fedspine.lm.base import Base
    from fedspine.lm.vocabulary import Vocabulary
    from fedspine.nets.net import Net
    from fedspine.runs.config import Recipe

TASK, BASE = "task.json", "base"
TURNS = "turns"  # the part of a split that its dialogues are
FORMAT = 1
SHOWN = 12  # characters of a digest in a message


@dataclass(frozen=True)
class Split:
    """One split as it was read.

    `sha256` is that of each part, by name: texts, pairs, labels, values, a partition's column.
    """

    rows: int
    sha256: dict[str, str]
    shape: tuple[int, ...] | None = None  # of one row, where rows are arrays


@dataclass(frozen=True)
class TaskRecord:
    """What a run's recipe leaves to its data and model; a label is an index into `classes`."""

    format: int
    kind: TaskKind
    classes: tuple[str, ...]  # empty for language modelling
    columns: dict[str, str]  # by what they are: text, pair, label
    max_tokens: int
    layers: int | None  # blocks of the base that are used; None: all
    encoding: str | None  # version of how texts become tokens; None for arrays
    data: str
    splits: dict[str, Split]  # at the sites of a real fleet only the server's test rows
    model: str
    model_sha256: str | None  # of the base's weights; None for a net, which has none to start from
    files: dict[str, str] | None = None  # sha256 of each in `base/`; older versions kept none

    @property
    def of_dialogues(self) -> bool:
        """Whether the model learnt answers."""
        return TURNS in self.splits["test"].sha256

    @property
    def data_sha256(self) -> str:
        """One digest of classes and rows."""
        content = [self.classes, {name: asdict(split) for name, split in self.splits.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_of(recipe: "Recipe", data: "Dataset", *, here: bool = True) -> TaskRecord:
    """The record of a run of this recipe on this data, before its base is known.

    Unless the devices' rows are `here`, only the test rows count.
    """
    section, names = recipe.task, data.label_names
    of_texts = section.kind != "array"
    columns = {"text": section.text, "pair": section.pair, "label": section.label}
    splits = {"train": data.train} if here else {}
    return TaskRecord(
        format=FORMAT,
        kind=section.kind,
        classes=tuple(names),
        columns={what: name for what, name in columns.items() if of_texts and name is not None},
        max_tokens=section.max_tokens,
        layers=section.layers,
        encoding=_encoding() if of_texts else None,
        data=section.data,
        splits={
            name: _of_texts(rows, names) if of_texts else _of_arrays(rows, names)
            for name, rows in (splits | {"test": data.test}).items()
        },
        model=section.model,
        model_sha256=None,
    )


def on_base(record: TaskRecord, base: "Base | Net") -> TaskRecord:
    """The record with the digest of the base, once it is loaded."""
    return replace(record, model_sha256=getattr(base, "weights_sha256", None))


def _encoding() -> str:
    from fedspine.lm.tokens import FORMAT as encoding  # imports torch, so only here

    return encoding


def _of_texts(rows: "Rows", names: Sequence[str]) -> Split:
    parts = {"texts": rows.texts} | ({} if rows.pairs is None else {"pairs": rows.pairs})
    if rows.dialogues is not None:
        parts[TURNS] = [json.dumps(dialogue.messages) for dialogue in rows.dialogues]
    if rows.labels is not None:  # by name, so that neither order nor number of classes counts
        parts["labels"] = [names[label] for label in rows.labels.tolist()]
    parts |= {_column(name): values for name, values in rows.columns.items()}
    return Split(len(rows), {name: _strings_sha256(values) for name, values in parts.items()})


def _of_arrays(rows: "ArrayRows", names: Sequence[str]) -> Split:
    x = np.ascontiguousarray(rows.x)
    values = hashlib.sha256(f"{x.dtype.str} {x.shape} ".encode())
    values.update(memoryview(x.reshape(-1).view(np.uint8)))
    parts = {"labels": [names[label] for label in rows.labels.tolist()]}
    parts |= {_column(name): column for name, column in rows.columns.items()}
    digests = {name: _strings_sha256(each) for name, each in parts.items()}
    return Split(len(rows), {"values": values.hexdigest()} | digests, tuple(x.shape[1:]))


def _column(name: str) -> str:
    return f"column {name!r}"


def _strings_sha256(values: Sequence[str]) -> str:
    lengths = np.fromiter(map(len, values), "<i8", len(values))  # where one ends, the next begins
    digest = hashlib.sha256(lengths.tobytes())
    digest.update("".join(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# --- in the run's folder ---


def write(
    folder: Path,
    record: TaskRecord,
    base: "Base | Net",
    tokenizer: Any,
    vocabulary: "Vocabulary | None" = None,
) -> None:
    """Keep a run's record, and its base's configuration, tokenizer and vocabulary, in its folder.

    `task.json` comes last, so that it vouches for the rest. Raises OSError where they cannot be
    written.
    """
    if tokenizer is not None:
        _write_base(folder / BASE, base, tokenizer, vocabulary)
        record = replace(record, files=_files_sha256(folder / BASE))
    write_atomically(folder / TASK, json.dumps(asdict(record), indent=1).encode())


def _write_base(
    place: Path, base: "Base | Net", tokenizer: Any, vocabulary: "Vocabulary | None"
) -> None:
    partial = place.with_name(f".{place.name}.part")
    for leftover in (partial, place):  # of a kill; without `task.json` they count for nothing
        shutil.rmtree(leftover, ignore_errors=True)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()  # which the last call left behind, or its absence
        backend.no_padding()
    try:
        partial.mkdir()
        base.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if vocabulary is not None:
            from fedspine.lm.vocabulary import write as keep  # imports torch, so only here

            keep(partial, vocabulary)
        for path in partial.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(partial, place)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:  # the Rust library has a kind of its own, for a full disk too
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(None, f"the tokenizer cannot be saved: {error}", str(place)) from error


def _files_sha256(folder: Path) -> dict[str, str]:
    paths = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def read(folder: Path) -> TaskRecord | None:
    """The record in a run's folder, None where there is none; BadInput where it cannot be read."""
    path = folder / TASK
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = parsed(payload)["format"]
        if found == FORMAT:
            return pydantic.TypeAdapter(TaskRecord).validate_json(payload, strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    raise BadInput(
        f"{path} has format {found!r}, but this version reads {FORMAT}; use the version of "
        "fedspine that wrote it"
    )


def recorded(folder: Path) -> TaskRecord:
    """The record in a run's folder; BadInput where an older version began it, which kept none."""
    record = read(folder)
    if record is None:
        raise BadInput(
            f"{folder} was begun by an older version of fedspine that kept no record of classes "
            f"and base (it has no {TASK}), so what its files mean today is not known; run its "
            f"{folder / 'recipe.toml'} again"
        )
    return record


def base_of(folder: Path) -> Path:
    """The folder with a run's configuration and tokenizer; raises BadInput where it is gone or has
    other bytes than were written.
    """
    place, record = folder / BASE, read(folder)
    if not (place / "config.json").is_file():
        raise _damaged(place, "config.json is missing")
    if record is not None and record.files is not None:
        found = _files_sha256(place)
        for name, sha256 in record.files.items():
            if found.get(name) != sha256:
                raise _damaged(place / name, "it has other bytes than were written")
    return place


def _damaged(path: Path, why: object) -> BadInput:
    reason = reason_of(why)
    return BadInput(f"{path} is damaged ({reason}); restore it from a copy, or start a new run")


# --- changes since the run began ---


@contextmanager
def needing(what: str, place: str, folder: Path | None) -> Iterator[None]:
    """Add to a BadInput that the run in `folder` cannot be resumed, where one is, and name the
    `place` that is not as it was.
    """
    try:
        yield
    except BadInput as error:
        if folder is None:
            raise
        reason = str(error)
        if os.path.exists(os.path.expanduser(place)):  # what else to do is for a new run
            reason = f"{reason.partition('; ')[0]}; put {place} back as it was, or start a new run"
        raise BadInput(
            f"the run in {folder} cannot be resumed without its {what}: {reason}"
        ) from None


def check_data(then: TaskRecord, now: TaskRecord, folder: Path) -> None:
    """Raise BadInput, which says what changed, where the run in `folder` began with other data."""
    if then.encoding != now.encoding:
        raise BadInput(
            f"the run in {folder} was begun by a version of fedspine that tokenises texts "
            "differently; resume it with that version, or start a new run"
        )
    if changes := list(_changes(then, now)):
        raise BadInput(
            f"{now.data} has changed since the run in {folder} began: {'; '.join(changes)}; put "
            "it back as it was, or start a new run"
        )


def check_base(then: TaskRecord, found: str | None, where: str, folder: Path) -> None:
    """Raise BadInput, which names both digests, where the run in `folder` had another base."""
    if then.model_sha256 != found:
        raise BadInput(
            f"{where} is not the base that the run in {folder} was made with: its weights have "
            f"sha256 {str(found)[:SHOWN]}, those of the run had {str(then.model_sha256)[:SHOWN]}; "
            "use the base of the run"
        )


def _changes(then: TaskRecord, now: TaskRecord) -> Iterator[str]:
    if then.classes != now.classes:
        was, are = (listed(record.classes) or "none" for record in (then, now))
        yield f"the classes were {was}, now they are {are}"
    for name, old in then.splits.items():
        new = now.splits.get(name)
        if new is None:
            yield f"there are no {name} rows any more"
        elif old.rows != new.rows:
            yield f"there were {old.rows} {name} rows, now there are {new.rows}"
        elif old.shape != new.shape:
            yield f"{name} rows were of shape {list(old.shape or ())}, now {list(new.shape or ())}"
        else:
            parts = [part for part in {**old.sha256, **new.sha256} if _differ(part, old, new)]
            if then.classes != now.classes and "labels" in parts:
                parts.remove("labels")  # reported above
            if parts:
                yield f"other {' and '.join(parts)} in the {name} rows"


def _differ(part: str, old: Split, new: Split) -> bool:
    return old.sha256.get(part) != new.sha256.get(part)
