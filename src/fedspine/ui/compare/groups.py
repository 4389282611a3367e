"""Groups runs into comparisons, and the runs of a comparison by method."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine.core.errors import BadInput
from fedspine.core.task import TaskKind
from fedspine.report.tables import counted
from fedspine.ui.compare.runs import Run, SelectedRuns

if TYPE_CHECKING:
    from fedspine.runs.config import Recipe

CLOCK = {"fleet.spread", "fleet.drop", "fleet.delay_seconds", "fleet.round_trip_seconds"}
MODEL = {
    "task.model",
    "task.layers",
}  # a smaller model is a fair rival where runs are named one by one
CHECKS = {"run.evaluate_every", "run.evaluate_rows", "run.evaluate_devices", "run.final_devices"}
IN_EVERY_TITLE = {
    "data",
    "task.data",
    "task.model",
    "task.layers",
    "fleet.devices",
    "fleet.alpha",
}  # in every title
OFFERED = "fleet.per_round"  # the devices asked per round; in a sweep a method may set its own
# methods may differ in these: the share of replies that a round waits for, of which the caveats say
# so, and what becomes of their mean
OF_METHODS = {"fleet.quorum", "fleet.server_optimiser"}
CONTENT, WEIGHTS = "data_sha256", "model_sha256"  # of the summary: what was read from outside
MEASURED = {
    "test_rows": "test rows",
    "classes": "number of classes",
    CONTENT: "sha256 of the data",
}  # of the summary: what the data came to


@dataclass(frozen=True)
class MethodRuns:
    """One method of a comparison, its runs by seed."""

    name: str
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class Group:
    """Runs that may be compared: the same data, devices, clock and checks."""

    title: str
    kind: TaskKind
    methods: tuple[MethodRuns, ...]


def grouped(selection: SelectedRuns) -> tuple[Group, ...]:
    """The comparisons of a selection.

    With a sweep among the named, there is one for each of its settings, model, data and fleet. Runs
    named one by one are one comparison; raises BadInput where they cannot be. So does the same seed
    twice for one method.
    """
    if not selection.sweep:
        _check_comparable(selection.runs)
        return (_group(selection.runs, titles=[]),)
    by_setting: dict[str, list[Run]] = defaultdict(list)
    for run in selection.runs:
        common = {
            name: value for name, value in basis(run).items() if name not in (OFFERED, CONTENT)
        }  # where the first is varied, settings have it; the second is checked
        key = {"settings": run.settings, "basis": common, "model": _part(run.recipe, MODEL)}
        by_setting[json.dumps(key, sort_keys=True)].append(run)
    settings = [dict(runs[0].settings or {}) for runs in by_setting.values()]
    several = [
        key for key in keys_of(settings) if len({json.dumps(one.get(key)) for one in settings}) > 1
    ]
    return tuple(_group(runs, titles=several) for runs in by_setting.values())


def basis(run: Run) -> dict[str, Any]:
    """What two runs must share to be compared: data, devices, clock, checks, and the digest of the
    data.
    """
    flat = run.recipe.flat
    # where a token of another model is another unit of loss
    language = run.recipe.task.kind == "causal-lm"
    found = {
        key: value
        for key, value in flat.items()
        if key in CHECKS
        or (key.startswith("fleet.") and key not in OF_METHODS)
        or (key.startswith("task.") and (language or key not in MODEL))
    }
    return found | {key: run.summary[key] for key in MEASURED if key in run.summary}


def _check_comparable(runs: Iterable[Run]) -> None:
    first, *others = runs
    wanted = basis(first)
    for other in others:
        found = basis(other)
        for key in keys_of([wanted, found]):
            # older runs did not record all of these
            if key in MEASURED and not (key in wanted and key in found):
                continue
            if wanted.get(key) != found.get(key):
                raise BadInput(
                    f"these runs cannot be compared, {aspect_of(key)}: {MEASURED.get(key, key)} is "
                    f"{wanted.get(key)!r} in {first.folder}, {found.get(key)!r} in {other.folder}; "
                    "name runs that differ in the method only"
                )


def aspect_of(key: str) -> str:
    """What two runs do not share that differ in this key of a recipe, in words."""
    if key in CHECKS:
        return "they were scored differently"
    if key in CLOCK:
        return "their clocks differ"
    return "their devices differ" if key.startswith("fleet.") else "their data differ"


def _check_same(runs: Iterable[Run], key: str, what: str) -> None:
    """Raise BadInput where `what` has one name in the recipes but differed between these runs."""
    recorded = [run for run in runs if run.summary.get(key)]
    for run in recorded:
        if run.summary[key] != recorded[0].summary[key]:
            raise BadInput(
                f"{what} changed between the runs in {recorded[0].folder} and {run.folder}; leave "
                "one of them out, or run it again"
            )


def _group(runs: Iterable[Run], titles: list[str]) -> Group:
    runs = list(runs)
    _check_same(runs, CONTENT, f"the data {runs[0].recipe.task.data}")
    recipe, settings = runs[0].recipe, runs[0].settings or {}
    extra = [
        f"{key.rpartition('.')[2]} {_text(settings[key])}"
        for key in titles
        if key in settings and key not in IN_EVERY_TITLE
    ]
    return Group(_title(recipe, extra), recipe.task.kind, _methods(runs))


def _title(recipe: "Recipe", extra: Iterable[str]) -> str:
    task, fleet = recipe.task, recipe.fleet
    model = Path(task.model).name + (f" ({counted(task.layers, 'layer')})" if task.layers else "")
    parts = [Path(task.data).name, model, counted(fleet.devices, "device")]
    if fleet.partition not in ("auto", "dirichlet"):
        parts.append(fleet.partition)
    elif task.kind != "causal-lm":
        parts.append(f"alpha {fleet.alpha:g}")
    return ", ".join(dict.fromkeys([*parts, *extra]))


def _methods(runs: Iterable[Run]) -> tuple[MethodRuns, ...]:
    """Runs of the same label and recipe, but for the seed, are one method; its name says what sets
    it apart.
    """
    alike: dict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
    for run in runs:
        name = run.label or run.recipe.method.name
        seeds = alike[name, json.dumps(_without_seed(run.recipe), sort_keys=True)]
        if run.seed in seeds:
            raise BadInput(
                f"{seeds[run.seed].folder} and {run.folder} are the same method and seed ({name}, "
                f"{run.seed}); leave one of them out"
            )
        seeds[run.seed] = run
    for seeds in alike.values():
        runs_of = list(seeds.values())
        _check_same(runs_of, WEIGHTS, f"the base {runs_of[0].recipe.task.model}")
    found = [(name, dict(sorted(seeds.items()))) for (name, _), seeds in alike.items()]
    return tuple(
        MethodRuns(_name(name, seeds, [theirs for other, theirs in found if other == name]), seeds)
        for name, seeds in found
    )


def _name(name: str, seeds: Mapping[int, Run], namesakes: list[Mapping[int, Run]]) -> str:
    tables = [_without_seed(next(iter(theirs.values())).recipe) for theirs in namesakes]
    own = _without_seed(next(iter(seeds.values())).recipe)
    differing = [
        key for key in keys_of(tables) if len({json.dumps(table.get(key)) for table in tables}) > 1
    ]
    words = [f"{key.rpartition('.')[2]}={_text(own[key])}" for key in differing if key in own]
    return " ".join([name, *words])


def _without_seed(recipe: "Recipe") -> dict[str, Any]:
    return {key: value for key, value in recipe.flat.items() if key != "run.seed"}


def _part(recipe: "Recipe", keys: Iterable[str]) -> dict[str, Any]:
    flat = recipe.flat
    return {key: flat.get(key) for key in keys}


def keys_of(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of all tables, in the order in which they come up."""
    return list(dict.fromkeys(key for table in tables for key in table))


def _text(value: Any) -> str:
    """A value in a name.

    >>> _text([4, 8]), _text(4e-3), _text("models/tiny")
    ('4-8', '0.004', 'tiny')
    """
    match value:
        case list():
            return "-".join(map(_text, value))
        case str():
            return Path(value).name
    return json.dumps(value)
