"""Local data files as Arrow tables: one file, or a folder whose file names say which split they hold.

A folder may hold one file per split (`train.csv`, `test.csv`), shards (`train-00000-of-00002.parquet`), or either of
them one level down in `data/`, as downloads from the Hugging Face Hub do.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from fedspine.errors import BadInput, unknown

SPLITS = {
    "train": "train", "training": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_LARGEST_BLOCK = 2**30  # bytes; Arrow counts them in 32 bits
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


def read(path: Path, strings: Sequence[str]) -> dict[str, pa.Table]:
    """The tables at `path`, an existing file or folder, by split: "train", and "test" or "validation" where they exist.

    A single file is all "train". The columns named in `strings` are read as text even where a CSV file holds only
    numbers in them. Raises BadInput for an unknown format, an unreadable file, or a folder without training files.
    """
    files = _in_folder(path) if path.is_dir() else {"train": [path]}
    return {split: _table(shards, strings) for split, shards in files.items()}


def split_of(name: str) -> str | None:
    """The split that a file or split name stands for, or None.

    >>> split_of("dev"), split_of("train-00000-of-00002"), split_of("training_notes")
    ('validation', 'train', 'train')
    >>> split_of("trainer") is None
    True
    """
    return SPLITS.get(re.split(r"[-_.]", name.lower(), maxsplit=1)[0])


def one_line(error: Exception) -> str:
    """The message of another library's error, in one line and at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    found = _data_files(folder) or _data_files(folder / "data")
    if not found:
        raise BadInput(
            f"expected data files ({_formats()}) in the folder {str(folder)!r}, found none; "
            "put train.* and test.* there, or name another folder"
        )
    splits: dict[str, list[Path]] = {}
    for path in found:
        if split := split_of(path.stem):
            splits.setdefault(split, []).append(path)
    if not splits and len(found) == 1:
        return {"train": found}
    if "train" not in splits:
        raise BadInput(
            f"expected a file train.* in the folder {str(folder)!r}, "
            f"found {', '.join(path.name for path in found[:8])}; name the training file train.*, or name one file"
        )
    return {split: _of_one_split(split, paths) for split, paths in splits.items()}


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("[!.]*") if path.is_file() and path.suffix.lower() in READERS
    )


def _of_one_split(split: str, paths: list[Path]) -> list[Path]:
    # A file named exactly after the split is the split: what lies beside it (train_old.csv) is something else.
    exact = [path for path in paths if path.stem.lower() in SPLITS]
    chosen = exact or paths
    shards = [match for path in chosen if (match := _SHARD.search(path.stem))]
    names = ", ".join(path.name for path in chosen[:8])
    if exact[1:] or len({path.suffix.lower() for path in chosen}) > 1:
        raise BadInput(
            f"expected one file or one set of shards for the {split} split, found {names}; keep one of them"
        )
    if shards and (
        len(shards) < len(chosen) or any(int(match[2]) != len(chosen) for match in shards)
    ):
        raise BadInput(
            f"expected all {int(shards[0][2])} shards of the {split} split and nothing else, "
            f"found {len(chosen)} files ({names}); fetch what is missing and remove the rest"
        )
    return chosen


def _table(paths: list[Path], strings: Sequence[str]) -> pa.Table:
    tables = []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise unknown(f"file format of {path.name!r}:", suffix, READERS)
        try:
            table = READERS[suffix](path, strings)
            table.validate(full=True)  # not every reader checks that strings are UTF-8
        except (
            OSError,
            ValueError,
            KeyError,
            NotImplementedError,
        ) as error:  # pyarrow's own errors are among these
            raise BadInput(
                f"cannot read {str(path)!r} as {suffix[1:]}: {one_line(error)}; repair the file or write it again"
            ) from error
        tables.append(table)
    if not tables[1:]:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInput(
            f"expected the same columns in every shard, {paths[0].name} to {paths[-1].name}: {one_line(error)}; "
            "write the shards again from one table"
        ) from error


def _parquet(path: Path, strings: Sequence[str]) -> pa.Table:
    # One file and not Arrow's data set reader, which would take folders named key=value for columns.
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()


def _separated(delimiter: str) -> Callable[[Path, Sequence[str]], pa.Table]:
    def read_separated(path: Path, strings: Sequence[str]) -> pa.Table:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=_one_block(path.stat().st_size)),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(strings, pa.string())
            ),
        )

    return read_separated


def _json(path: Path, strings: Sequence[str]) -> pa.Table:
    data = path.read_bytes()
    if data.lstrip()[:1] == b"[":  # one JSON list of objects instead of one object a line
        data = "\n".join(json.dumps(row) for row in json.loads(data)).encode()
    options = pyarrow.json.ReadOptions(block_size=_one_block(len(data)))
    return pyarrow.json.read_json(io.BytesIO(data), read_options=options)


def _one_block(file_bytes: int) -> int:
    # Arrow's own megabyte refuses the file where one row, a whole book say, is longer than that.
    return min(max(file_bytes, 1), _LARGEST_BLOCK)


def _formats() -> str:
    return ", ".join(sorted(READERS))


READERS: dict[str, Callable[[Path, Sequence[str]], pa.Table]] = {
    ".parquet": _parquet,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
}
