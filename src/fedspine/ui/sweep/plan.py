"""From a sweep's file to its cells: every method under every setting and every seed, each with its
checked recipe.
"""

import dataclasses
import itertools
import tomllib
from pathlib import Path
from typing import Any

from fedspine.core import parts
from fedspine.core.errors import BadInput, one_line, unknown
from fedspine.core.task import AUTO, BUILT_IN_DATA, BUILT_IN_MODELS
from fedspine.data.files import READERS
from fedspine.methods import find
from fedspine.runs import config
from fedspine.runs.config import Recipe
from fedspine.runs.sections import SECTIONS
from fedspine.ui.sweep.names import Settings, distinct, name_of, text_of

KNOWN = {"seeds", *SECTIONS, "method", "methods", "data", "grid"}
ELSEWHERE = {  # keys set by a cell's place in the sweep, and where to write them instead
    "run.seed": "list the seeds at the top of the file: seeds = [0, 1, 2]",
    "run.workers": "give --jobs, which shares the cores out",
    "method.name": "give every method a table of its own: [methods.LABEL]",
}
# what [methods.LABEL] may set besides fields: how many devices a method may choose from, how many
# of their replies it waits for, and what becomes of their mean
OWN = ("fleet.per_round", "fleet.quorum", "fleet.server_optimiser")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: a method's label, the settings it shares with the other methods, a seed.

    `name` is that of its folder; `recipe` is all there is to run.
    """

    name: str
    label: str
    settings: Settings
    seed: int
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class _MethodTable:
    """A method's table, what all methods share included; `own` are the keys written under its
    label.
    """

    label: str
    table: dict[str, Any]
    own: frozenset[str] = frozenset()
    # laid over the recipe, for this method alone
    overlay: Settings = dataclasses.field(default_factory=dict)

    def place_of(self, key: str) -> str | None:
        """The table of the method's own that sets this field; None if none does."""
        if key in self.own:
            return f"[methods.{self.label}]"
        return f"[methods.{self.label}.grid]" if f"grid.{key}" in self.own else None


@dataclasses.dataclass(frozen=True)
class _Condition:
    """A condition shared by all methods: the named data, then a point of the grid."""

    overlay: Settings  # laid over the recipe
    settings: Settings  # the same in short: the data by its label


def plan(path: Path) -> list[Cell]:
    """The cells of a sweep's file in the order of running: all of the first seed, then all of the
    next.

    Raises BadInput for whatever would keep a recipe from being built, before anything is run.
    """
    try:
        return _plan(_read(path))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _plan(tables: dict[str, Any]) -> list[Cell]:
    for name in tables:
        if name not in KNOWN:
            raise unknown("part of a sweep", name, KNOWN)
    methods = _methods(tables)
    conditions = _conditions(tables, methods)
    variants = [variant for method in methods for variant in _variants(method)]
    cells = [
        _cell(tables, method, condition, seed)
        for seed, condition, method in itertools.product(_seeds(tables), conditions, variants)
    ]
    _refuse_repetition(cells)
    names = distinct([cell.name for cell in cells])
    return [dataclasses.replace(cell, name=name) for cell, name in zip(cells, names, strict=True)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(
            "there is no such file; name the TOML file of a sweep (docs/sweeps.md)"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"it cannot be read: {one_line(error)}") from None


# --- the parts of the file ---


def _seeds(tables: dict[str, Any]) -> list[int]:
    run = _table(tables, "run")
    if "seeds" not in tables:
        return [run.get("seed", 0)]
    if "seed" in run:
        raise BadInput("both seeds and run.seed are given; leave run.seed out")
    seeds = _values("seeds", tables["seeds"])
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise BadInput(f"seeds holds {seed!r}; whole numbers from 0 were expected")
    return seeds


def _methods(tables: dict[str, Any]) -> list[_MethodTable]:
    """Every method with the fields of [method] under its own; without [methods], [method] alone.

    A method that is named nowhere has its label for a name.
    """
    common = _table(tables, "method")
    if "methods" not in tables:
        return [_MethodTable(str(common.get("name", "fedspine")), common)]
    named = _table(tables, "methods")
    if not named:
        raise BadInput("[methods] is empty; add a table [methods.LABEL] for each method")
    found = []
    for label in named:
        table, overlay = _parted(label, _table(named, label, "methods."))
        laid = parts.laid_over({"name": label} | common, table)
        found.append(_MethodTable(label, laid, frozenset(parts.dotted(table)), overlay))
    for key in common.keys() - {"name"}:
        _check_field(key, found, "[method]")
    return found


def _parted(label: str, table: dict[str, Any]) -> tuple[dict[str, Any], Settings]:
    """The method's fields, and what else its table sets of the recipe."""
    fields = {key: value for key, value in table.items() if key.partition(".")[0] not in SECTIONS}
    overlay = _dotted({key: value for key, value in table.items() if key not in fields})
    for key in overlay:
        if key not in OWN:
            raise unknown(f"key beside the fields of [methods.{label}]", key, OWN)
    return fields, overlay


def _variants(method: _MethodTable) -> list[_MethodTable]:
    """The method at each point of its own grid, labelled by what varies."""
    table = {key: value for key, value in method.table.items() if key != "grid"}
    where = f"[methods.{method.label}.grid]"
    axes = _axes(_table(method.table, "grid", f"methods.{method.label}."), where)
    for key in axes:
        if key.partition(".")[0] not in _fields(method):
            raise unknown(f"field in {where}", key, _fields(method))
        if key in method.own:
            raise BadInput(
                f"{key} is set in [methods.{method.label}] and in {where}; keep one of the two"
            )
    variants = []
    for point in _points(axes):
        label = " ".join(
            [method.label, *(f"{key}={text_of(value)}" for key, value in point.items())]
        )
        variants.append(_MethodTable(label, parts.laid_over(table, point), overlay=method.overlay))
    return variants


def _conditions(tables: dict[str, Any], methods: list[_MethodTable]) -> list[_Condition]:
    """Every named data set with every point of the grid."""
    axes = _axes(_table(tables, "grid"), "[grid]")
    named = _table(tables, "data")
    data = {label: _dotted(_table(named, label, "data.")) for label in named}
    for where, keys in {
        "[grid]": axes,
        **{f"[data.{label}]": overlay for label, overlay in data.items()},
    }.items():
        for key in keys:
            _check_key(key, where, methods)
    for label, overlay in data.items():
        if twice := overlay.keys() & axes.keys():
            raise BadInput(
                f"{min(twice)} is set in [data.{label}] and in [grid]; keep one of the two"
            )
    if not data:
        return [_Condition(point, point) for point in _points(axes)]
    points = itertools.product(data.items(), _points(axes))
    return [
        _Condition(overlay | point, {"data": label} | point) for (label, overlay), point in points
    ]


def _check_key(key: str, where: str, methods: list[_MethodTable]) -> None:
    section, dot, name = key.partition(".")
    if not (dot and name):
        raise BadInput(
            f'{where} names {key!r}; a section and a key were expected, such as "fleet.alpha"'
        )
    if key in ELSEWHERE:
        raise BadInput(f"{where} cannot set {key}; {ELSEWHERE[key]}")
    if section == "method":
        _check_field(name, methods, where)
        if twice := [place for method in methods if (place := method.place_of(name))]:
            raise BadInput(f"{name} is set in {twice[0]} and in {where}; keep one of the two")
    elif section not in SECTIONS:
        raise unknown(f"section in {where}", section, {*SECTIONS, "method"})
    elif twice := [method.label for method in methods if key in method.overlay]:
        raise BadInput(f"{key} is set in [methods.{twice[0]}] and in {where}; keep one of the two")
    elif name not in SECTIONS[section].model_fields:
        raise unknown(
            f"key in {where}",
            key,
            [f"{section}.{known}" for known in SECTIONS[section].model_fields],
        )


def _check_field(key: str, methods: list[_MethodTable], where: str) -> None:
    """What is given to all methods must be a field of each, so that no setting is dropped silently.

    Of a part's setting, such as controller.rank, only the field is checked here; the recipe checks
    the rest.
    """
    fields = {method.label: _fields(method) for method in methods}
    lacking = [label for label, known in fields.items() if key.partition(".")[0] not in known]
    if len(lacking) == len(methods):
        raise unknown(f"method field in {where}", key, set().union(*fields.values()))
    if lacking:
        raise BadInput(
            f"{where} gives {key!r} to every method, and {', '.join(lacking)} has no such field; "
            "write it under the methods that have it: [methods.LABEL], "
            "or [methods.LABEL.grid] for several values"
        )


def _fields(method: _MethodTable) -> set[str]:
    name = method.table.get("name", "fedspine")
    if not isinstance(name, str):
        raise BadInput(
            f"methods.{method.label}: name is {name!r}; the name of a method in quotes was expected"
        )
    try:
        return {field.name for field in dataclasses.fields(find(name))}
    except BadInput as error:
        raise BadInput(f"methods.{method.label}: {error}") from None


# --- one cell ---


def _cell(tables: dict[str, Any], method: _MethodTable, condition: _Condition, seed: int) -> Cell:
    laid = {section: dict(_table(tables, section)) for section in SECTIONS} | {
        "method": dict(method.table)
    }
    over: dict[str, Settings] = {}
    for key, value in (condition.overlay | method.overlay | {"run.seed": seed}).items():
        section, _, name = key.partition(".")
        over.setdefault(section, {})[name] = value
    for section, table in over.items():
        below = laid[section]
        laid[section] = parts.laid_over(below, table) if section == "method" else below | table
    name = name_of(method.label, condition.settings, seed)
    try:
        recipe = config.anchored(config.recipe(laid))
        _check_paths(recipe)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    return Cell(
        name=name, label=method.label, settings=condition.settings, seed=seed, recipe=recipe
    )


def _check_paths(recipe: Recipe) -> None:
    """Raise BadInput for a missing path now, since all its cells would fail later."""
    for key, name, built_in in (
        ("model", recipe.task.model, (AUTO, *BUILT_IN_MODELS)),
        ("data", recipe.task.data, BUILT_IN_DATA),
    ):
        local = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS
        if name not in built_in and local and not Path(name).expanduser().exists():
            raise BadInput(
                f"task.{key} is {name!r}, but nothing is at that path from {Path.cwd()}; "
                "check the path, or start the sweep in the folder that it is relative to"
            )


def _refuse_repetition(cells: list[Cell]) -> None:
    seen: dict[Any, Cell] = {}
    for cell in cells:
        for what in (cell.name, (cell.label, cell.recipe.fingerprint)):
            other = seen.setdefault(what, cell)
            if other is not cell:
                raise BadInput(
                    f"({other.name}) and ({cell.name}) are the same run; leave one of them out"
                )


# --- small helpers ---


def _table(tables: dict[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise BadInput(f"[{prefix}{name}] must be a table of keys and values, got {table!r}")
    return table


def _dotted(table: dict[str, Any]) -> Settings:
    """Values by dotted key, whether the file writes "fleet.alpha" with quotes or without.

    >>> _dotted({"fleet.alpha": 1.0, "task": {"data": "rows.csv"}})
    {'fleet.alpha': 1.0, 'task.data': 'rows.csv'}
    """
    found: Settings = {}
    for name, value in table.items():
        nested = isinstance(value, dict) and "." not in name
        found |= {f"{name}.{key}": item for key, item in value.items()} if nested else {name: value}
    return found


def _axes(table: dict[str, Any], where: str) -> dict[str, list[Any]]:
    return {
        key: _values(f"{key} in {where}", values) for key, values in parts.dotted(table).items()
    }


def _values(what: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise BadInput(
            f"{what} is {values!r}; a list of values in brackets was expected, such as [{values!r}]"
        )
    if not values:
        raise BadInput(
            f"{what} is an empty list, which leaves nothing to run; give at least one value"
        )
    for place, value in enumerate(values):
        if value in values[:place]:
            raise BadInput(f"{what} holds {value!r} twice; leave one out")
    return values


def _points(axes: dict[str, list[Any]]) -> list[Settings]:
    """Every choice of one value for each key; one empty choice where there are no keys."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
