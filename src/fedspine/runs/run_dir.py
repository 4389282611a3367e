"""A run's folder: what is in it, how it begins, and what it says of its run."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine.core import strict
from fedspine.core.errors import BadInput
from fedspine.runs import task_record
from fedspine.runs.config import Recipe
from fedspine.runs.config import recipe as checked
from fedspine.runs.recipe_format import FORMAT, format_of
from fedspine.storage.store import Store, write_atomically

if TYPE_CHECKING:
    from fedspine.runs.assemble import Built

RECIPE, RECORDS, SUMMARY, STATE, FAILURE = (
    "recipe.toml",
    "records.jsonl",
    "summary.json",
    "state",
    "failure.txt",
)
FLEET = "fleet.json"  # of a run at real sites: how to reach them
DEVICE_SCORES = "device_scores.json"  # of every device's model, where somebody asked for them
CACHE = "cache"  # what a run need not compute again; gone when it ends


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run's folder; raises BadInput for a folder that is no run."""
    if not ((folder / RECIPE).is_file() and (folder / STATE).is_dir()):
        what = f"has no {RECIPE} and {STATE}/" if folder.exists() else "does not exist"
        raise BadInput(
            f"{folder} is not the folder of a run (it {what}); name one that `fedspine run` made"
        )
    # as it was written: a folder that now happens to bear the name of a Hub id is not what it meant
    tables = _tables_of(folder)
    try:
        return checked(tables)
    except BadInput:
        _check_format(folder, tables)
        raise


def check_format(folder: Path) -> None:
    """Raise BadInput for a run of an older format, whose state this fedspine does not read."""
    _check_format(folder, _tables_of(folder))


def _tables_of(folder: Path) -> dict[str, Any]:
    return strict.read_toml(folder / RECIPE, "recipe", "restore it from a copy")


def _check_format(folder: Path, tables: dict[str, Any]) -> None:
    if format_of(tables) < FORMAT:
        raise BadInput(
            f"the run in {folder} is of format {format_of(tables)} and this fedspine reads format "
            f"{FORMAT}; go on with the fedspine that began it, or begin a new run with a recipe as in docs/recipes.md"
        )


def standing(folder: Path) -> dict[str, Any]:
    """A finished run's summary, or what is known so far of one that is not."""
    from fedspine.flare import site_state  # noqa: F401 - which makes the messages in a saved state known
    from fedspine.fleets import simulated  # noqa: F401 - which makes the messages in a saved state known

    recipe, summary = recipe_of(folder), summary_of(folder)
    if summary is not None:
        return summary
    check_format(folder)
    saved = Store(folder / STATE).load()
    known = {
        "method": recipe.method.name,
        "seed": recipe.run.seed,
        "rounds": recipe.run.rounds,
        "devices": recipe.fleet.devices,
        "rounds_done": saved.round if saved else 0,
    }
    if saved is None:
        return known
    sums = {
        name: saved.state["sums"][name] for name in ("waiting_seconds", "bytes_up", "bytes_down")
    }
    clock = "fleet" if (folder / FLEET).exists() else "simulated"
    return (
        known
        | sums
        | {f"{clock}_seconds": saved.fleet.now, "wall_seconds": saved.state["watch"]["before"]}
    )


def summary_of(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None where it is not finished; raises BadInput where the file
    is damaged.
    """
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(
            f"{folder / SUMMARY} is damaged ({error}); remove it and resume the run"
        ) from None


def make(folder: Path, recipe: Recipe, built: "Built | None" = None) -> None:
    """Make a run's folder, which appears at once with its recipe, so that a kill on the way leaves
    none behind.

    What the run means is kept in it, too, where it is `built` already; else `remember` does it
    before the first round. Raises BadInput where it cannot be made.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        (partial / STATE).mkdir(parents=True)
        write_atomically(partial / RECIPE, recipe.toml().encode())
        if built is not None:
            task_record.write(partial, built.record, built.task.base, built.tokenizer)
        partial.rename(folder)
    except OSError as error:
        raise BadInput(
            f"output folder {folder} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remember(folder: Path, built: "Built") -> None:
    """Keep what a run means in its folder, unless that is done; OSError where it cannot be."""
    if task_record.read(folder) is None:
        task_record.write(folder, built.record, built.task.base, built.tokenizer)


def check_age(folder: Path) -> None:
    """Raise BadInput where an older version saved rounds, which did not keep what they mean."""
    if Store(folder / STATE).rounds():
        check_format(folder)
        task_record.recorded(folder)
