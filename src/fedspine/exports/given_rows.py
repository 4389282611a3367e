"""The rows that exported models are compared on: those of some data, or a run's test rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedspine.core.errors import BadInput, listed
from fedspine.core.task import TaskKind
from fedspine.data.array_rows import UNKNOWN, GivenRows, RowShape, fitting, rows_at
from fedspine.data.dataset import Dataset, Rows
from fedspine.data.tasks import load_stated
from fedspine.runs import task_record
from fedspine.runs.config import Recipe
from fedspine.runs.read_data import dataset
from fedspine.runs.run_dir import RECIPE, STATE, recipe_of
from fedspine.runs.task_record import TaskRecord

RANDOM_ROWS = 64
OF_RUN = "test rows of {}"


def text_rows(data: str, kind: TaskKind, classes: Sequence[str]) -> tuple[Rows, str]:
    """The test rows of the run in the folder `data`; else the rows of `data`, with columns `text`,
    `label` and, for pairs, `pair`. Then where they come from.

    Raises BadInput for data that cannot be read or has no rows, and a run of another task.
    """
    if is_run(data):
        return run_test_rows(data, kind, classes).test, OF_RUN.format(Path(data).name)
    columns = {"pair": "pair"} if kind == "pair" else {}
    rows = load_stated(data, kind=kind, label_names=classes, **columns)
    if not len(rows):
        raise BadInput(f"{data} has no rows; give data with at least one row with --rows")
    return rows, f"rows of {Path(data).name}"


def array_rows(data: str, wanted: RowShape) -> tuple[GivenRows, str]:
    """The test rows of the run in the folder `data`, else the rows that it holds; then where they
    come from. Raises BadInput as `text_rows` and `rows_at` do.
    """
    if not is_run(data):
        return rows_at(data, wanted), f"rows of {Path(data).name}"
    test = run_test_rows(data, "array", wanted.classes).test
    return GivenRows(fitting(test.x, data, wanted), test.labels), OF_RUN.format(Path(data).name)


def random_rows(wanted: RowShape, count: int = RANDOM_ROWS) -> GivenRows:
    """Random numbers in the shape of a net's rows, the same in every call."""
    rng, shape = np.random.default_rng(0), (count, *wanted.shape)
    if wanted.type == np.uint8:
        x = rng.integers(0, 256, shape, dtype=np.uint8)
    else:
        x = rng.standard_normal(shape, dtype=np.float32)
    return GivenRows(x, np.full(count, UNKNOWN))


def is_run(data: str) -> bool:
    """Whether `data` names the folder of a run."""
    return (Path(data) / RECIPE).is_file() and (Path(data) / STATE).is_dir()


def run_test_rows(folder: str, kind: TaskKind, classes: Sequence[str]) -> Dataset:
    """The data of a run, whose test rows are as the run had them.

    Raises BadInput if they are gone or changed, and for a run of another task.
    """
    recipe, record = recipe_of(Path(folder)), task_record.recorded(Path(folder))
    if (record.kind, tuple(record.classes)) != (kind, tuple(classes)):
        raise BadInput(
            f"the run in {folder} is of another task than the model; its classes are "
            f"{listed(record.classes) or 'none'}; name the run that the model is from"
        )
    try:
        data = dataset(recipe)
    except BadInput as error:
        raise BadInput(f"the test rows of {folder} are not available: {error}") from None
    if not same_test_rows(recipe, record, data):
        raise BadInput(
            f"the test rows of {folder} are not available: {recipe.task.data} has changed since; "
            "restore it"
        )
    return data


def same_test_rows(recipe: Recipe, record: TaskRecord, data: Dataset) -> bool:
    """Whether the test rows and the classes of `data` are those that the run had."""
    now = task_record.record_of(recipe, data, here=False)
    return (now.classes, now.splits["test"]) == (record.classes, record.splits["test"])


def spread(rows: int, most: int) -> np.ndarray:
    """The places of at most so many rows, evenly over all.

    >>> spread(3, 10).tolist(), spread(10, 4).tolist()
    ([0, 1, 2], [0, 3, 6, 9])
    """
    return np.linspace(0, rows - 1, min(rows, most)).astype(int)
