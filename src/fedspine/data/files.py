"""Local data files: one file, or a folder whose file names tell the splits apart.

A folder may hold one file per split (`train.csv`, `test.csv`), shards
(`train-00000-of-00002.parquet`, `part-0.csv`), or a folder per split (`train/*.parquet`); any of
these may lie one level down, as in downloads from the Hugging Face Hub. It may also be one that
`save_to_disk` of `datasets` wrote.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput, listed, nearest, reason_of
from fedspine.data import arrow, json_rows, separated
from fedspine.data.decode import COMPRESSED, text_of
from fedspine.data.parts import Empty, FilePart, Pick, Read, Unreadable, counted, joined

SPLITS = {
    "train": "train", "training": "train", "trainset": "train",
    "test": "test", "testing": "test", "testset": "test", "holdout": "test", "heldout": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
}  # fmt: skip
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")  # the Hub once added a part of a digest
DEPTH = 3  # levels that are searched for data below a folder
_NUMBERED = re.compile(r"([a-z]*)[-_.]?\d+")  # part-00000-c000, 0000, data-00000-of-00002
METADATA = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",  # of `datasets`
    "config.json", "metadata.json", "dataset-metadata.json", "croissant.json", "datapackage.json",
)  # fmt: skip


def source(path: Path, encoding: str | None = None) -> dict[str, Read]:
    """A reader for each split at `path`, a file or folder: "train", and "test" or "validation"
    where they exist.

    A single file is all "train". `encoding` is that of text files which are not UTF-8. Raises
    BadInput for an unknown format or a folder without training files; a reader raises it for a file
    that cannot be read.
    """
    if path.is_dir() and (saved := _saved(path)):
        return saved
    if not path.is_dir() and not path.is_file():  # opening a pipe would block
        raise BadInput(f"expected a file or a folder, but {str(path)!r} is neither; name another")
    files = _in_folder(path) if path.is_dir() else {"train": [path]}
    beside = _not_read(files) if path.is_dir() else ()
    return {
        split: partial(_shards, shards, encoding, beside if split == "train" else ())
        for split, shards in files.items()
    }


def _not_read(files: Mapping[str, list[Path]]) -> tuple[str, ...]:
    """A remark on the data files that lie beside those of the splits and belong to none."""
    read = {path for paths in files.values() for path in paths}
    places = dict.fromkeys(path.parent for path in read)
    others = [other.name for place in places for other in _data_files(place) if other not in read]
    return (f"not read, as no split is named so: {listed(others)}",) if others else ()


def has_training_file(folder: Path) -> bool:
    """Whether a file or folder of rows is named after the training split, here or in `data/`."""
    within = [path for sub in (folder, folder / "data") for path in _data_files(sub)]
    return any(split_of(_stem(path)) == "train" for path in within) or bool(
        _saved(folder) or _folder_for_each_split(folder)
    )


def split_of(name: str) -> str | None:
    """The split that the first word of a file or split name stands for, or None.

    >>> split_of("dev"), split_of("train-00000-of-00002"), split_of("training_notes")
    ('validation', 'train', 'train')
    >>> split_of("trainer") is None
    True
    """
    return SPLITS.get(re.split(r"[-_.]", name.lower(), maxsplit=1)[0])


def format_of(path: Path) -> str:
    """The last suffix of a file name apart from that of its compression, in lower case; "" if there
    is none.

    >>> format_of(Path("train.CSV.gz")), format_of(Path("rows.parquet"))
    ('.csv', '.parquet')
    """
    return Path(_without_compression(path)).suffix.lower()


def _without_compression(path: Path) -> str:
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def _stem(path: Path) -> str:
    return Path(_without_compression(path)).stem


# --- folders ---


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    if by_folder := _folder_for_each_split(folder):
        return by_folder
    found = _data_files(folder)
    if not found and (found := _partitions(folder)):
        return {"train": _of_one_split("train", found)}
    if not found:
        below = [sub for sub in _folders(folder) if _holds_data(sub)]
        named = [sub for sub in below if sub.name == "data"] or below
        if len(named) == 1:
            return _in_folder(named[0])
        several = f"found {listed(f'{sub.name}/' for sub in below)}; name one of these folders"
        raise BadInput(
            f"expected data files ({_formats()}) in the folder {str(folder)!r}, "
            + (
                several
                if below
                else "found none; put train.* and test.* there, or name another folder"
                + (f" (this one has {listed(names)})" if (names := _names(folder)) else "")
            )
        )
    splits = _by_name(found, lambda path: split_of(_stem(path)))
    if "train" not in splits:
        splits = _by_name(found, _split_within) or splits
    if not splits and (len(found) == 1 or _are_shards(found)):
        return {"train": _of_one_split("train", found)}
    if "train" not in splits:
        raise BadInput(
            f"expected a file train.* in the folder {str(folder)!r}, "
            f"found {listed(path.name for path in found)}; name the training file train.*, or name "
            "one file"
        )
    return {split: _of_one_split(split, paths) for split, paths in splits.items()}


def _holds_data(folder: Path, depth: int = DEPTH) -> bool:
    """Whether there are data files in a folder or some levels below it."""
    below = (_holds_data(sub, depth - 1) for sub in (_folders(folder) if depth else ()))
    return bool(_data_files(folder)) or any(below)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def _folder_for_each_split(folder: Path) -> dict[str, list[Path]]:
    """The files of train/, test/ and validation/, all of them shards of their split; empty without
    train/.
    """
    splits: dict[str, list[Path]] = {}
    for sub in _folders(folder):
        split = SPLITS.get(sub.name.lower())
        if split and (found := _data_files(sub) or _partitions(sub)):
            if split in splits:
                raise BadInput(
                    f"expected one folder for the {split} split in {str(folder)!r}, found "
                    f"{splits[split][0].parent.name} and {sub.name}; keep one of them"
                )
            splits[split] = found
    if "train" not in splits:
        return {}
    return {split: _of_one_split(split, paths) for split, paths in splits.items()}


def _partitions(folder: Path) -> list[Path]:
    """The files in folders such as lang=de, one for each value of a column, as Spark writes them;
    empty where there are others.
    """
    subs = _folders(folder)
    if not all("=" in sub.name for sub in subs):
        return []
    return [path for sub in subs for path in _data_files(sub) or _partitions(sub)]


def _by_name(found: list[Path], split: Callable[[Path], str | None]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in found:
        if name := split(path):
            splits.setdefault(name, []).append(path)
    return splits


def _split_within(path: Path) -> str | None:
    """The split that a word of the name stands for, if there is only one: reviews_train."""
    words = {SPLITS[word] for word in re.split(r"[-_.]", _stem(path).lower()) if word in SPLITS}
    return words.pop() if len(words) == 1 else None


def _are_shards(found: list[Path]) -> bool:
    """Whether all names are numbers, after the same word if any: part-0, part-1; 0000, 0001."""
    matches = [_NUMBERED.match(_stem(path).lower()) for path in found]
    return all(matches) and len({match[1] for match in matches if match}) == 1


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!._]*") if path.is_dir())


def _data_files(folder: Path) -> list[Path]:
    """Sorted by name, with numbers by value: part-2 before part-10."""
    found = [
        path
        for path in folder.glob("[!._~]*")
        # a dangling link is refused when it is read, not skipped
        if (path.is_file() or not path.exists())
        and format_of(path) in READERS
        and path.name not in METADATA
    ]
    return sorted(
        found,
        key=lambda path: [
            (len(n), n) if n.isdigit() else (0, n) for n in re.split(r"(\d+)", path.name)
        ],
    )


def _of_one_split(split: str, paths: list[Path]) -> list[Path]:
    # a file named exactly after the split is the whole split; others (train_old.csv) are ignored
    exact = [path for path in paths if _stem(path).lower() in SPLITS]
    chosen = exact or paths
    shards = [match for path in chosen if (match := _SHARD.search(_stem(path)))]
    names = listed(path.name for path in chosen)
    if exact[1:] or len({format_of(path) for path in chosen}) > 1:
        raise BadInput(
            f"expected one file or one set of shards for the {split} split, found {names}; keep "
            "one of them"
        )
    if shards and (
        len(shards) < len(chosen) or any(int(match[2]) != len(chosen) for match in shards)
    ):
        raise BadInput(
            f"expected all {int(shards[0][2])} shards of the {split} split and nothing else, "
            f"found {len(chosen)} files ({names}); add the missing ones and remove the rest"
        )
    return chosen


# --- what `save_to_disk` writes ---


def _saved(folder: Path) -> dict[str, Read]:
    """A reader for each split of a folder that `save_to_disk` of `datasets` wrote; empty for any
    other folder.
    """
    if (folder / "dataset_dict.json").is_file():
        named = _metadata(folder / "dataset_dict.json").get("splits")
        known = {split_of(str(name)): folder / str(name) for name in named or ()}
        splits = {split: sub for split, sub in known.items() if split is not None}
        others = [name for name in named or () if split_of(str(name)) is None]
        beside = (f"not read, as no split is named so: {listed(others)}",) if others else ()
        if "train" not in splits:
            raise BadInput(
                f"expected a split 'train' in {str(folder)!r}, found {listed(named or ['none'])}; "
                "name the folder of one of them"
            )
        return {
            split: partial(_saved_split, sub, beside if split == "train" else ())
            for split, sub in splits.items()
        }
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": partial(_saved_split, folder, ())}
    return {}


def _saved_split(folder: Path, notes: tuple[str, ...], pick: Pick) -> FilePart:
    state, info = _metadata(folder / "state.json"), _metadata(folder / "dataset_info.json")
    if state.get("_indices_data_files"):
        raise BadInput(
            f"{str(folder)!r} selects its rows by an index mapping; call flatten_indices() before "
            "save_to_disk"
        )
    if state.get("_data_files") == []:
        return FilePart(columns={}, rows=0)  # a split without rows
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        files = []
    features = info.get("features")
    features = features if isinstance(features, Mapping) else {}
    if not files or (missing := [path.name for path in files if not path.is_file()]):
        names = listed(missing) if files else "names"
        raise BadInput(
            f"expected the files that state.json of {str(folder)!r} names, found no {names}; save "
            "the data again"
        )
    found = joined(
        [_readable(path, lambda path: arrow.ipc(path, pick, features), path) for path in files]
    )
    return replace(found, notes=(*found.notes, *notes))


def _metadata(path: Path) -> dict[str, Any]:
    def read(path: Path) -> dict[str, Any]:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        return found

    return _readable(path, read, path)


# --- files ---


def _shards(
    paths: list[Path], encoding: str | None, notes: tuple[str, ...], pick: Pick
) -> FilePart:
    found = [part for path in paths if (part := _file(path, encoding, pick, bool(paths[1:])))]
    if not found:  # all of several
        return FilePart(columns={}, rows=0)
    whole = joined(found)
    if empty := len(paths) - len(found):
        notes = (*notes, f"{counted(empty, 'shard')} of {len(paths)} without a header or a row")
    return replace(whole, notes=(*whole.notes, *notes))


def _file(path: Path, encoding: str | None, pick: Pick, is_shard: bool) -> FilePart | None:
    """The rows of a file; None for a shard without any."""
    form = format_of(path)
    if form not in READERS or (form in BINARY and path.suffix.lower() in COMPRESSED):
        suffix = path.suffix.lower()
        guess = nearest(suffix, READERS, alike=0.7)  # with less, .txt would be .tsv
        hint = f"did you mean {guess!r}? known: " if guess else "save it as one of "
        raise BadInput(f"unknown file format of {path.name!r}: {suffix!r}; {hint}{_formats()}")
    return _readable(path, READERS[form], path, encoding, pick, is_shard=is_shard)


def _readable(path: Path, read: Callable[..., Any], *arguments: Any, is_shard: bool = False) -> Any:
    try:
        return read(*arguments)
    except BadInput:
        raise
    except Unreadable as error:
        if is_shard and isinstance(error, Empty):
            return None
        raise BadInput(
            f"cannot read {str(path)!r} as {_format_name(path)}: {error}; {error.do}"
        ) from None
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        # pyarrow's errors derive from these
        raise BadInput(
            f"cannot read {str(path)!r} as {_format_name(path)}: {reason_of(error)}; "
            "repair the file or save it again"
        ) from error


def _format_name(path: Path) -> str:
    return format_of(path).removeprefix(".")


def _separated(path: Path, encoding: str | None, pick: Pick) -> FilePart:
    found = separated.part(text_of(path, encoding), format_of(path), pick)
    return replace(found, notes=tuple(f"{path.name}: {note}" for note in found.notes))


def _json(path: Path, encoding: str | None, pick: Pick) -> FilePart:
    return json_rows.part(text_of(path, encoding), pick)


def _formats() -> str:
    return ", ".join(sorted(READERS))


READERS: dict[str, Callable[[Path, str | None, Pick], FilePart]] = {
    ".parquet": lambda path, _encoding, pick: arrow.parquet(path, pick),
    ".arrow": lambda path, _encoding, pick: arrow.ipc(path, pick),
    ".csv": _separated,
    ".tsv": _separated,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
}
BINARY = (".parquet", ".arrow")
