"""What every file reader returns: the wanted columns, with values typed as in the file."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedspine.core.errors import BadInput, listed

Pick = Callable[[Sequence[str]], Mapping[str, int]]
"""Maps the names of all columns to the position of each wanted one, by its name in the request."""

LONGEST = 60  # characters of a value that a message quotes
UNSEEN = "\ufeff\u200b\u200c\u200d\u2060"  # zero-width characters


@dataclass(frozen=True)
class FilePart:
    """Rows of a file or split: each of `columns` holds one value per row, None for a missing one.

    `types` names the type of a column where the file states one, `stated` the class names that the
    integers of a column stand for. `notes` are one-line remarks for the user.
    """

    columns: Mapping[str, list[Any]]
    rows: int
    types: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Unreadable(ValueError):
    """Why a file cannot be read, and what to do; the caller adds the file's name in a BadInput."""

    def __init__(self, reason: str, do: str) -> None:
        super().__init__(reason)
        self.do = do


class Empty(Unreadable):
    """A file without a header or a row, which may be one of several shards."""

    def __init__(self) -> None:
        super().__init__("it is empty", "give a file with rows")


Read = Callable[[Pick], FilePart]
"""Reads the columns that are picked."""


def joined(parts: Sequence[FilePart]) -> FilePart:
    """The rows of all parts, one after another; raises BadInput for shards that do not fit
    together.
    """
    first = parts[0]
    if not parts[1:]:
        return first
    # a note that all shards have is said once
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    if any(set(part.columns) != set(first.columns) for part in parts):
        raise BadInput(
            "expected the same columns in every shard; write the shards again from one table"
        )
    stated: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for name, names in part.stated.items():
            if names and stated.setdefault(name, names) != names:
                raise BadInput(
                    f"expected the same class names of column {name!r} in every shard, found "
                    f"{listed(stated[name])} and {listed(names)}; write the shards again from one "
                    "table"
                )
    return FilePart(
        columns={
            name: [value for part in parts for value in part.columns[name]]
            for name in first.columns
        },
        rows=sum(part.rows for part in parts),
        types={name: kind for part in parts for name, kind in part.types.items()},
        stated=stated,
        notes=tuple(notes),
    )


def trimmed(text: str) -> str:
    """The text without white space and zero-width characters at its ends.

    >>> trimmed("\ufeffneg \u200b")
    'neg'
    """
    bare = text.strip()
    # an accent or emoji within may need them
    while bare and (bare[0] in UNSEEN or bare[-1] in UNSEEN):
        bare = bare.strip(UNSEEN).strip()
    return bare


def composed(text: str) -> str:
    """The text in Unicode's normal form NFC, where an accent is part of its letter."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shown(value: Any) -> str:
    """A value as a message quotes it, cut where it is long.

    >>> shown("a" * 99)[-6:]
    "aa...'"
    """
    text = str(value)
    return repr(value if len(text) <= LONGEST else text[:LONGEST] + "...")


def counted(number: int, what: str) -> str:
    """A number and its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
