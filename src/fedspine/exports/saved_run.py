"""The last saved state of a run, its devices, and the model of each."""

import json
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput, nearest

# these two register the messages of a saved state
from fedspine.flare import site_state  # noqa: F401
from fedspine.fleets import simulated  # noqa: F401
from fedspine.runs.assemble import identities
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import FLEET, RECIPE, STATE, check_format, recipe_of
from fedspine.storage.store import Saved, Store

GLOBAL, DENSE = "global", "dense"


def chosen(method: Any, state: Any, device: str) -> Any:
    """The deployed model of a device, the global one (`global`), or the unpruned one (`dense`)."""
    if device == DENSE:
        return method.unpruned(state)
    return method.deploy(state, None if device == GLOBAL else device)


def saved_state(folder: Path) -> Saved:
    check_format(folder)
    saved = Store(folder / STATE).load()
    if saved is None:
        raise BadInput(
            f"{folder} has not finished its first round, so there is no model yet; resume it first"
        )
    return saved


def check_unedited(folder: Path, recipe: Recipe, then: str) -> None:
    """Raise BadInput if the recipe is not the one that the saved state belongs to.

    Keys that a later version added are ignored; data and base are compared by digest instead.
    """
    now = json.loads(recipe.fingerprint)
    for section, table in json.loads(then).items():
        for key, value in table.items():
            moved = section == "task" and key in ("model", "data")
            if not moved and now[section].get(key) != value:
                raise BadInput(
                    f"{folder / RECIPE} was changed after the run: {section}.{key} was {value!r}; "
                    "undo the change"
                )


def device_ids_of(folder: Path) -> list[str]:
    """The run's devices: those of the recipe in a simulation, the joined sites in a real fleet."""
    recipe = recipe_of(folder)
    if not (folder / FLEET).exists():
        return identities(recipe)
    return [site.name for site in saved_state(folder).fleet.sites]


def check_device(device: str, ids: list[str]) -> None:
    if device not in (GLOBAL, DENSE, *ids):
        guess = nearest(device, (GLOBAL, DENSE, *ids))
        hint = f"; did you mean {guess!r}?" if guess else ";"
        raise BadInput(
            f"unknown device {device!r}{hint} known: {GLOBAL}, {DENSE}, and {ids[0]} to {ids[-1]}"
        )
