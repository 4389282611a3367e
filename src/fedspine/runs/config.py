"""Recipes: TOML tables that name the task, the fleet, the method's fields and the run, with unknown
keys refused.
"""

import dataclasses
import importlib.resources
import json
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from fedspine.core import parts, strict
from fedspine.core.errors import BadInput, unknown
from fedspine.core.strict import Section
from fedspine.core.task import AUTO, BUILT_IN_DATA, BUILT_IN_MODELS, NETS
from fedspine.methods import find
from fedspine.runs.method_table import method_of
from fedspine.runs.optimisation import check_adjusted, check_held_out, check_optimisation
from fedspine.runs.recipe_checks import (
    check_aggregation,
    check_frozen_bits,
    check_packing,
    check_privacy,
    check_quorum,
    check_vocabulary,
)
from fedspine.runs.recipe_format import FORMAT, format_of
from fedspine.runs.sections import (
    FLEET,
    SECTIONS,
    FleetSection,
    PrivacySection,
    RunSection,
    TaskSection,
    of_arrays,
    of_one_kind,
)

# what the embedded job's method was tuned in, on that job's own data
OF_ITS_DATA = ("learning_rate", "head_lr_multiplier")
EMBEDDED = ("chat", "default", "demo")  # recipes that come with the package


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """A complete, replayable description of a run.

    `method` is an instance of a registered method, its name, or its table in a recipe file.
    Everything else is given by the names that recipe files use (docs/recipes.md), which differ
    between sections, or as whole sections, `task`, `fleet`, `run` and `privacy`; what is not given
    has the default of recipe files. Raises BadInput for unknown names, with the nearest one, and
    for values that cannot be.

    >>> from fedspine import FedLora, Recipe
    >>> recipe = Recipe(method=FedLora(rank=4), data="rows.csv", devices=20, rounds=5)
    >>> recipe.method.rank, recipe.task.data, recipe.fleet.devices, recipe.run.rounds
    (4, 'rows.csv', 20, 5)
    >>> recipe.fleet.per_round
    10
    """

    task: TaskSection
    fleet: FleetSection
    method: Any
    run: RunSection
    privacy: PrivacySection

    def __init__(
        self,
        *,
        method: Any = "fedspine",
        task: TaskSection | dict[str, Any] | None = None,
        fleet: FleetSection | dict[str, Any] | None = None,
        run: RunSection | dict[str, Any] | None = None,
        privacy: PrivacySection | dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        made = {"method": method_of(method)}
        flat = _by_section(values, made["method"])
        given = (task, fleet, run, privacy)
        for (name, cls), whole in zip(SECTIONS.items(), given, strict=True):
            made[name] = _section(name, cls, whole, flat[name])
        check_privacy(made["privacy"], made["method"])
        made["task"] = of_one_kind(made["task"])
        check_packing(made["task"], made["privacy"])
        check_vocabulary(made["task"], made["privacy"])
        check_quorum(made["method"], made["fleet"])
        check_aggregation(made["method"], made["fleet"])
        private = made["privacy"].promised
        check_optimisation(made["method"], made["fleet"], made["run"].rounds, private=private)
        check_held_out(made["task"], made["fleet"])
        check_adjusted(made["task"], made["method"])
        check_frozen_bits(made["run"], made["task"], made["method"])
        for name, part in made.items():
            object.__setattr__(self, name, part)

    def table(self) -> dict[str, dict[str, Any]]:
        """As nested tables for TOML, without None values."""
        sections = {name: getattr(self, name).model_dump(exclude_none=True) for name in SECTIONS}
        tables = {
            "task": sections["task"],
            "fleet": sections["fleet"],
            "method": parts.table_of(self.method),
            "run": sections["run"],
        }
        return tables | ({"privacy": sections["privacy"]} if self.privacy.promised else {})

    def toml(self) -> str:
        return tomli_w.dumps({"format": FORMAT} | self.table())

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The tables without settings that do not affect results: workers and references."""
        tables = self.table()
        for name in ("workers", "references"):
            tables["run"].pop(name)
        return tables

    @property
    def flat(self) -> dict[str, Any]:
        """The same by dotted key, those of the method's parts too."""
        tables = self.results | {"method": parts.dotted(self.results["method"])}
        return {
            f"{section}.{key}": value
            for section, table in tables.items()
            for key, value in table.items()
        }

    @property
    def fingerprint(self) -> str:
        """The same for two recipes exactly when they describe the same results."""
        return json.dumps(self.results, sort_keys=True)

    @property
    def open_choices(self) -> list[tuple[str, str]]:
        """Section and key of the choices that the recipe leaves open.

        A run decides them by the machine, the data or the model when it begins.
        """
        reads_out = self.task.kind in ("classification", "pair")
        chosen = [("run", "precision"), ("task", "model")]
        chosen += [("task", "pooling")] if reads_out else []
        return [(s, key) for s, key in chosen if getattr(getattr(self, s), key) == "auto"]

    def settled_as(self, begun: "Recipe") -> "Recipe":
        """The recipe with its open choices as decided by a run that began with `begun`."""
        choices: dict[str, dict[str, Any]] = {}
        for section, key in self.open_choices:
            choices.setdefault(section, {})[key] = getattr(getattr(begun, section), key)
        if "model" in choices.get("task", {}) and begun.task.kind == "array":
            choices["task"]["kind"] = "array"  # which followed from the data
        return self.choosing(choices)

    def choosing(self, choices: dict[str, dict[str, Any]]) -> "Recipe":
        """The recipe with these values of its sections."""
        sections = {name: getattr(self, name).model_copy(update=of) for name, of in choices.items()}
        return dataclasses.replace(self, **sections)

    def with_net(self, net: str) -> "Recipe":
        """The recipe with this net for arrays; raises BadInput if anything in it is for texts."""
        task = of_arrays(self.task, net)
        return dataclasses.replace(self, task=task.model_copy(update={"model": net}))

    def difference(self, other: "Recipe") -> str | None:
        """A line on the first setting that makes the other recipe's results differ; None if none
        does.
        """
        there, here = self.flat, other.flat
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                return f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        return None


def embedded(name: str = "default") -> dict[str, Any]:
    """The tables of the default job, or of another recipe that comes with the package."""
    return tomllib.loads(
        importlib.resources.files("fedspine.recipes")
        .joinpath(f"{name}.toml")
        .read_text(encoding="utf-8")
    )


def load(path: Path | None, settings: list[str] | None = None, seed: int | None = None) -> Recipe:
    """Read a recipe, or an embedded one by its name (None: the default job), with
    `section.key=value` settings and the seed laid over it.
    """
    overlay = _settings(settings or [])
    if seed is not None:
        overlay.setdefault("run", {})["seed"] = seed
    if path is None or (str(path) in EMBEDDED and not path.is_file()):
        tables = embedded("default" if path is None else str(path))
        return anchored(recipe(_laid_over(_without_tuned_values(tables, overlay), overlay)))
    known = ", ".join(EMBEDDED)
    do = f"give a TOML file, the name of an embedded recipe ({known}), or none"
    return anchored(recipe(_laid_over(strict.read_toml(path, "recipe", do), overlay)))


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that a run can be resumed and exported from any
    folder.
    """
    task = recipe.task
    local: dict[str, Any] = {
        key: str(Path(name).expanduser().resolve())
        for key, name, built_in in (
            ("model", task.model, (AUTO, *BUILT_IN_MODELS, *NETS)),
            ("data", task.data, BUILT_IN_DATA),
        )
        if name.strip() and name not in built_in and Path(name).expanduser().exists()
    }
    if (words := task.vocabulary) is not None and words.texts != FLEET:
        texts = str(Path(words.texts).expanduser().resolve())
        local["vocabulary"] = words.model_copy(update={"texts": texts})
    return dataclasses.replace(recipe, task=task.model_copy(update=local))


def recipe(tables: dict[str, Any]) -> Recipe:
    """Check tables and build the recipe; raises BadInput with the nearest valid name for an unknown
    one.
    """
    format_of(tables)
    tables = {name: table for name, table in tables.items() if name != "format"}
    for name, table in tables.items():
        if name not in {*SECTIONS, "method"}:
            raise unknown("section", name, {*SECTIONS, "method"})
        if not isinstance(table, dict):
            raise BadInput(f"[{name}] must be a table of keys and values, got {table!r}")
    return Recipe(**tables)


def _by_section(values: dict[str, Any], method: Any) -> dict[str, dict[str, Any]]:
    """Values by the section whose field they name; a path is its text, as in a file."""
    homes = {key: name for name, cls in SECTIONS.items() for key in cls.model_fields}
    found: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        if key not in homes and key in {field.name for field in dataclasses.fields(method)}:
            raise BadInput(
                f"{key!r} is a setting of the method; "
                f"write method={type(method).__name__}({key}=...)"
            )
        if key not in homes:
            raise unknown("key of a recipe", key, [*homes, *SECTIONS, "method"])
        found[homes[key]][key] = str(value) if isinstance(value, Path) else value
    return found


def _section(name: str, cls: type[Section], whole: Any, values: dict[str, Any]) -> Any:
    """The section with `values` laid over what was given whole: an instance, a table, or None."""
    if isinstance(whole, cls):
        if not values:
            return whole
        whole = whole.model_dump(exclude_unset=True)
    if whole is not None and not isinstance(whole, dict):
        raise BadInput(f"{name} must be a {cls.__name__} or a table, got {whole!r}")
    return strict.section(name, cls, (whole or {}) | values)


def _settings(settings: list[str]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise BadInput(
                f"--set {setting!r} is not of the form section.key=value, such as run.rounds=10"
            )
        tables.setdefault(section, {})[key] = _value(value.strip())
    return {
        name: parts.nested(table) if name == "method" else table for name, table in tables.items()
    }


def _value(text: str) -> Any:
    """What TOML makes of a value; anything else is text, so that quotes can be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _without_tuned_values(defaults: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The embedded job, without what was chosen for its own data and method and does not fit
    others.

    Other data may need another model; another method may lack some of the fields.
    """
    named = overlay.get("task", {})
    task, fleet, method = (dict(defaults[name]) for name in ("task", "fleet", "method"))
    if "data" in named and "model" not in named and task.get("kind") != "causal-lm":
        task.pop("model")
    name = overlay.get("method", {}).get("name", method["name"])
    other = name != method["name"] and isinstance(name, str)
    if other:
        fleet.pop("quorum", None)
        method = parts.fitted(method, find(name)) | {"name": name}
    if other or "data" in named:
        method = {key: value for key, value in method.items() if key not in OF_ITS_DATA}
    return defaults | {"task": task, "fleet": fleet, "method": method}


def _laid_over(tables: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    laid = dict(tables)
    for name, table in overlay.items():
        below = tables.get(name)
        if not isinstance(below, dict):
            laid[name] = table
        elif name == "method":
            laid[name] = parts.laid_over(below, table)
        else:
            laid[name] = {**below, **table}
    return laid
