"""Rows of arrays for a net that is trained already: labelled or not, few or many, in the order of
their files.

A data set to train on is read by `fedspine.data.arrays`, which numbers classes and holds rows out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspine.core.errors import BadInput, listed, reason_of
from fedspine.data import arrays

UNKNOWN = -1  # the label of a row that has none


@dataclass(frozen=True)
class RowShape:
    """What a net reads: the shape of a row and its type, and the classes of its labels."""

    shape: tuple[int, ...]
    type: np.dtype  # uint8 or float32
    classes: tuple[str, ...]


@dataclass(frozen=True)
class GivenRows:
    """Rows as a net's graph reads them, [rows, ...], and their labels, int64 [rows]."""

    x: np.ndarray
    labels: np.ndarray  # UNKNOWN without one

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> "GivenRows":
        """These rows, in this order."""
        return GivenRows(self.x[rows], self.labels[rows])

    def accuracy(self, predicted: np.ndarray) -> float | None:
        """Share of right predictions among the rows with a label; None if none has one."""
        known = self.labels != UNKNOWN
        return float((predicted == self.labels)[known].mean()) if known.any() else None


def rows_at(data: str, wanted: RowShape) -> GivenRows:
    """All rows of an `.npy` file, which may be a single one, or of what `arrays.load` reads; of
    data with a test split, the test rows.

    Raises BadInput for data that cannot be found or read, for rows of another shape or type, and
    for labels that are not among the classes.
    """
    path = Path(os.path.expanduser(data))
    if path.suffix.lower() == ".npy" and path.is_file():
        return _of_array(path, wanted)
    if not path.exists():
        raise BadInput(
            f"expected rows at {data!r}, found nothing there; name an .npy or .npz file or a folder"
        )
    splits = arrays.read_splits(data, labelled=False)
    chosen = splits.get("test", splits.get("validation", splits["train"]))
    names = chosen.names or splits["train"].names
    return GivenRows(fitting(chosen.x, data, wanted), _labels(chosen, names, data, wanted))


def _of_array(path: Path, wanted: RowShape) -> GivenRows:
    try:
        with path.open("rb") as file:
            x = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(
            f"cannot read {str(path)!r} as an array: {reason_of(error)}; save it again with "
            "np.save(path, rows)"
        ) from None
    if not isinstance(x, np.ndarray):
        raise BadInput(f"{path} holds several arrays; name it .npz, or save one with np.save")
    x = x[None] if x.shape == wanted.shape else x
    return GivenRows(fitting(x, str(path), wanted), np.full(len(x), UNKNOWN))


def fitting(x: np.ndarray, data: str, wanted: RowShape) -> np.ndarray:
    """`x` as uint8 or float32 where it holds rows like these; raises BadInput otherwise."""
    read = f"{data} holds {x.dtype} rows of shape {list(x.shape[1:])}"
    expected = f"{wanted.type} of shape {list(wanted.shape)} were expected"
    # floats may have any width, and integers other than uint8 count as floats, as in training
    alike = x.dtype.kind in "fiu" and (x.dtype == np.uint8) == (wanted.type == np.uint8)
    if x.ndim == 0 or x.shape[1:] != wanted.shape or not alike:
        raise BadInput(f"{read}, but {expected}; give rows like those of the training")
    if not len(x):
        raise BadInput(f"{data} has no rows; give at least one")
    return arrays.finite(x, data)


def _labels(raw: arrays.Raw, names: Sequence[str], data: str, wanted: RowShape) -> np.ndarray:
    """The place of each row's class among those of the net."""
    if raw.y.shape != (len(raw.x),):
        raise BadInput(
            f"expected y of {raw.where} to be as long as x, {len(raw.x)} rows, got shape "
            f"{list(raw.y.shape)}; one of them lacks rows"
        )
    codes = {name: code for code, name in enumerate(wanted.classes)}
    values, places = np.unique(raw.y, return_inverse=True)
    found = []
    for value in values.tolist():
        name = _class_of(value, names)
        if name and name not in codes:
            raise BadInput(
                f"{data} has the class {name!r}, which the model does not have; its classes are "
                f"{listed(wanted.classes)}"
            )
        found.append(codes[name] if name else UNKNOWN)
    return np.array(found, np.int64)[places.reshape(-1)]


def _class_of(value: object, names: Sequence[str]) -> str:
    """The name of a class; empty for a missing label.

    >>> _class_of(1.0, ["down", "up"]), _class_of(float("nan"), []), _class_of(7, [])
    ('up', '', '7')
    """
    if isinstance(value, float):
        if value != value:  # NaN
            return ""
        value = int(value) if value.is_integer() else value
    if isinstance(value, int):  # of bools, too, which are numbers here as in training
        return names[value] if 0 <= value < len(names) else str(int(value))
    return str(value).strip()
