"""A data set as the rest of the library sees it: texts, pairs and labels of a train and a test split, checked once.

Whatever is wrong with the data is found here, as one `BadInput`, so nothing after this checks texts or labels again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa

from fedspine.data import files, hub, pydocs
from fedspine.data.columns import Values, Wanted, checked
from fedspine.errors import BadInput, nearest, unknown
from fedspine.task import BUILT_IN_DATA, Kind

if TYPE_CHECKING:
    from fedspine.data.arrays import ArrayRows

_NATURAL = {"pydoc-topics": "file"}  # the columns that name a natural device
TEST_FRACTION = 5  # one row in five is for testing where the data names no test rows
_SPLIT_SEED = 20260101  # the same rows for everyone, whatever the seed of a run


@dataclass(frozen=True)
class Rows:
    """One split: `texts` and, for pairs of sentences, `pairs` of the same length; `labels` int64 [rows].

    `pairs` is None without a second sentence, `labels` is None for language modelling. `columns` holds the columns a
    partition may need, as strings.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray | None
    columns: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dataset:
    """A train and a test split with the same classes; `natural` is the column that names a natural device, if any.

    A label is an index into `label_names`, which is empty for language modelling.
    """

    name: str
    train: "Rows | ArrayRows"
    test: "Rows | ArrayRows"
    label_names: tuple[str, ...]
    natural: str | None


def load(
    data: str,
    *,
    kind: Kind,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    group: str | None = None,
) -> Dataset:
    """The data set named `data`: a built-in name, a local file or folder, or an id of the Hugging Face Hub.

    `text`, `pair` (for kind "pair", "text2" if not named) and `label` name columns; `group` names one more to keep in
    `Rows.columns` for a partition. Where the data has no test rows, a random fifth with a fixed seed is taken from the
    training rows. Raises BadInput for data that cannot be found, read or used, saying what to do.

    >>> data = load("pydoc-topics", kind="classification")
    >>> data.label_names[:3], data.natural
    (('interface', 'network', 'language'), 'file')
    """
    wanted = _wanted(data, kind, text, pair, label, group)
    table, test_table = _train_and_test(_tables(data, wanted, label), wanted)
    train = checked(table, wanted, "train")
    train, test = (
        _held_out(train) if test_table is None else (train, checked(test_table, wanted, "test"))
    )
    names, code = _classes(train.labels, _stated_names(table, wanted.label), label)
    return Dataset(
        name=data,
        train=_coded(train, code, label),
        test=_coded(test, code, label),
        label_names=names,
        natural=_NATURAL.get(data),
    )


def load_stated(
    data: str,
    *,
    kind: Kind,
    label_names: Sequence[str],
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    spelled: Mapping[str, str] | None = None,
) -> Rows:
    """All training rows of `data`, whose labels index `label_names`, the classes that somebody else states.

    For a site that holds a part of a federated task: it may lack classes, so its own values cannot number them. A value
    means the class that `spelled` gives it, else the one that the data's own class names give a number, else the class
    of its name; so the rows get the numbers that `load` gives them in a data set with all classes. Nothing is held out
    for testing. Raises BadInput as `load` does, and for a value that is none of the classes.
    """
    wanted = _wanted(data, kind, text, pair, label, None)
    table = _tables(data, wanted, label)["train"]
    rows = checked(table, wanted, "train")
    own = _stated_names(table, wanted.label)
    code: dict[str, int] = {}
    for value in dict.fromkeys(rows.labels or ()):
        if (name := _stated_class(value, own, spelled or {}, label_names)) is None:
            raise BadInput(
                f"expected only the classes {', '.join(map(repr, label_names))} in column {label!r}, found {value!r}; "
                "say which class it means, or remove such rows"
            )
        code[str(value)] = list(label_names).index(name)
    return _coded(rows, code, label)


def _stated_class(
    value: int | bool | str, own: Sequence[str], spelled: Mapping[str, str], known: Sequence[str]
) -> str | None:
    """The class that a value means, or None where it is none of those known."""
    names = [str(value)]
    if isinstance(
        value, bool
    ):  # a file with yet other values than true and false holds these as text
        names.append(str(value).lower())
    if str(value) in spelled:
        names = [spelled[str(value)]]
    elif type(value) is int and 0 <= value < len(own):
        names.insert(0, own[value])
    return next((name for name in names if name in known), None)


def _wanted(
    data: str, kind: Kind, text: str, pair: str | None, label: str, group: str | None
) -> Wanted:
    if kind not in get_args(Kind):
        raise unknown("kind of task", kind, get_args(Kind))
    if pair is not None and kind != "pair":
        raise BadInput(
            f"expected no pair column for kind {kind!r}, came {pair!r}; set kind 'pair' or leave it out"
        )
    others = tuple(dict.fromkeys(name for name in (group, _NATURAL.get(data)) if name is not None))
    return Wanted(
        text=text,
        pair=(pair or "text2") if kind == "pair" else None,
        label=None if kind == "causal-lm" else label,
        others=others,
    )


# --- finding and reading ---


def _tables(data: str, wanted: Wanted, label: str) -> dict[str, pa.Table]:
    if data in BUILT_IN_DATA:
        return {"train": _pydoc_topics()}
    if not data.strip():
        raise BadInput(
            f"expected the name of a data set, came {data!r}; name {BUILT_IN_DATA[0]!r}, a path or a Hub id"
        )
    path = Path(os.path.expanduser(data))
    if os.path.exists(
        path
    ):  # which, unlike Path.exists, takes a name that no file can have for an absent one
        strings = [
            name for name in (wanted.text, wanted.pair, *wanted.others) if name not in (None, label)
        ]
        return files.read(path, strings)
    if (
        data.startswith((".", "/", "~"))
        or path.is_absolute()
        or path.suffix.lower() in files.READERS
    ):
        beside = [other.name for other in path.parent.glob("*")]
        raise BadInput(
            f"expected a data file or folder at {data!r}, found nothing there; "
            f"check the path{_meant(path.name, beside)}"
        )
    try:
        return hub.read(data, label)
    except BadInput as error:
        raise BadInput(
            f"{data!r} is not built in (known: {', '.join(BUILT_IN_DATA)}), not a path here, "
            f"and {error}{_meant(data, BUILT_IN_DATA)}"
        ) from error


def _meant(name: str, known: Sequence[str]) -> str:
    guess = nearest(name, known)
    return f"; did you mean {guess!r}?" if guess else ""


def _pydoc_topics() -> pa.Table:
    topics = list(pydocs.TOPICS)
    texts, names, origins = zip(*pydocs.read(), strict=True)
    table = pa.table(
        {"text": texts, "label": [topics.index(name) for name in names], "file": origins}
    )
    return table.replace_schema_metadata({"label_names": json.dumps(topics)})


def _train_and_test(
    splits: Mapping[str, pa.Table], wanted: Wanted
) -> tuple[pa.Table, pa.Table | None]:
    for name in ("test", "validation"):
        if name in splits and not _hides_labels(splits[name], wanted.label):
            return splits["train"], splits[name]
    return splits["train"], None


def _hides_labels(table: pa.Table, label: str | None) -> bool:
    # Test sets of public contests come with -1 for every label; the validation set is then the one to test on.
    if (
        label is None
        or table.schema.names.count(label) != 1
        or not pa.types.is_integer(table.schema.field(label).type)
    ):
        return False
    return set(table[label].to_pylist()) == {-1}


def _stated_names(table: pa.Table, label: str | None) -> tuple[str, ...]:
    """The class names that the data itself gives: `label_names`, or what `datasets` writes to Parquet."""
    metadata = table.schema.metadata or {}
    names = None
    with suppress(
        ValueError, KeyError, TypeError
    ):  # metadata is anybody's; without names there the values are names
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    with suppress(ValueError, KeyError):
        names = json.loads(metadata[b"label_names"])
    is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_names else ()


# --- splitting and numbering ---


def _held_out(rows: Values) -> tuple[Values, Values]:
    kept, held = held_out(rows.labels, len(rows.texts))
    return rows.take(kept), rows.take(held)


def held_out(labels: Sequence[Any] | np.ndarray | None, rows: int) -> tuple[list[int], list[int]]:
    """The rows to learn from, and a random fifth for testing, less those of a class that would have no row to learn from.

    Both ascending. Raises BadInput where one of them would be empty.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    count = max(1, len(order) // TEST_FRACTION)
    held, kept = order[:count].tolist(), order[count:].tolist()
    if labels is not None:
        learned = {labels[row] for row in kept}
        kept += [row for row in held if labels[row] not in learned]
        held = [row for row in held if labels[row] in learned]
    if not kept or not held:
        raise BadInput(
            f"expected enough rows to set a fifth aside for testing, found {len(order)}; "
            "give more rows, or a test file of their own"
        )
    return sorted(kept), sorted(held)


def _classes(
    values: list | None, stated: Sequence[str], label: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names, and the class of every value of the train set, written as a string."""
    if values is None:
        return (), {}
    distinct = sorted(set(values))
    if len(distinct) < 2:
        raise BadInput(
            f"expected at least 2 classes in column {label!r} of the train set, found only {distinct[0]!r}; "
            "give rows of another class, or name another label column"
        )
    if all(type(value) is int and 0 <= value < len(stated) for value in distinct):
        return tuple(stated), {str(value): value for value in distinct}
    names = tuple(str(value) for value in distinct)
    return names, {name: index for index, name in enumerate(names)}


def _coded(rows: Values, code: Mapping[str, int], label: str) -> Rows:
    labels = None
    if rows.labels is not None:
        unseen = [value for value in rows.labels if str(value) not in code]
        if unseen:
            raise BadInput(
                f"expected only labels of the train set in the test set, found {unseen[0]!r} in column {label!r} of "
                f"{len(unseen)} rows; add such rows to the train set, or remove them from the test set"
            )
        labels = np.array([code[str(value)] for value in rows.labels], dtype=np.int64)
    pairs = None if rows.pairs is None else tuple(rows.pairs)
    return Rows(
        tuple(rows.texts),
        pairs,
        labels,
        {name: tuple(values) for name, values in rows.columns.items()},
    )
