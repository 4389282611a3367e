"""The rows on which a graph or a file is compared with the PyTorch model, and calibration rows."""

from pathlib import Path
from typing import Any

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.data.dataset import Rows
from fedspine.data.tasks import load_stated
from fedspine.exports.given_rows import same_test_rows, spread
from fedspine.lm.encode import encode
from fedspine.runs.config import Recipe
from fedspine.runs.read_data import dataset
from fedspine.runs.task_record import TaskRecord, record_of

MADE_UP = 64  # random texts, if there is no data
RANDOM_WORDS = "random words, since the run's data is not available; give rows with --rows"


def parity_rows(
    recipe: Recipe, record: TaskRecord, tokenizer: Any, place: str | None, most: int
) -> tuple[Examples, str]:
    """Encoded rows of the data in `place`, which has the run's columns; else the run's test rows,
    if they are unchanged; else random texts from the vocabulary. At most `most`, spread evenly over
    all of them, and a note on where they come from.

    Raises BadInput for data in `place` that cannot be read.
    """
    if place is not None:
        rows, rows_from = _stated(recipe, record, place), f"rows of {Path(place).name}"
    elif (rows := _test(recipe, record)) is not None:
        rows_from = "test rows of the run"
    else:
        rows = made_up(tokenizer, record.max_tokens, pairs=record.kind == "pair")
        rows_from = RANDOM_WORDS
    rows = _thinned(rows, most)
    return _encoded(recipe, record, tokenizer, rows), rows_from


def calibration_rows(recipe: Recipe, record: TaskRecord, tokenizer: Any, most: int) -> Examples:
    """At most `most` encoded training rows of the run, spread evenly over all of them.

    Raises BadInput if they are gone, changed, or on devices only.
    """
    needed = "int8-static is calibrated on the run's training rows"
    instead = "use --quantize int8, which needs no rows"
    if "train" not in record.splits:
        raise BadInput(f"{needed}, which are on its devices; {instead}")
    try:
        data = dataset(recipe)
    except BadInput as error:
        raise BadInput(f"{needed}, which are not available: {error}; or {instead}") from None
    if record_of(recipe, data).splits["train"] != record.splits["train"]:
        raise BadInput(f"{needed}, and {recipe.task.data} has changed since; {instead}")
    return _encoded(recipe, record, tokenizer, _thinned(data.train, most))


def _encoded(recipe: Recipe, record: TaskRecord, tokenizer: Any, rows: Rows) -> Examples:
    """The rows as the run's model reads them."""
    bi_encoder = recipe.task.pooling == "bi-encoder"
    return encode(
        tokenizer, rows, record.kind, record.max_tokens, scored=True, bi_encoder=bi_encoder
    )


def _thinned(rows: Rows, most: int) -> Rows:
    return rows.take(spread(len(rows), most).tolist())


def _stated(recipe: Recipe, record: TaskRecord, place: str) -> Rows:
    rows = load_stated(
        place,
        kind=record.kind,
        label_names=record.classes,
        encoding=recipe.task.encoding,
        **record.columns,
    )
    if not len(rows):
        raise BadInput(f"{place} has no rows; give data with at least one row with --rows")
    return rows


def _test(recipe: Recipe, record: TaskRecord) -> Rows | None:
    """The run's test rows, None if they are gone or have changed."""
    try:
        data = dataset(recipe)
    except BadInput:
        return None
    return data.test if same_test_rows(recipe, record, data) else None


def made_up(tokenizer: Any, max_tokens: int, *, pairs: bool) -> Rows:
    """Texts, or pairs of texts, of one to `max_tokens` random tokens, the same in every call."""
    rng = np.random.default_rng(0)
    usual = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def texts() -> tuple[str, ...]:
        lengths = rng.integers(1, max_tokens, MADE_UP, endpoint=True)
        return tuple(tokenizer.decode(rng.choice(usual, length)) for length in lengths)

    return Rows(texts(), texts() if pairs else None, None, {})
