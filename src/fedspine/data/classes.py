"""Labels are texts, decided once over all splits; from texts to class names and their numbers.

A whole number means its digits, or the class name that the data states for it; a number with
nothing after its point is a whole one where all such labels are, as other tools write whole numbers
as floats once a value was missing. True and false of formats with types are the texts `true` and
`false`, or `True` and `False` where only these are among the other splits' texts.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.data.columns import Values
from fedspine.data.parts import counted, listed

_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_DIGITS = re.compile(r"0|[1-9]\d*", re.ASCII)
FEW = 10  # classes that any number of rows may have


def texts(splits: Sequence[Values]) -> list[list[str]]:
    """The labels of every split as texts, in the order of its rows."""
    labels = [value for split in splits for value in split.labels or ()]
    whole = all(value.is_integer() for value in labels if isinstance(value, float))
    written = {value for value in labels if isinstance(value, str)}
    capital = {"True", "False"} & written and not {"true", "false"} & written
    stated = _stated(splits, whole)
    digits = stated and all(name in stated or _is_number_of(name, stated) for name in written)

    def text(value: Any, names: Sequence[str]) -> str:
        if isinstance(value, bool):
            return str(value) if capital else str(value).lower()
        if isinstance(value, float):
            if not whole:
                return str(value)
            value = int(value)
        if isinstance(value, int):
            return names[value] if 0 <= value < len(names) else str(value)
        return stated[int(value)] if digits and value not in stated else value

    found = []
    for split in splits:
        names = (split.stated or stated) if stated else ()
        known = {key: text(key[1], names) for key in {(type(v), v) for v in split.labels or ()}}
        found.append([known[type(value), value] for value in split.labels or ()])
    return found


def _stated(splits: Sequence[Values], whole: bool) -> tuple[str, ...]:
    """The class names that whole numbers stand for; none where a number is none of theirs, or there
    are no numbers.
    """
    names = next((split.stated for split in splits if split.stated), ())
    numbers = [
        (value, split.stated or names)
        for split in splits
        for value in {label for label in split.labels or () if type(label) in (int, float)}
    ]
    fit = whole and numbers and all(0 <= value < len(of) for value, of in numbers)
    return names if fit else ()


def _is_number_of(text: str, names: Sequence[str]) -> bool:
    short = len(text) <= len(str(len(names)))
    return short and bool(_DIGITS.fullmatch(text)) and int(text) < len(names)


def named(train: Values, labels: Sequence[str], column: str) -> tuple[str, ...]:
    """The class names in the order of their numbers: as the data states them, as numbers, or by the
    alphabet.

    `labels` are those of the training rows, as texts. Raises BadInput for a single class, and for
    so many that the column cannot be one of classes.
    """
    distinct = dict.fromkeys(labels)
    if len(distinct) < 2:
        raise BadInput(
            f"expected at least 2 classes in column {column!r} of the train set, found only "
            f"{labels[0]!r}; "
            "give rows of another class, or name another label column"
        )
    refuse_too_many(len(distinct), len(labels), f"column {column!r}", "name another label column")
    numbered = all(type(value) in (int, float) for value in train.labels or ())
    if numbered and train.stated and set(distinct) <= set(train.stated):
        return train.stated
    return tuple(ordered(distinct))


def refuse_too_many(classes: int, rows: int, where: str, do: str) -> None:
    """Raise BadInput where the labels of `where` cannot be classes, and say what to `do`."""
    if classes == rows and rows > FEW:
        raise BadInput(
            f"expected classes in {where}, but each of the {rows:,} rows has a label of its own; "
            f"{do}"
        )
    if classes > max(FEW, rows / 2):
        raise BadInput(
            f"expected classes in {where}, found {classes:,} different labels in {rows:,} rows; "
            f"{do}"
        )


def ordered(names: Iterable[str]) -> list[str]:
    """Names of classes in their order: by value where all are numbers, else by the alphabet.

    >>> ordered(["10", "9", "1.5"]), ordered(["10", "9", "n/a"])
    (['1.5', '9', '10'], ['10', '9', 'n/a'])
    """
    known = list(names)
    if all(_NUMBER.fullmatch(name) for name in known):
        return sorted(known, key=lambda name: (float(name), name))
    return sorted(known)


def look_alike(names: Iterable[str]) -> list[str]:
    """A remark for each pair of class names that a reader would take for one: neg and Neg."""
    seen: dict[str, str] = {}
    remarks = []
    for name in names:
        bare = "".join(
            c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf"
        )
        other = seen.setdefault(" ".join(bare.casefold().split()), name)
        if other != name:
            remarks.append(
                f"{other!r} and {name!r} are two classes; write them alike if they are one"
            )
    return remarks


def numbers(labels: Sequence[str], names: Sequence[str], column: str) -> list[int]:
    """The number of each label of the test rows; raises BadInput for one that is no class of the
    training rows.
    """
    code = {name: number for number, name in enumerate(names)}
    unseen = [label for label in labels if label not in code]
    if unseen:
        raise BadInput(
            f"expected only labels of the train set in the test set, found {unseen[0]!r} in column "
            f"{column!r} of "
            f"{counted(len(unseen), 'row')}; the train set has {listed(map(repr, names))}; add "
            "such rows to it, "
            "or remove them from the test set"
        )
    return [code[label] for label in labels]
