"""From a run's folder to a model: rebuild the base in fp32, deploy from the last saved state, write it down."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.build import build_task, dataset, identities
from fedspine.config import Recipe
from fedspine.errors import BadInput, nearest, unknown
from fedspine.export import hf
from fedspine.fleets import members, simulated  # noqa: F401 - which makes the messages in a saved state known
from fedspine.folder import FLEET, STATE, recipe_of
from fedspine.lm.base import Model
from fedspine.lm.structure import sparsity
from fedspine.store import Saved, Store
from fedspine.task import Task

FORMATS = ("hf", "peft")
GLOBAL, DENSE = "global", "dense"


@dataclass(frozen=True)
class Opened:
    """A run's recipe and last saved state, with its task in fp32."""

    recipe: Recipe
    task: Task
    tokenizer: Any
    state: Any

    def model(self, device: str) -> Model:
        """The deployed model of a device, of everybody (`global`), or the unpruned one (`dense`)."""
        method = self.recipe.method
        if device == DENSE:
            return method.unpruned(self.state)
        return method.deploy(self.state, None if device == GLOBAL else device)


def open_run(folder: Path) -> Opened:
    """Open the folder of a run; raises BadInput for one that is no run or has not saved a round yet."""
    recipe = recipe_of(folder)
    if recipe.task.kind == "array":
        raise BadInput(
            f"{folder} trained {recipe.task.model!r}, a net on arrays; only transformers can be exported so far"
        )
    saved = saved_state(folder)
    task, tokenizer = build_task(recipe, dataset(recipe), precision="fp32")
    return Opened(recipe=recipe, task=task, tokenizer=tokenizer, state=saved.state["method"])


def export_model(folder: Path, *, device: str, format: str, to: Path) -> dict[str, Any]:
    """Write one model of the run in `folder` to the new folder `to`; returns what it is.

    Raises BadInput for an unknown format or device, a folder that is no run, and one that exists where `to` should be.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if to.exists():
        raise BadInput(f"{to} exists already; name a new folder with --to")
    _check_device(device, device_ids_of(folder))
    opened = open_run(folder)
    model = opened.model(device)
    name = f"{opened.recipe.method.name} {device}"
    if format == "peft":
        from fedspine.export.peft import write_adapter

        write_adapter(to, model, opened.task.base, opened.recipe.task.model)
    else:
        hf.export(
            opened.task.base,
            model,
            opened.tokenizer,
            to,
            labels=opened.task.label_names,
            kind=opened.task.kind,
            max_tokens=opened.task.max_tokens,
            name=name,
        )
    return {
        "device": device,
        "format": format,
        "folder": str(to),
        "sparsity": sparsity(opened.task.base.anatomy, model.structure),
        "bytes": sum(file.stat().st_size for file in to.rglob("*") if file.is_file()),
    }


def saved_state(folder: Path) -> Saved:
    saved = Store(folder / STATE).load()
    if saved is None:
        raise BadInput(
            f"{folder} has not finished its first round, so there is no model yet; resume it first"
        )
    return saved


def device_ids_of(folder: Path) -> list[str]:
    """The run's devices: simulated ones by the recipe, of a real fleet the sites that took part."""
    recipe = recipe_of(folder)
    if not (folder / FLEET).exists():
        return identities(recipe)
    return [site.name for site in saved_state(folder).fleet.sites]


def _check_device(device: str, ids: list[str]) -> None:
    if device not in (GLOBAL, DENSE, *ids):
        guess = nearest(device, (GLOBAL, DENSE, *ids))
        hint = f"; did you mean {guess!r}?" if guess else ";"
        raise BadInput(
            f"unknown device {device!r}{hint} known: {GLOBAL}, {DENSE}, and {ids[0]} to {ids[-1]}"
        )
