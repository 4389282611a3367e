"""Arrow tables as rows: Parquet, the Arrow files of `datasets`, and data sets of the Hugging Face
Hub.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from fedspine.data.parts import FilePart, Pick, composed, trimmed


def parquet(path: Path, pick: Pick) -> FilePart:
    """The picked columns of a Parquet file."""
    # one file, since Arrow's data set reader would turn folders named key=value into columns
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = {names[place] for place in pick(names).values()}
        nested = any("." in name for name in wanted)  # Parquet reads a dot as a path
        return part(file.read(None if nested else sorted(wanted)), pick, names)


def ipc(path: Path, pick: Pick, features: Mapping[str, Any] | None = None) -> FilePart:
    """The picked columns of an Arrow file or stream; `features` are what `datasets` stored beside
    it, if anything.
    """
    with pa.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pyarrow.ipc.open_file(source).read_all()
        return part(table, pick, features=features)


def part(
    table: pa.Table,
    pick: Pick,
    names: Sequence[str] | None = None,
    features: Mapping[str, Any] | None = None,
) -> FilePart:
    """The picked columns of a table; `names` are all columns of its file, if it holds only some of
    them.
    """
    names = table.schema.names if names is None else names
    metadata = table.schema.metadata or {}
    if features is None:
        features = {}
        with suppress(ValueError, KeyError, TypeError):  # anyone may write metadata
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
    general: Any = None
    with suppress(ValueError, KeyError):
        general = json.loads(metadata[b"label_names"])
    picked = {name: names[place] for name, place in pick(names).items()}
    return FilePart(
        columns={name: _values(table.column(column)) for name, column in picked.items()},
        rows=table.num_rows,
        types={
            name: textwrap.shorten(str(_plain(table.column(column)).type), 60, placeholder="...")
            for name, column in picked.items()
        },
        stated={
            name: _class_names(general if general is not None else _names(features, column))
            for name, column in picked.items()
            if _is_number(table.column(column))
        },
    )


def _is_number(column: pa.ChunkedArray) -> bool:
    kind = _plain(column).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _names(features: Any, column: str) -> Any:
    with suppress(KeyError, TypeError):
        return features[column]["names"]
    return None


def _class_names(names: Any) -> tuple[str, ...]:
    """The names trimmed and composed, as all labels are; empty unless they are a list
    of distinct strings.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    stripped = tuple(composed(trimmed(name)) for name in names)
    return stripped if len(set(stripped)) == len(names) and all(stripped) else ()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """One Python value per row: string, number, boolean, list or struct; times as strings."""
    column = _plain(column)
    column.validate(full=True)  # no reader checks that strings are UTF-8
    kind = column.type
    if pa.types.is_timestamp(kind):
        moments = column.cast(pa.timestamp("us"), safe=False).to_pylist()
        days = all(moment is None or moment.time() == time() for moment in moments)
        return [
            None if moment is None else str(moment.date() if days else moment) for moment in moments
        ]
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_decimal(kind):
        return [None if value is None else str(value) for value in column.to_pylist()]
    return column.to_pylist()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with dictionaries decoded, and bytes read as strings where they are UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        column = column.cast(pa.binary())
        kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        with suppress(pa.ArrowInvalid):
            return column.cast(pa.string() if pa.types.is_binary(kind) else pa.large_string())
    return column
