"""Partitions of rows over devices: equal shares, label skew, or whole groups of a column.

Label skew follows Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", 2019 (arXiv:1909.06335), in its common form: every class is
divided by its own Dirichlet draw. The levels p and the dominant classes are those of MergeSFL
(arXiv:2311.13348; p is 1 / alpha, as the values of alpha in its code suggest).
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from fedspine.core.errors import BadInput, unknown

KNOWN = ("iid", "dirichlet", "natural", "column:NAME", "p:LEVEL", "dominant:SHARE")
DRAWS = 50  # attempts at a Dirichlet split in which every device has `FEWEST` rows
FEWEST = 2  # rows of a device, if there are enough rows
_STREAM = 0x7061  # keeps these draws apart from others of the same seed


def column_of(how: str, natural: str | None) -> str | None:
    """The column that the partition `how` is based on, or None.

    `natural` is the data set's own column for devices. Raises BadInput for an unknown partition, or
    for "natural" where the data names no such column.

    >>> column_of("column:author", None), column_of("iid", "file"), column_of("natural", "file")
    ('author', None, 'file')
    """
    match how.partition(":"):
        case ("iid" | "dirichlet", "", ""):
            return None
        case ("natural", "", ""):
            if natural is None:
                raise BadInput(
                    "partition 'natural' needs data that names its devices, and this data does "
                    "not; use 'column:NAME' with a column of the data, 'iid' or 'dirichlet'"
                )
            return natural
        case ("column", ":", name) if name:
            return name
        case ("p" | "dominant", ":", _):
            _number_in(how)
            return None
    raise unknown("partition", how, KNOWN)


def partition(
    how: str,
    *,
    devices: int,
    rows: int,
    labels: np.ndarray | None,
    groups: Sequence[str] | None,
    alpha: float,
    seed: int,
) -> list[np.ndarray]:
    """The row indices of each device (int64, ascending); every row is on exactly one device and no
    device is empty.

    `labels` [rows] is needed by "dirichlet", whose skew grows as `alpha` falls, by "p:LEVEL", which
    is "dirichlet" with alpha = 1 / LEVEL ("p:0" is "iid"), and by "dominant:SHARE", where dominant
    classes are assigned to devices in turn: the devices that a class dominates together hold this
    share of it, the others the rest. `groups` [rows], the values of the column, is needed by
    "natural" and "column:NAME". The same arguments give the same bytes. Raises BadInput if a device
    would be left without rows or the arguments do not fit the partition.

    >>> parts = partition(
    ...     "column:by", devices=2, rows=4, labels=None, groups="abba", alpha=1, seed=0
    ... )
    >>> [part.tolist() for part in parts]
    [[0, 3], [1, 2]]
    """
    column = column_of(how, natural="natural")
    if devices < 1 or devices > rows:
        raise BadInput(
            f"expected 1 to {rows} devices, no more than training rows, got {devices}; change the "
            "number of devices or give more rows"
        )
    rng = np.random.default_rng([seed, _STREAM])
    if column is not None:
        if groups is None or len(groups) != rows:
            found = "none" if groups is None else len(groups)
            raise BadInput(
                f"partition {how!r} expects a value of its column for each of {rows} rows, got "
                f"{found}"
            )
        owner = _by_group(groups, devices, how, rng)
    elif how.startswith("dominant:"):
        owner = _by_label(
            _checked(labels, rows, how), devices, _dominant(_number_in(how), devices), rng
        )
    elif how == "dirichlet" or (how.startswith("p:") and _number_in(how) > 0):
        alpha = alpha if how == "dirichlet" else 1 / _number_in(how)
        owner = _by_label(
            _checked(labels, rows, how), devices, _dirichlet(alpha, devices, rng), rng
        )
    else:
        owner = rng.permutation(np.arange(rows) % devices)
    return _rows_of(owner, devices)


def _rows_of(owner: np.ndarray, devices: int) -> list[np.ndarray]:
    order = np.argsort(owner, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(owner, minlength=devices))[:-1])


def _checked(labels: np.ndarray | None, rows: int, how: str) -> np.ndarray:
    if labels is None:
        raise BadInput(
            f"partition {how!r} needs labels, and this task has none; use 'iid', 'natural' or "
            "'column:NAME'"
        )
    if len(labels) != rows:
        raise BadInput(
            f"partition {how!r} expects a label for each of {rows} rows, got {len(labels)}"
        )
    return np.asarray(labels)


def _number_in(how: str) -> float:
    """The level in "p:LEVEL", at least 0, or the share in "dominant:SHARE", 0 to 1."""
    name, _, text = how.partition(":")
    most, example = {"p": (np.inf, "p:10"), "dominant": (1.0, "dominant:0.8")}[name]
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not 0 <= number <= most or number == np.inf:
        raise BadInput(
            f"partition {how!r} expects a number of at least 0{' and at most 1' * (most == 1)} "
            f"after {name + ':'!r}; write for example {example!r}"
        )
    return number


# from a class and the number of classes to each device's share of that class
Shares = Callable[[int, int], np.ndarray]


def _dirichlet(alpha: float, devices: int, rng: np.random.Generator) -> Shares:
    if not 0 < alpha < np.inf:
        raise BadInput(
            "partition 'dirichlet' expects alpha above 0, got "
            f"{alpha}; 0.1 is strong skew, 100 next to none"
        )
    return lambda _class, _classes: rng.dirichlet(np.full(devices, alpha))


def _dominant(share: float, devices: int) -> Shares:
    def of_class(number: int, classes: int) -> np.ndarray:
        # the authors have as many classes as devices; with fewer classes several devices share one
        theirs = (
            np.arange(devices) % classes == number
            if devices >= classes
            else np.arange(devices) == number % devices
        )
        if theirs.all():
            return np.full(devices, 1 / devices)
        return np.where(theirs, share / theirs.sum(), (1 - share) / (~theirs).sum())

    return of_class


def _by_label(
    labels: np.ndarray, devices: int, shares: Shares, rng: np.random.Generator
) -> np.ndarray:
    fewest = min(FEWEST, len(labels) // devices)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    owner = np.empty(len(labels), dtype=np.int64)
    for _ in range(DRAWS):
        for number, of_class in enumerate(classes):
            share = np.cumsum(shares(number, len(classes)))
            # The middle of each row's slice of [0, 1) decides, which rounds the shares to whole
            # rows.
            middles = (np.arange(len(of_class)) + 0.5) / len(of_class)
            owner[rng.permutation(of_class)] = np.minimum(
                np.searchsorted(share, middles), devices - 1
            )
        if np.bincount(owner, minlength=devices).min() >= fewest:
            return owner
    return _fed(owner, devices, fewest, rng)


def _fed(owner: np.ndarray, devices: int, fewest: int, rng: np.random.Generator) -> np.ndarray:
    """`owner` with single rows moved from the largest devices, until every device has `fewest`
    rows.
    """
    held = [rng.permutation(rows).tolist() for rows in _rows_of(owner, devices)]
    starved = [device for device in range(devices) if len(held[device]) < fewest]
    largest = [(-len(held[device]), device) for device in range(devices)]
    heapq.heapify(largest)
    fed = owner.copy()
    for device in starved:
        for _ in range(fewest - len(held[device])):
            count, donor = largest[0]
            fed[held[donor].pop()] = device
            heapq.heapreplace(largest, (count + 1, donor))
    return fed


def _by_group(
    groups: Sequence[str], devices: int, how: str, rng: np.random.Generator
) -> np.ndarray:
    index = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(index) < devices:
        raise BadInput(
            f"partition {how!r} expects at least one group for each of {devices} devices, found "
            f"{len(index)} groups, so a device would be left without rows; use at most "
            f"{len(index)} devices or another partition"
        )
    group = np.fromiter((index[name] for name in groups), dtype=np.int64, count=len(groups))
    counts = np.bincount(group)
    shuffled = rng.permutation(len(index))
    device_of = np.empty(len(index), dtype=np.int64)
    emptiest = [(0, device) for device in range(devices)]  # already a heap
    for number in shuffled[np.argsort(-counts[shuffled], kind="stable")].tolist():
        rows, device = emptiest[0]
        device_of[number] = device
        heapq.heapreplace(emptiest, (rows + int(counts[number]), device))
    return device_of[group]
