"""From a table to checked values: which columns are read, and what is refused in them."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from fedspine.errors import BadInput, nearest


@dataclass(frozen=True)
class Wanted:
    """Which columns are read as what; `label` is None for language modelling, `pair` unless there are pairs."""

    text: str
    pair: str | None
    label: str | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class Values:
    """Rows before the labels have their numbers; `labels` holds ints, bools or strings."""

    split: str
    texts: list[str]
    pairs: list[str] | None
    labels: list | None
    columns: dict[str, list[str]]

    def take(self, rows: Iterable[int]) -> "Values":
        """The same columns with only the given rows, in the given order."""

        def pick(values: list | None) -> list | None:
            return None if values is None else [values[row] for row in chosen]

        chosen = list(rows)
        columns = {name: pick(values) for name, values in self.columns.items()}
        return Values(self.split, pick(self.texts), pick(self.pairs), pick(self.labels), columns)


def checked(table: pa.Table, wanted: Wanted, split: str) -> Values:
    """The wanted columns of `table`, the rows of the split named `split` ("train" or "test").

    Raises BadInput for a column that is absent, twice there or of another type, for no rows, and for an empty text or
    label (null and white space count as empty).
    """
    # Only a partition reads the other columns, and only training rows are partitioned.
    others = (
        wanted.others
        if split == "train"
        else [name for name in wanted.others if name in table.schema.names]
    )
    needed = (
        ("text", wanted.text),
        ("pair", wanted.pair),
        ("label", wanted.label),
        *(("group", o) for o in others),
    )
    for role, name in needed:
        if name is not None and table.schema.names.count(name) != 1:
            raise _no_column(role, name, table.schema.names, split)
    if table.num_rows == 0:
        raise BadInput(f"expected rows in the {split} set, found none; give a file that has rows")
    return Values(
        split,
        _strings(table, wanted.text, split),
        None if wanted.pair is None else _strings(table, wanted.pair, split),
        None if wanted.label is None else _labels(table, wanted.label, split),
        {name: _group_names(table, name, split) for name in others},
    )


def _no_column(role: str, name: str, columns: list[str], split: str) -> BadInput:
    here = ", ".join(_short(column) for column in columns[:20])
    if name in columns:
        return BadInput(
            f"expected one column {name!r} in the {split} set, found several ({here}); rename all but one"
        )
    guess = nearest(name, columns)
    hint = (
        f"did you mean {_short(guess)!r}?"
        if guess
        else f"name the {role} column, or give the file a header"
    )
    return BadInput(
        f"expected the {role} column {name!r} in the {split} set, found the columns {here}; {hint}"
    )


def _short(column: str) -> str:
    # A file without a header has a whole first row, texts and all, for column names.
    return textwrap.shorten(column, 40, placeholder="...")


def _strings(table: pa.Table, name: str, split: str) -> list[str]:
    column = _plain(table[name])
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise BadInput(
            f"expected strings in column {name!r} of the {split} set, found {column.type}; name a text column"
        )
    values = column.to_pylist()
    empty = [row for row, value in enumerate(values, start=1) if value is None or not value.strip()]
    if empty:
        raise _missing("text", name, empty, split)
    return values


def _labels(table: pa.Table, name: str, split: str) -> list:
    column = _plain(table[name])
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    if not (is_number or _is_text(kind) or pa.types.is_null(kind)):
        raise BadInput(
            f"expected whole numbers, true/false or strings in column {name!r} of the {split} set, found {kind}; "
            "name a label column"
        )
    values = column.to_pylist()
    absent = [row for row, value in enumerate(values, start=1) if _is_absent(value)]
    if absent:
        raise _missing("label", name, absent, split)
    if not pa.types.is_floating(kind):
        return values
    # Other tools write whole numbers as floats once a single value was missing on the way.
    if broken := next((value for value in values if not float(value).is_integer()), None):
        raise BadInput(
            f"expected classes in column {name!r} of the {split} set, found {broken}; name a label column"
        )
    return [int(value) for value in values]


def _is_absent(value: float | str | None) -> bool:
    return (
        value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    )


def _group_names(table: pa.Table, name: str, split: str) -> list[str]:
    values = table[name].to_pylist()
    absent = [row for row, value in enumerate(values, start=1) if value is None]
    if absent and split == "train":
        raise _missing("group", name, absent, split)
    return [str(value) for value in values]


def _missing(what: str, name: str, rows: list[int], split: str) -> BadInput:
    return BadInput(
        f"expected a {what} in column {name!r} of every row, found {len(rows)} empty in the {split} set, "
        f"the first in row {rows[0]} (counted from 1); fill or remove them"
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
