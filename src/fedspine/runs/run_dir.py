"""The run directory: its files, how it is made, and reading a run's recipe, status and summary.

A recipe is checked by its method, whose import takes seconds, so only functions import that.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine.core import strict
from fedspine.core.errors import BadInput
from fedspine.runs import task_record
from fedspine.runs.recipe_format import FORMAT, format_of, state_is_read
from fedspine.storage.files import is_special
from fedspine.storage.records import RECORDS as RECORDS
from fedspine.storage.store import Store, write_atomically

if TYPE_CHECKING:
    from fedspine.runs.assemble import Assembled
    from fedspine.runs.config import Recipe

RECIPE, SUMMARY, STATE, FAILURE = (
    "recipe.toml",
    "summary.json",
    "state",
    "failure.txt",
)
ENDED = "ended.txt"  # the line that an unfinished run ended with
FLEET = "fleet.json"  # of a run at real sites: how to reach them
DEVICE_SCORES = "device_scores.json"  # per-client metrics of all devices, if requested
CACHE = "cache"  # removed when the run ends


def check_folder(run_dir: Path) -> None:
    """Raise BadInput for a folder that is no run's."""
    if not ((run_dir / RECIPE).is_file() and (run_dir / STATE).is_dir()):
        what = f"has no {RECIPE} and {STATE}/" if run_dir.exists() else "does not exist"
        raise BadInput(
            f"{run_dir} is not the folder of a run (it {what}); name one that `fedspine run` made"
        )
    for folder in (run_dir, run_dir / STATE):
        for path in folder.iterdir():  # opening a pipe would block
            if is_special(path):
                raise BadInput(
                    f"{path} is neither a file nor a folder; remove it, or restore what was there "
                    "from a copy"
                )


def recipe_of(run_dir: Path) -> "Recipe":
    """The recipe in a run directory; raises BadInput for any other folder."""
    from fedspine.runs.config import recipe as checked

    check_folder(run_dir)
    # as it was written: a folder that now happens to bear the name of a Hub id is not what it meant
    tables = _tables_of(run_dir)
    try:
        return checked(tables)
    except BadInput:
        _check_format(run_dir, tables)
        raise


def check_format(run_dir: Path) -> None:
    """Raise BadInput for a run of an older format, whose state this fedspine does not read."""
    _check_format(run_dir, _tables_of(run_dir))


def _tables_of(run_dir: Path) -> dict[str, Any]:
    return strict.read_toml(run_dir / RECIPE, "recipe", "restore it from a copy")


def _check_format(run_dir: Path, tables: dict[str, Any]) -> None:
    if not state_is_read(tables):
        raise BadInput(
            f"the run in {run_dir} is of format {format_of(tables)} and this fedspine reads format "
            f"{FORMAT}; resume it with the version that began it, or start a new run with a "
            "recipe as in docs/recipes.md"
        )


def status_of(run_dir: Path) -> dict[str, Any]:
    """The summary of a finished run, or the current numbers of an unfinished one."""
    check_folder(run_dir)
    if (summary := summary_of(run_dir)) is not None:
        return summary
    # these two make the messages in a saved state known
    from fedspine.flare import site_state  # noqa: F401
    from fedspine.fleets import simulated  # noqa: F401

    recipe = recipe_of(run_dir)
    check_format(run_dir)
    saved = Store(run_dir / STATE).load()
    known = {
        "method": recipe.method.name,
        "seed": recipe.run.seed,
        "rounds": recipe.run.rounds,
        "devices": recipe.fleet.devices,
        "rounds_done": saved.round if saved else 0,
    }
    with suppress(OSError):  # a killed run leaves no such line
        known["ended"] = (run_dir / ENDED).read_text(encoding="utf-8")
    if saved is None:
        return known
    sums = {
        name: saved.state["sums"][name] for name in ("waiting_seconds", "bytes_up", "bytes_down")
    }
    clock = "fleet" if (run_dir / FLEET).exists() else "simulated"
    return (
        known
        | sums
        | {f"{clock}_seconds": saved.fleet.now, "wall_seconds": saved.state["watch"]["before"]}
    )


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None where it is not finished; raises BadInput where the file
    is damaged.
    """
    try:
        return strict.parsed((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(
            f"{run_dir / SUMMARY} is damaged ({error}); remove it and resume the run"
        ) from None


def make(run_dir: Path, recipe: "Recipe", assembled: "Assembled | None" = None) -> None:
    """Make a run directory with its recipe atomically, so that a kill leaves none half made.

    The task record is written too if the run is `assembled` already; else `remember` writes it
    before the first round. Raises BadInput if the folder cannot be made.
    """
    partial = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.part")
    try:
        (partial / STATE).mkdir(parents=True)
        write_atomically(partial / RECIPE, recipe.toml().encode())
        if assembled is not None:
            _write_record(partial, assembled)
        partial.rename(run_dir)
    except OSError as error:
        raise BadInput(
            f"output folder {run_dir} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remember(run_dir: Path, assembled: "Assembled") -> None:
    """Write the task record into the run directory, unless it is there; raises OSError."""
    if task_record.read(run_dir) is None:
        _write_record(run_dir, assembled)


def _write_record(folder: Path, assembled: "Assembled") -> None:
    base, tokenizer = assembled.task.base, assembled.tokenizer
    task_record.write(folder, assembled.record, base, tokenizer, assembled.vocabulary)


def check_age(run_dir: Path) -> None:
    """Raise BadInput if an older version saved rounds without a task record."""
    if Store(run_dir / STATE).rounds():
        check_format(run_dir)
        task_record.recorded(run_dir)
