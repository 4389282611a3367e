"""How raw label values become strings, once for all splits, and strings become class numbers.

An integer stands for its digits, or for the class name that the data gives it. Floats without a
fraction count as integers if all float labels are such, since other tools write integers as floats
once a value is missing, and where the same integer is a label, too. Booleans of typed formats
become `true` and `false`, or `True` and `False`, or `TRUE` and `FALSE`, where the string labels use
only these.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from fedspine.core.errors import MOST, BadInput, listed
from fedspine.data.columns import Values
from fedspine.data.parts import counted, shown

_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_DIGITS = re.compile(r"0|[1-9]\d*", re.ASCII)
FEW = 10  # so few classes are accepted for any number of rows


def texts(splits: Sequence[Values]) -> list[list[str]]:
    """The labels of every split as strings, in row order."""
    labels = [value for split in splits for value in split.labels or ()]
    whole = all(_is_whole(value) for value in labels if isinstance(value, float))
    integers = {value for value in labels if type(value) is int}
    written = {value for value in labels if isinstance(value, str)}
    of_booleans = _of_booleans(written)
    stated = _stated(splits, whole)
    digits = stated and all(name in stated or _is_number_of(name, stated) for name in written)

    def text(value: Any, names: Sequence[str]) -> str:
        if isinstance(value, bool):
            return of_booleans(str(value))
        if isinstance(value, float):
            if not whole and value not in integers:
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


def _is_whole(value: float) -> bool:
    """Whether a float stands for one integer, as those above 2^53 do not."""
    return value.is_integer() and abs(value) < 2**53


def _of_booleans(written: Collection[str]) -> Callable[[str], str]:
    """How true and false are spelled, given the labels that are strings: in lower case, unless
    these use one other spelling.
    """
    used = [
        spell
        for spell in (str.lower, str.title, str.upper)
        if not {spell("true"), spell("false")}.isdisjoint(written)
    ]
    return used[0] if len(used) == 1 else str.lower


def _stated(splits: Sequence[Values], whole: bool) -> tuple[str, ...]:
    """The class names that integers stand for; empty if an integer is out of their range, or there
    are no integers.
    """
    names = next((split.stated for split in splits if split.stated), ())
    numbers = [
        (value, split.stated or names)
        for split in splits
        for value in {label for label in split.labels or () if type(label) in (int, float)}
    ]
    fit = whole and numbers and all(0 <= value < len(of) for value, of in numbers)
    return names if fit else ()


def unnamed(splits: Sequence[Values]) -> list[str]:
    """A remark where the class names that the data states are not used, as a label has none."""
    names = next((split.stated for split in splits if split.stated), ())
    found = [
        value
        for split in splits
        for value in split.labels or ()
        if type(value) in (int, float) and value not in range(len(split.stated or names))
    ]
    if not names or not found:
        return []
    return [
        f"the class names {listed(map(shown, names))} are not used, as the label {found[0]} of "
        f"{counted(len(found), 'row')} has none"
    ]


def _is_number_of(text: str, names: Sequence[str]) -> bool:
    short = len(text) <= len(str(len(names)))
    return short and bool(_DIGITS.fullmatch(text)) and int(text) < len(names)


def named(train: Values, labels: Sequence[str], column: str) -> tuple[str, ...]:
    """The class names in the order of their numbers: as the data states them, by numeric value, or
    alphabetically.

    `labels` are the training labels as strings. Raises BadInput for a single class, and for so many
    that the column cannot hold classes.
    """
    distinct = dict.fromkeys(labels)
    if len(distinct) < 2:
        raise BadInput(
            f"expected at least 2 classes in column {column!r} of the train set, found only "
            f"{shown(labels[0])}; give rows of another class, or name another label column"
        )
    refuse_too_many(len(distinct), len(labels), f"column {column!r}", "name another label column")
    numbered = all(type(value) in (int, float) for value in train.labels or ())
    if numbered and train.stated and set(distinct) <= set(train.stated):
        return train.stated
    return tuple(ordered(distinct))


def refuse_too_many(classes: int, rows: int, where: str, do: str) -> None:
    """Raise BadInput if the labels of `where` are too many to be classes; `do` says what to do."""
    if classes == rows and rows > FEW:
        raise BadInput(
            f"expected classes in {where}, but each of the {rows:,} rows has its own label; {do}"
        )
    if classes > max(FEW, rows / 2):
        raise BadInput(
            f"expected classes in {where}, found {classes:,} different labels in {rows:,} rows; "
            f"{do}"
        )


def ordered(names: Iterable[str]) -> list[str]:
    """Class names sorted by value if all are numbers, else alphabetically.

    >>> ordered(["10", "9", "1.5"]), ordered(["10", "9", "n/a"])
    (['1.5', '9', '10'], ['10', '9', 'n/a'])
    """
    known = list(names)
    if all(_NUMBER.fullmatch(name) for name in known):
        return sorted(known, key=lambda name: (float(name), name))
    return sorted(known)


def look_alike(names: Iterable[str]) -> list[str]:
    """Remarks on pairs of class names that look the same to a reader: neg and Neg; of many pairs,
    on the first.
    """
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        bare = "".join(
            c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf"
        )
        other = seen.setdefault(" ".join(bare.casefold().split()), name)
        if other != name:
            pairs.append((other, name))
    remarks = [
        f"{shown(other)} and {shown(name)} are two classes; spell them alike if they are one"
        for other, name in pairs[:MOST]
    ]
    more = len(pairs) - MOST
    return [*remarks, f"{more:,} more classes look like another"] if more > 0 else remarks


def numbers(labels: Sequence[str], names: Sequence[str], column: str) -> list[int]:
    """The class number of each label; raises BadInput for a label that is not a class of the
    training rows.
    """
    code = {name: number for number, name in enumerate(names)}
    unseen = [label for label in labels if label not in code]
    if unseen:
        raise BadInput(
            f"expected only labels of the train set in the test set, found {shown(unseen[0])} in "
            f"column {column!r} of {counted(len(unseen), 'row')}; the train set has "
            f"{listed(map(shown, names))}; add such rows to it, or remove them from the test set"
        )
    return [code[label] for label in labels]
