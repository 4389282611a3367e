"""Checked values from the columns of a file: which columns are read, which rows are left out, and
what is refused.
"""

import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedspine.core.errors import BadInput, listed, nearest
from fedspine.data import turns
from fedspine.data.parts import FilePart, Pick, composed, counted, shown, trimmed

NO_LABEL, NO_TEXT, NO_PAIR = "no label", "no text", "no second text"  # why a row is left out
NONE = {"-1", "-1.0"}  # how benchmarks mark a withheld label


@dataclass(frozen=True)
class Wanted:
    """The role of each column; `label` is None for language modelling, `pair` without sentence
    pairs. With `answers`, conversations are read as dialogues.
    """

    text: str
    pair: str | None
    label: str | None
    others: tuple[str, ...]
    answers: bool = False


@dataclass(frozen=True)
class Values:
    """Rows whose labels have no class numbers yet: strings, integers, floats or booleans.

    `left_out` counts the rows left out, by reason; `stated` are the class names that integers stand
    for.
    """

    split: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None
    columns: dict[str, list[str]]
    left_out: Counter[str]
    stated: tuple[str, ...]
    notes: tuple[str, ...]
    dialogues: list[Any] | None = None  # a `Dialogue` for each row that is kept

    def take(self, rows: Iterable[int]) -> "Values":
        """The same columns with only the given rows, in the given order."""

        def pick(values: list | None) -> list | None:
            return None if values is None else [values[row] for row in chosen]

        chosen = list(rows)
        return replace(
            self,
            texts=pick(self.texts),
            pairs=pick(self.pairs),
            labels=pick(self.labels),
            dialogues=pick(self.dialogues),
            columns={name: pick(values) for name, values in self.columns.items()},
        )


# --- which columns ---


def picker(wanted: Wanted, split: str) -> Pick:
    """A function that finds the wanted columns in a file; names that look the same are the same.

    It raises BadInput for a missing or repeated column. Without a column "text", language modelling
    reads "messages", or a prompt and an answer: `turns.columns`.
    """

    def pick(names: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for role, name in (
            ("text", wanted.text),
            ("pair", wanted.pair),
            ("label", wanted.label),
            *(("group", other) for other in wanted.others),
        ):
            if name is None:
                continue
            places = _places(name, names)
            may_be_turns = role == "text" and wanted.label is None and name == "text"
            if not places and may_be_turns and (of_turns := turns.columns(names)):
                found |= {part: _places(part, names)[0] for part in of_turns}
                continue
            # Only a partition reads the other columns, and only training rows are partitioned.
            if not places and role == "group" and split != "train":
                continue
            if len(places) != 1:
                raise _not_one(role, name, names, split, places)
            found[name] = places[0]
        return found

    return pick


def _places(name: str, names: Sequence[str]) -> list[int]:
    exact = [place for place, other in enumerate(names) if other == name]
    alike = [place for place, other in enumerate(names) if _bare(other) == _bare(name)]
    return exact or alike


def _bare(name: str) -> str:
    """A name without invisible characters, and without quotes around it.

    >>> _bare('\ufeff"label" ')
    'label'
    """
    seen = unicodedata.normalize("NFKC", name)
    return "".join(c for c in seen if unicodedata.category(c) != "Cf").strip(' \t"')


def _not_one(role: str, name: str, names: Sequence[str], split: str, places: list[int]) -> BadInput:
    here = listed(_short(column) or "''" for column in names) or "none"
    if places:
        apart = "" if name in names else ", which differ only in white space"
        return BadInput(
            f"expected one column {name!r} in the {split} set, found several{apart} ({here}); "
            "rename all but one"
        )
    guess = nearest(name, names)
    foreign = name.isascii() and guess is not None and not guess.isascii()
    if len(names) == 1 and name in names[0]:
        hint = "separate values by commas, semicolons, tabs or vertical bars"
    elif guess:
        hint = f"did you mean {_short(guess)!r}?"
        if foreign:  # a letter of another alphabet may look the same
            hint = f"did you mean {_short(guess)!r}, which is {_short(guess)!a}?"
    elif role == "label" and (turns.columns(names) or len(names) == 1):
        hint = 'name the label column, or set task.kind = "causal-lm" for language modelling'
    elif role == "group":
        hint = 'name another column in fleet.partition = "column:NAME"'
    else:
        hint = f"name the {role} column as task.{role}, or give the file a header"
    return BadInput(
        f"expected the {role} column {name!r} in the {split} set, found the columns {here}; {hint}"
    )


def _short(column: str) -> str:
    # without a header, the cells of the first row are read as column names, long texts included
    return textwrap.shorten(column, 40, placeholder="...")


# --- which rows ---


def checked(part: FilePart, wanted: Wanted, split: str, stated: Sequence[str] = ()) -> Values:
    """The wanted columns of `part`, the rows of the split named `split` ("train" or "test").

    Rows without a text or a label are left out and counted; white space alone is not a text.
    `stated` are class names of another split, used if this one states none. Raises BadInput for a
    column of the wrong type, for a split without rows, and for a missing value in a column that a
    partition reads.
    """
    if part.rows == 0:
        raise BadInput(f"expected rows in the {split} set, found none; give a file that has rows")
    names = part.stated.get(wanted.label or "", ()) or tuple(stated)
    if wanted.text in part.columns:
        texts = _strings(part, wanted.text, split)
    else:
        turns.refuse_others(part, split)
        texts = turns.texts(part)
        _refuse_surrogates(texts, f"the {split} set")
    pairs = None if wanted.pair is None else _strings(part, wanted.pair, split)
    labels = None if wanted.label is None else _labels(part, wanted.label, split, names)
    dialogues = turns.dialogues(part, wanted.text, split) if wanted.answers else None
    kept, left_out = [], Counter[str]()
    for row in range(part.rows):
        if labels is not None and labels[row] is None:
            left_out[NO_LABEL] += 1
        elif dialogues is not None and isinstance(dialogues[row], str):
            left_out[dialogues[row]] += 1
        elif texts[row] is None:
            left_out[NO_TEXT] += 1
        elif pairs is not None and pairs[row] is None:
            left_out[NO_PAIR] += 1
        else:
            kept.append(row)
    if not kept:
        reasons = " and ".join(f"{count:,} with {reason}" for reason, count in left_out.items())
        roles = turns.roles(part, wanted.text) if left_out[turns.NO_ANSWER] else ()
        reasons += f" (roles: {listed(map(shown, roles))}; 'assistant' answers)" * bool(roles)
        instead = ', or set task.loss_on = "texts"' if left_out[turns.NO_ANSWER] else ""
        raise BadInput(
            f"expected usable rows in the {split} set, found only {reasons}; fill them in, or name "
            f"other columns{instead}"
        )
    groups = {
        name: _group_names(part.columns[name], name, split)
        for name in wanted.others
        if name in part.columns
    }
    notes = part.notes
    if dialogues is not None and (unread := turns.unread(part, wanted.text)):
        of = f"{counted(unread, 'message')} of the {split} set"
        notes = (*notes, f"{of} without a text, such as calls of tools, left out of their rows")
    found = Values(split, texts, pairs, labels, groups, left_out, names, notes, dialogues)
    return _bare_labels(found.take(kept) if left_out else found, left_out)


def _bare_labels(found: Values, left_out: Counter[str]) -> Values:
    """The values with labels trimmed and composed, and a note where that changed any."""
    labels, notes = found.labels, found.notes
    if labels is not None:
        trims = [trimmed(label) if isinstance(label, str) else label for label in labels]
        of = f"of the {found.split} set"
        if spaced := sum(new != old for new, old in zip(trims, labels, strict=True)):
            notes = (*notes, f"white space around {counted(spaced, 'label')} {of} is ignored")
        labels = [composed(label) if isinstance(label, str) else label for label in trims]
        if apart := sum(new != old for new, old in zip(labels, trims, strict=True)):
            what = f"{counted(apart, 'label')} {of}"
            notes = (*notes, f"letters and accents of {what} are read as one character (NFC)")
    return replace(found, labels=labels, notes=notes, left_out=left_out)


def hidden(part: FilePart, label: str | None, known: Iterable[Any]) -> bool:
    """Whether a split withholds its labels: all are missing, or -1 where -1 is not a `known` label.

    Test sets of public benchmarks often do; the validation set is then used for testing.
    """
    if label is None or not part.rows:
        return False
    values = {str(value).strip() for value in part.columns[label] if not _is_absent(value)}
    return not values or (values <= NONE and NONE.isdisjoint(map(str, known)))


def _strings(part: FilePart, name: str, split: str) -> list[str | None]:
    """The strings of a column, None where one is missing; numbers become strings if the file has no
    types.
    """
    values = part.columns[name]
    if all(value is None or isinstance(value, str) for value in values):
        found = values
    elif name in part.types or not all(isinstance(v, str | int | float | None) for v in values):
        if turns.are_messages(values):
            found = turns.of_messages(values)
        else:
            kind = part.types.get(name) or _kind(values)
            raise BadInput(
                f"expected strings in column {name!r} of the {split} set, found {kind}; name a "
                "text column"
            )
    else:
        found = [None if _is_absent(value) else _written(value) for value in values]
    found = [value if value is None or trimmed(value) else None for value in found]
    _refuse_surrogates(found, f"column {name!r} of the {split} set")
    return found


def _refuse_surrogates(values: Iterable[Any], where: str) -> None:
    """Raise BadInput for half a character, which nothing can write."""
    try:
        "".join(value for value in values if isinstance(value, str)).encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"expected text in {where}, found an unpaired surrogate "
            f"({error.object[error.start : error.start + 1]!r}); save the file again"
        ) from None


def _labels(part: FilePart, name: str, split: str, stated: Sequence[str]) -> list[Any]:
    values = part.columns[name]
    if not all(isinstance(value, str | int | float | None) for value in values):
        kind = part.types.get(name) or _kind(values)
        raise BadInput(
            f"expected strings, numbers or booleans in column {name!r} of the {split} set, found "
            f"{kind}; name a label column"
        )
    _refuse_surrogates(values, f"column {name!r} of the {split} set")
    return [None if _is_absent(value) or (stated and value == -1) else value for value in values]


def _written(value: float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(values: Sequence[Any]) -> str:
    """The type of the first value that is neither a string nor a number, in words."""
    other = next(value for value in values if not isinstance(value, str | int | float | None))
    return {"list": "a list", "dict": "an object"}.get(type(other).__name__, type(other).__name__)


def _is_absent(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not trimmed(value))


def _group_names(values: list[Any], name: str, split: str) -> list[str]:
    absent = [row for row, value in enumerate(values, start=1) if _is_absent(value)]
    if absent and split == "train":
        raise BadInput(
            f"expected a group in column {name!r} of every row, found {len(absent)} empty in the "
            f"{split} set, the first in row {absent[0]} (counted from 1); fill them in or remove "
            "the rows"
        )
    _refuse_surrogates(values, f"column {name!r} of the {split} set")
    return [_group(value) for value in values]


def _group(value: Any) -> str:
    """The name of a group, by which 1 and 1.0 are one, as they are one label."""
    if isinstance(value, str):
        return composed(trimmed(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
