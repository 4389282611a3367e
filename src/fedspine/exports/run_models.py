"""The deployed models of a finished run, by device."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedspine.exports import hf
from fedspine.exports.of_run import export_model
from fedspine.exports.saved_run import (
    DENSE,
    GLOBAL,
    check_device,
    chosen,
    device_ids_of,
    saved_state,
)
from fedspine.runs import task_record
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import recipe_of


class Models(Mapping[str, Any]):
    """The deployed models of a finished run: `global`, `dense`, and those of the devices by name.

    Each is built on access. For texts it is what `fedspine export` writes and `load_model` reads, a
    stock transformers module with its tokenizer; for arrays a stock module as described in
    `fedspine.nets.load.stored`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter((GLOBAL, DENSE, *device_ids_of(self._folder)))

    def __len__(self) -> int:
        return len(device_ids_of(self._folder)) + 2

    def __contains__(self, device: object) -> bool:
        return device in tuple(self)

    def __getitem__(self, device: str) -> Any:
        check_device(device, device_ids_of(self._folder))
        recipe = recipe_of(self._folder)
        if recipe.task.kind == "array":
            return self._net(recipe, device)
        with tempfile.TemporaryDirectory() as scratch:
            to = Path(scratch) / "model"
            export_model(self._folder, device=device, format="hf", to=to, parity=False)
            return hf.load_model(to)

    def _net(self, recipe: Recipe, device: str) -> Any:
        from fedspine.nets.load import stored

        record = task_record.recorded(self._folder)
        state = saved_state(self._folder).state["method"]
        shape = record.splits["test"].shape
        return stored(chosen(recipe.method, state, device), shape, len(record.classes))
