"""Unpruned runs of the same budget, against which a pruned run shows the cost of pruning."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine.core.errors import BadInput
from fedspine.report.tables import UnprunedRun, percent
from fedspine.runs.run_dir import RECIPE, check_folder, recipe_of, summary_of
from fedspine.ui.compare.groups import MEASURED, MODEL, WEIGHTS, aspect_of, keys_of
from fedspine.ui.compare.runs import CELL, cell_of

if TYPE_CHECKING:
    from fedspine.runs.config import Recipe

BUDGET = {  # a run's budget and its cohorts
    *("run.rounds", "run.seconds", "run.seed", "run.final_rows"),
    *("method.steps", "method.batch"),
}
READ = MEASURED | {WEIGHTS: "sha256 of the base's weights"}  # of the summary


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, its name in a table, its summary and recipe."""

    folder: Path
    name: str
    summary: Mapping[str, Any]

    @cached_property
    def recipe(self) -> "Recipe":  # which takes longer to read, and is not always needed
        return recipe_of(self.folder)

    @property
    def prunes(self) -> bool:
        return bool(self.summary.get("sparsity"))

    def as_reference(self) -> UnprunedRun:
        accuracy, loss = (self.summary.get(name) for name in ("accuracy", "loss"))
        return UnprunedRun(self.name, str(self.folder), accuracy, loss)


def unpruned_runs(folder: Path, reference: Path | None = None) -> tuple[UnprunedRun, ...]:
    """The unpruned runs for the run in `folder`: the named run, else fitting cells of its sweep.

    Raises BadInput where the named run does not fit: where it prunes or is not finished, and where
    data, test rows, seed, devices or budget differ.
    """
    if reference is None:
        run = _finished(folder)
        if run is None or not run.prunes:
            return ()
        return tuple(other.as_reference() for other in _siblings(run) if not other.prunes)
    run, other = (_finished_or_refused(each) for each in (folder, reference))
    if not run.prunes:
        raise BadInput(f"{folder} prunes nothing, so it needs no reference; leave --reference out")
    if other.prunes:
        raise BadInput(
            f"{reference} prunes too (sparsity {percent(other.summary['sparsity'])}), so it does "
            "not show what pruning costs; name a run of a method that prunes nothing"
        )
    if line := _misfit(run, other):
        raise BadInput(f"{line}; name an unpruned run of the same data, seed and budget")
    return (other.as_reference(),)


def rewrite_pages(folder: Path) -> None:
    """Write the reports again that change when the sweep cell in `folder` is done."""
    from fedspine.report.page import write_page  # imports what draws, which `show` does not need

    cell = _finished(folder)
    if cell is None:
        return
    for run in (cell,) if cell.prunes else _siblings(cell):
        if run.prunes and (found := unpruned_runs(run.folder)):
            write_page(run.folder, found)


def _siblings(run: Finished) -> Iterable[Finished]:
    """The finished cells of the same sweep with the same settings, seed and budget."""
    cell, own = cell_of(run.folder), run.folder.resolve()
    if not cell:
        return
    for found in sorted(own.parent.glob(f"[!.]*/{CELL}")):
        folder = found.parent
        if folder == own or cell_of(folder)["settings"] != cell["settings"]:
            continue
        other = _finished(folder)
        if other is not None and _misfit(run, other) is None:
            yield other


def _finished(folder: Path) -> Finished | None:
    """The run in a folder; None where it is not begun or not finished."""
    cell = cell_of(folder)
    if cell and not (folder / RECIPE).is_file():
        return None
    check_folder(folder)
    if (summary := summary_of(folder)) is None:
        return None
    return Finished(folder, cell.get("label") or summary["method"], summary)


def _finished_or_refused(folder: Path) -> Finished:
    run = _finished(folder)
    if run is None:
        raise BadInput(
            f"{folder} is not finished, so it has no final score to compare; "
            f"finish it with: fedspine run --resume {folder}"
        )
    return run


def _misfit(run: Finished, other: Finished) -> str | None:
    """The first difference of two runs that makes their comparison unfair, as text."""
    wanted, found = _terms(run), _terms(other)
    for key in keys_of([wanted, found]):
        # older runs did not record all of these
        if key in READ and not (key in wanted and key in found):
            continue
        if wanted.get(key) != found.get(key):
            return (
                f"{other.folder} is no fair reference of {run.folder}, {_aspect(key)}: "
                f"{READ.get(key, key)} is {json.dumps(wanted.get(key))} in {run.folder}, "
                f"{json.dumps(found.get(key))} in {other.folder}"
            )
    return None


def _terms(run: Finished) -> dict[str, Any]:
    flat = run.recipe.flat
    found = {
        key: value
        for key, value in flat.items()
        if key in BUDGET or key.startswith(("task.", "fleet."))
    }
    return found | {key: run.summary[key] for key in READ if key in run.summary}


def _aspect(key: str) -> str:
    if key == "run.seed":
        return "their seeds differ"
    if key in {*MODEL, WEIGHTS}:
        return "their models differ"
    return (
        "their budgets differ"
        if key in {*BUDGET, "fleet.per_round", "fleet.quorum"}
        else aspect_of(key)
    )
