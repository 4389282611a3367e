"""A data set as the rest of the library sees it: texts, pairs and labels of a train and a test
split, checked once.

Every error in the data is reported here, as a `BadInput`, so later code does not check texts or
labels again.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fedspine.core.errors import BadInput, listed, nearest, unknown
from fedspine.core.task import BUILT_IN_DATA, TaskKind
from fedspine.data import classes, files, hub, pydocs
from fedspine.data.columns import Values, Wanted, checked, hidden, picker
from fedspine.data.dataset import Dataset, Rows, held_out
from fedspine.data.parts import FilePart, Pick, Read, shown

_NATURAL = {"pydoc-topics": "file", "pydoc-qa": "file"}  # the columns that name a natural device


def load(
    data: str,
    *,
    kind: TaskKind,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    group: str | None = None,
    encoding: str | None = None,
    answers: bool = False,
) -> Dataset:
    """The data set named `data`: a built-in name, a local file or folder, or an id of the Hugging
    Face Hub.

    `text`, `pair` (for kind "pair", "text2" if not named) and `label` name columns; `group` names
    one more to keep in `Rows.columns` for a partition. `encoding` is that of text files which are
    not UTF-8. With `answers`, conversations are read as dialogues, and a model learns only their
    answers. If the data has no test rows, a random fifth of the training rows (fixed seed) is held
    out. Raises BadInput for data that cannot be found, read or used.

    >>> data = load("pydoc-topics", kind="classification")
    >>> data.label_names[:3], data.natural
    (('interface', 'network', 'language'), 'file')
    """
    wanted = _wanted(data, kind, text, pair, label, group, answers)
    train, test, notes = _train_and_test(_source(data, encoding), wanted)
    left_out = train.left_out + (test.left_out if test is not None else Counter())
    splits = [train] if test is None else [train, test]
    notes += [note for split in splits for note in split.notes]
    if wanted.label is None:
        names: tuple[str, ...] = ()
        coded = [_rows(split, None) for split in splits]
    else:
        spelled = classes.texts(splits)
        names = classes.named(train, spelled[0], label)
        notes += [*classes.unnamed(splits), *classes.look_alike(names)]
        coded = [
            _rows(split, classes.numbers(texts, names, label))
            for split, texts in zip(splits, spelled, strict=True)
        ]
    of_train, of_test = coded if coded[1:] else _held_out(coded[0])
    return Dataset(
        name=data,
        train=of_train,
        test=of_test,
        label_names=names,
        natural=_NATURAL.get(data),
        left_out=dict(left_out),
        notes=tuple(notes),
    )


def remarks(data: Dataset) -> tuple[str, ...]:
    """One-line remarks on how the data was read, the rows left out first.

    >>> rows = Rows(("a",), None, None, {})
    >>> remarks(Dataset("x.csv", rows, rows, (), None, left_out={"no text": 1, "no label": 2}))
    ('3 of 5 rows are left out: 1 with no text, 2 with no label',)
    """
    drawn, not_drawn = len(data.train), data.not_drawn
    notes = data.notes
    if not_drawn:
        sample = f"{drawn:,} of {drawn + not_drawn:,} training rows are used: a random sample"
        notes = (*notes, sample)
    return _remarks(drawn + not_drawn + len(data.test), data.left_out, notes)


def _remarks(kept: int, left_out: Mapping[str, int], notes: tuple[str, ...]) -> tuple[str, ...]:
    left = sum(left_out.values())
    if not left:
        return notes
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in left_out.items())
    return (f"{left:,} of {kept + left:,} rows are left out: {reasons}", *notes)


def load_stated(
    data: str,
    *,
    kind: TaskKind,
    label_names: Sequence[str],
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    spelled: Mapping[str, str] | None = None,
    encoding: str | None = None,
    answers: bool = False,
    say: Callable[[str], None] = lambda remark: None,
) -> Rows:
    """All training rows of `data`, whose labels index `label_names`, the given classes.

    For a site that holds part of a federated task: it may lack classes, so its own values cannot
    number them. A value stands for the class that `spelled` maps it to, else for the one that the
    data's own class names give to an integer, else for the class of the same name; so rows get the
    numbers that `load` gives them in a data set with all classes. Nothing is held out for testing.
    `say` is called with each of the `remarks` on the rows. Raises BadInput as `load` does, and for
    a value that is not one of the classes.
    """
    wanted = _wanted(data, kind, text, pair, label, None, answers)
    train = checked(_source(data, encoding)["train"](picker(wanted, "train")), wanted, "train")
    for remark in _remarks(len(train.texts), train.left_out, train.notes):
        say(remark)
    if train.labels is None:
        return _rows(train, None)
    numbers = []
    known: dict[tuple[str, type], int] = {}
    for value, spelling in zip(train.labels, classes.texts([train])[0], strict=True):
        key = spelling, type(value)
        if key not in known:
            name = _stated_class(value, spelling, spelled or {}, label_names)
            if name is None:
                raise BadInput(
                    f"expected only the classes {listed(map(shown, label_names))} in column "
                    f"{label!r}, found {shown(value)}; say which class it means, or remove "
                    "such rows"
                )
            known[key] = list(label_names).index(name)
        numbers.append(known[key])
    return _rows(train, numbers)


def _stated_class(
    value: Any, spelling: str, spelled: Mapping[str, str], known: Sequence[str]
) -> str | None:
    """The class that a value stands for, or None if it is unknown; the case of true and false is
    ignored.
    """
    written = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    names = [spelling, written]
    if written.lower() in ("true", "false"):
        names += [written.capitalize(), written.lower(), written.upper()]
    if stated := next((spelled[name] for name in (written, *names) if name in spelled), None):
        names = [stated]
    return next((name for name in names if name in known), None)


def _wanted(
    data: str,
    kind: TaskKind,
    text: str,
    pair: str | None,
    label: str,
    group: str | None,
    answers: bool,
) -> Wanted:
    if kind not in get_args(TaskKind):
        raise unknown("kind of task", kind, get_args(TaskKind))
    if pair is not None and kind != "pair":
        raise BadInput(
            f"expected no pair column for kind {kind!r}, got {pair!r}; set kind 'pair' or leave "
            "it out"
        )
    others = tuple(dict.fromkeys(name for name in (group, _NATURAL.get(data)) if name is not None))
    return Wanted(
        text=text,
        pair=(pair or "text2") if kind == "pair" else None,
        label=None if kind == "causal-lm" else label,
        others=others,
        answers=answers and kind == "causal-lm",
    )


# --- finding and reading ---


def _source(data: str, encoding: str | None) -> Mapping[str, Read]:
    """A reader for each split."""
    if data in BUILT_IN_DATA:
        return {"train": {"pydoc-topics": _pydoc_topics, "pydoc-qa": _pydoc_qa}[data]}
    if not data.strip():
        raise BadInput(
            f"expected the name of a data set, got {data!r}; name {BUILT_IN_DATA[0]!r}, a path or "
            "a Hub id"
        )
    path = Path(os.path.expanduser(data))
    # unlike Path.exists, False for a name that no file can have
    if os.path.exists(path):
        return files.source(path, encoding)
    if (
        data.startswith((".", "/", "~"))
        or path.is_absolute()
        or files.format_of(path) in files.READERS
    ):
        beside = [other.name for other in path.parent.glob("*") if other.exists()]
        raise BadInput(
            f"expected a data file or folder at {data!r}, found nothing there; "
            f"check the path{_meant(path.name, beside)}"
        )
    try:
        return hub.source(data)
    except BadInput as error:
        raise BadInput(
            f"{data!r} is not built in (known: {', '.join(BUILT_IN_DATA)}), not a path here, "
            f"and {error}{_meant(data, BUILT_IN_DATA)}"
        ) from error


def _meant(name: str, known: Sequence[str]) -> str:
    guess = nearest(name, known)
    return f"; did you mean {guess!r}?" if guess else ""


def _pydoc_topics(pick: Pick) -> FilePart:
    topics = tuple(pydocs.TOPICS)
    texts, names, origins = zip(*pydocs.read(), strict=True)
    labels = [topics.index(name) for name in names]
    return _of_table({"text": texts, "label": labels, "file": origins}, pick, topics)


def _pydoc_qa(pick: Pick) -> FilePart:
    questions, answers, origins = zip(*pydocs.read_questions(), strict=True)
    return _of_table({"prompt": questions, "completion": answers, "file": origins}, pick)


def _of_table(
    table: Mapping[str, Sequence[Any]], pick: Pick, names: tuple[str, ...] = ()
) -> FilePart:
    """The picked columns; `names` are what the numbers of a column "label" stand for."""
    columns = list(table.items())
    picked = {name: columns[place] for name, place in pick(list(table)).items()}
    return FilePart(
        columns={name: list(values) for name, (_, values) in picked.items()},
        rows=len(columns[0][1]),
        stated={name: names for name, (column, _) in picked.items() if column == "label"},
    )


def _train_and_test(
    source: Mapping[str, Read], wanted: Wanted
) -> tuple[Values, Values | None, list[str]]:
    """The checked splits, the second None if the data has no labelled one; and remarks."""
    notes = []
    train = checked(source["train"](picker(wanted, "train")), wanted, "train")
    for name in ("test", "validation"):
        if name not in source:
            continue
        part = source[name](picker(wanted, "test"))
        if not hidden(part, wanted.label, train.labels or ()):
            if name == "test" and "validation" in source:
                notes.append("the validation set is not read, as there is a test set")
            return train, checked(part, wanted, "test", train.stated), notes
        more = name == "test" and "validation" in source
        instead = "the validation set" if more else "a fifth of the training rows"
        notes.append(f"the labels of the {name} set are withheld, so {instead} is used for testing")
    return train, None, notes


# --- splitting and numbering ---


def _held_out(rows: Rows) -> tuple[Rows, Rows]:
    kept, held = held_out(rows.labels, len(rows))
    return rows.take(kept), rows.take(held)


def _rows(values: Values, labels: Sequence[int] | None) -> Rows:
    return Rows(
        tuple(values.texts),
        None if values.pairs is None else tuple(values.pairs),
        None if labels is None else np.array(labels, np.int64),
        {name: tuple(column) for name, column in values.columns.items()},
        None if values.dialogues is None else tuple(values.dialogues),
    )
