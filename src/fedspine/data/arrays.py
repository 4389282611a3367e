"""Arrays as a data set: labelled images, sensor windows or audio clips, read and checked once.

Data is an `.npz` file with `x`, `y` and, optionally, `label_names`; a folder with `train.npz` and
`test.npz`; or a folder with one sub-folder per class (`fedspine.data.class_folders`). Pickled data
is never read. Every error in the data is reported here, as a `BadInput`, so later code does not
check values or labels again; each net checks the shapes that it reads.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from fedspine.core.errors import REASON, BadInput, listed, one_line, reason_of
from fedspine.core.task import BUILT_IN_DATA
from fedspine.data import class_folders
from fedspine.data.classes import look_alike, refuse_too_many
from fedspine.data.columns import NO_LABEL
from fedspine.data.dataset import ArrayRows, Dataset, held_out
from fedspine.data.files import has_training_file, split_of
from fedspine.data.parts import composed, trimmed

HOW = "np.savez(path, x=..., y=...)"


@dataclass(frozen=True)
class Raw:
    """One split as read from `where`, before any check."""

    where: str
    x: np.ndarray
    y: np.ndarray
    names: tuple[str, ...]  # of the classes, where the data states them
    columns: Mapping[str, np.ndarray]
    left_out: int = 0  # rows without a label, which are left out of these


def is_arrays(data: str) -> bool:
    """Whether `data` can only be arrays: an `.npz` file, or a folder of them.

    >>> is_arrays("pydoc-topics")
    False
    """
    if not data.strip():  # an empty path is the current folder
        return False
    path = Path(os.path.expanduser(data))
    if not path.is_dir():
        return path.suffix.lower() == ".npz"
    if _npz_files(path):
        return True
    # a download from the Hub may have images of its own beside its tables
    return class_folders.is_one(path) and not has_training_file(path)


def load(data: str, *, group: str | None = None) -> Dataset:
    """The arrays at the path `data`; `group` names one more array, [rows], to keep for a partition.

    Without test rows, a random fifth of the training rows (fixed seed) is held out. Rows whose
    label is NaN or an empty string are left out and counted. Floats are returned as float32 at any
    scale, uint8 unchanged. Raises BadInput for data that cannot be found, read or used.
    """
    splits = {split: _checked(raw, group) for split, raw in read_splits(data, group).items()}
    train, test = splits["train"], splits.get("test", splits.get("validation"))
    names, code = _classes(train)
    rows = _coded(train, code)
    if test is None:
        kept, held = held_out(rows.labels, len(rows))
        of_train, of_test = rows.take(kept), rows.take(held)
    else:
        _same_kind(train, test)
        of_train, of_test = rows, _coded(test, code)
    left = train.left_out + (0 if test is None else test.left_out)
    return Dataset(
        name=data,
        train=of_train,
        test=of_test,
        label_names=names,
        natural=None,
        left_out={NO_LABEL: left} if left else {},
        notes=tuple(look_alike(names)),
    )


def row_of(data: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one training row, from the file headers where they state it.

    Raises BadInput for data that cannot be found or read.
    """
    path = Path(os.path.expanduser(data))
    if path.is_file():
        found = _header(path)
    elif path.is_dir() and (files := _npz_files(path)):
        found = _header(_by_split(path, files)["train"])
    else:
        found = class_folders.row_of(path) if path.is_dir() else None
    if found is None:  # `load` reports what is wrong with the data
        x = load(data).train.x
        return x.shape[1:], x.dtype
    return found


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype of one row of `x` in an .npz file; None if its header does not state them."""
    readers = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as file, file.open("x.npy") as member:
            shape, _, type = readers[read_magic(member)](member)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return (shape[1:], type) if len(shape) > 1 else None


# --- finding and reading ---


def read_splits(data: str, group: str | None = None, *, labelled: bool = True) -> dict[str, Raw]:
    """The splits of `data` as they are in its files, unchecked; without `labelled`, `y` may be
    missing from a file, whose rows then have empty labels.

    Raises BadInput for data that cannot be found or read.
    """
    if data in BUILT_IN_DATA:
        raise BadInput(
            f"{data!r} is text, but a net reads arrays; name an .npz file or a folder as task.data"
        )
    path = Path(os.path.expanduser(data))
    if not os.path.exists(path):
        raise BadInput(
            f"expected arrays at {data!r}, found nothing there; name an .npz file or a folder as "
            "task.data"
        )
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise BadInput(
                f"expected an .npz file or a folder of arrays, got {path.name!r}; write it with "
                f"{HOW}"
            )
        return {"train": _read(path, group, labelled)}
    files = _npz_files(path)
    if files:
        return {
            split: _read(file, group, labelled) for split, file in _by_split(path, files).items()
        }
    return {
        split: Raw(where=str(folder), x=x, y=y, names=(), columns={})
        for split, folder, x, y in class_folders.read(path)
    }


def _npz_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*.npz") if path.is_file())


def _by_split(folder: Path, files: list[Path]) -> dict[str, Path]:
    splits = {split: file for file in files if (split := split_of(file.stem))}
    if not splits and len(files) == 1:
        return {"train": files[0]}
    if "train" not in splits:
        raise BadInput(
            f"expected train.npz in the folder {str(folder)!r}, found "
            f"{listed(file.name for file in files)}; "
            "name the training file train.npz, or name one file"
        )
    return splits


def _read(path: Path, group: str | None, labelled: bool) -> Raw:
    try:
        with path.open("rb") as opened:  # np.load leaves a file open when it fails
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise BadInput(
                    f"expected several arrays in {str(path)!r}, found one; write it with {HOW}"
                )
            needed = ["x", *(["y"] if labelled else []), *([group] if group else [])]
            missing = [name for name in needed if name not in file.files]
            if missing:
                raise BadInput(
                    f"expected an array {missing[0]!r} in {path.name}, found "
                    f"{listed(file.files) or 'none'}; "
                    f"write it with {HOW}"
                )
            names = file["label_names"] if "label_names" in file.files else np.array([], str)
            columns = {group: file[group]} if group else {}
            x = file["x"]
            return Raw(
                where=path.name,
                x=x,
                y=file["y"] if "y" in file.files else np.full(len(x), ""),
                names=_names(path.name, names),
                columns=columns,
            )
    except BadInput:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(
            f"cannot read {str(path)!r} as arrays: {reason_of(error)}; save it again with {HOW}, "
            "without object arrays"
        ) from error


def _names(where: str, names: np.ndarray) -> tuple[str, ...]:
    found = tuple(map(str, names.tolist())) if names.ndim == 1 else ()
    if names.ndim != 1 or (names.dtype.kind != "U" and found) or len(set(found)) < len(found):
        raise BadInput(
            f"expected label_names of {where} to be a list of distinct strings, got "
            f"{one_line(names, REASON)}"
        )
    return found


# --- checking ---


def _checked(raw: Raw, group: str | None) -> Raw:
    x, y, where = raw.x, raw.y, raw.where
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise BadInput(
            f"expected x of {where} to be [rows, ...] with 1 to 3 dimensions per row, none of "
            f"them empty, got shape {list(x.shape)}; reshape it"
        )
    if x.dtype.kind not in "fiu":
        raise BadInput(
            f"expected numbers in x of {where}, got {x.dtype}; convert it to uint8 or float32"
        )
    if y.ndim != 1:
        raise BadInput(
            f"expected one label per row in y of {where}, got shape {list(y.shape)}; give class "
            "labels"
        )
    for name, values in {"y": y, **raw.columns}.items():
        if values.shape != (len(x),):
            raise BadInput(
                f"expected {name} of {where} to be as long as x, {len(x)} rows, got shape "
                f"{list(values.shape)}; one of them lacks rows"
            )
    if y.dtype.kind not in "iuUbf":
        raise BadInput(
            f"expected integers or strings as labels in y of {where}, got {y.dtype}; convert them"
        )
    if y.dtype.kind == "U":
        y = np.array([composed(trimmed(label)) for label in y.tolist()])
    has = {"f": lambda: ~np.isnan(y), "U": lambda: y != ""}.get(y.dtype.kind, lambda: y == y)()
    if not has.any():
        raise BadInput(f"expected labels in y of {where}, found none; fill them in")
    labels = y[has]
    if y.dtype.kind == "f" and not np.all(labels == np.floor(labels)):
        found = labels[labels != np.floor(labels)][0]
        raise BadInput(
            f"expected integers or strings as labels in y of {where}, got {found}; convert them"
        )
    if y.dtype.kind in "if" and labels.min() < 0:
        row = int(np.nanargmin(y))
        raise BadInput(
            f"expected labels of at least 0 in y of {where}, row {row} has {y[row]}; fix or remove "
            "it"
        )
    return Raw(
        where,
        finite(x, where)[has],
        labels.astype(np.int64) if y.dtype.kind in "buf" else labels,
        raw.names,
        {name: values[has] for name, values in raw.columns.items()},
        int((~has).sum()),
    )


def finite(x: np.ndarray, where: str) -> np.ndarray:
    """The values unchanged if they are uint8, else as float32."""
    if x.dtype == np.uint8:
        return x
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    bad = ~np.isfinite(single).reshape(len(x), -1).all(1)
    if bad.any():
        raise BadInput(
            f"expected finite numbers in x of {where}, {int(bad.sum())} rows hold NaN or infinity, "
            f"the first is row {int(np.argmax(bad))}; fix or remove them"
        )
    return single


def _same_kind(train: Raw, test: Raw) -> None:
    if train.x.shape[1:] != test.x.shape[1:] or train.x.dtype != test.x.dtype:
        raise BadInput(
            f"expected x of {test.where} to be like that of {train.where}, rows of "
            f"{list(train.x.shape[1:])} {train.x.dtype}, "
            f"got {list(test.x.shape[1:])} {test.x.dtype}; save both the same way"
        )


def _classes(train: Raw) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names, and the index of each label's class, by the label as a string."""
    distinct = np.unique(train.y).tolist()
    if len(distinct) < 2:
        raise BadInput(
            f"expected at least 2 classes in y of {train.where}, found only {distinct[0]!r}; add "
            "another"
        )
    names = tuple(map(str, distinct))
    if not train.names:
        refuse_too_many(len(distinct), len(train.y), f"y of {train.where}", "give class labels")
        return names, {name: index for index, name in enumerate(names)}
    if train.y.dtype.kind == "U":
        return train.names, {name: index for index, name in enumerate(train.names)}
    return train.names, {str(index): index for index in range(len(train.names))}


def _coded(raw: Raw, code: Mapping[str, int]) -> ArrayRows:
    values, inverse = np.unique(raw.y, return_inverse=True)
    unknown = [value for value in values.tolist() if str(value) not in code]
    if unknown:
        known = listed(code)
        raise BadInput(
            f"expected only labels of the training rows or of label_names in y of {raw.where} "
            f"({known}), found {unknown[0]!r}; fix the labels, or name the class"
        )
    labels = np.array([code[str(value)] for value in values.tolist()], np.int64)[
        inverse.reshape(-1)
    ]
    columns = {name: tuple(map(str, column.tolist())) for name, column in raw.columns.items()}
    return ArrayRows(x=raw.x, labels=labels, columns=columns)
