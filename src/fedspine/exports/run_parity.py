"""Parity of an export that PyTorch runs with the model of the run."""

from pathlib import Path
from typing import Any

from fedspine.exports import classifier_parity, decoder_parity
from fedspine.exports.parity_rows import parity_rows
from fedspine.lm.base import Base, Model
from fedspine.runs.config import Recipe
from fedspine.runs.task_record import TaskRecord


class RunParityCheck:
    """Compares the export in a folder with the run's `model`, whose adapter is not merged.

    `rows` names the data to compare on; None: the run's test rows. `found` is the parity report.
    """

    def __init__(
        self,
        recipe: Recipe,
        record: TaskRecord,
        base: Base,
        tokenizer: Any,
        model: Model,
        rows: str | None,
        quantize: str = "none",
    ) -> None:
        self._base, self._model, self._quantize = base, model, quantize
        self._language = record.kind == "causal-lm"
        most = decoder_parity.ROWS if self._language else classifier_parity.ROWS
        self._rows, self._rows_from = parity_rows(recipe, record, tokenizer, rows, most)
        self.found: Any = None

    def __call__(self, folder: Path) -> Any:
        compare = decoder_parity.parity_of if self._language else classifier_parity.parity_of
        module = self._base.fit(self._model)
        self.found = compare(module, folder, self._rows, self._rows_from, self._quantize)
        return self.found
