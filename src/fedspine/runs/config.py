"""Recipes: TOML tables that name the task, the fleet, the method's fields and the run, with unknown
keys refused.
"""

import dataclasses
import importlib.resources
import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w

from fedspine.core import parts, strict
from fedspine.core.aggregation import TINY, Aggregation, Mean, aggregation_of
from fedspine.core.errors import BadInput, unknown
from fedspine.core.method import registered
from fedspine.core.privacy import Level
from fedspine.core.strict import Section
from fedspine.core.task import AUTO, BUILT_IN_DATA, BUILT_IN_MODELS, NETS, Kind
from fedspine.methods import all_methods, find
from fedspine.runs.recipe_format import FORMAT, MOVED, OF_THE_FLEET, format_of


class TaskSection(Section):
    """The task: a model, data, and how the data is read."""

    model: str = AUTO  # built-in name, folder, or Hub id; a net makes the kind "array"
    data: str = "pydoc-topics"  # built-in name, file, folder, or Hub id
    kind: Kind = "classification"
    text: str = "text"  # column of the text
    pair: str | None = None  # column of the second text; naming one makes the kind "pair"
    label: str = "label"  # column of the label
    encoding: str | None = None  # of text files which are not UTF-8, such as "latin-1"
    max_tokens: int = pydantic.Field(64, ge=4)
    train_rows: int = pydantic.Field(0, ge=0)  # a random sample of so many; 0: all
    layers: int | None = pydantic.Field(None, ge=1)  # keep only the first blocks of the model
    # the readout; auto: that of the model's training
    pooling: Literal["auto", "mean", "cls"] = "auto"


def _for_all_groups(seconds: Any) -> Any:
    """A number, but not true or false, is meant for each of the four Wi-Fi groups."""
    return [seconds] * 4 if type(seconds) in (int, float) else seconds


class FleetSection(Section):
    """The fleet: simulated devices, their kinds, and the partition of the rows."""

    devices: int = pydantic.Field(80, ge=1)
    mix: dict[str, int] | None = None  # devices of each kind; default 30 TX2 : 40 NX : 10 AGX
    # iid, dirichlet, p:LEVEL, dominant:SHARE, natural, column:NAME; docs/recipes.md
    partition: str = "auto"
    alpha: float = pydantic.Field(1.0, gt=0)  # of the Dirichlet partition: small is skewed
    per_round: int = pydantic.Field(10, ge=1)  # devices asked in a round
    # share of a round's replies that it waits for; later ones count in the round in which they come
    quorum: float = pydantic.Field(1.0, ge=0.01, le=1)
    # how a round's replies are merged; none: by the mean, at real sites with norm_clip
    aggregation: Annotated[
        Aggregation | None,
        pydantic.BeforeValidator(aggregation_of),
        pydantic.PlainSerializer(parts.table_of),
    ] = None
    drop: float = pydantic.Field(0.0, ge=0, le=1)  # chance that an order or its reply is lost
    delay_seconds: float = pydantic.Field(0.0, ge=0)  # mean extra delay of a reply
    spread: float = pydantic.Field(1.0, ge=0)  # above 1 makes slow devices slower
    # of every exchange, by Wi-Fi group at 2, 8, 14 and 20 m; one number is for all of them, 0 for
    # none. The default is the typical round trip between a wired server and 47,000 user devices of
    # a campus in Sui et al., MobiSys 2016 (10.1145/2906388.2906393), who tell no distances apart
    round_trip_seconds: Annotated[
        list[Annotated[float, pydantic.Field(ge=0)]],
        pydantic.Field(min_length=4, max_length=4),
        pydantic.BeforeValidator(_for_all_groups),
    ] = [0.003] * 4

    @property
    def replies(self) -> int:
        """For how many a round waits."""
        return math.ceil(self.quorum * min(self.per_round, self.devices) - TINY)


class RunSection(Section):
    """The length of a run, its precision, and its checks."""

    rounds: int = pydantic.Field(24, ge=1)
    # of the fleet's clock after which no round begins; 0: no limit
    seconds: float = pydantic.Field(0.0, ge=0)
    seed: int = pydantic.Field(0, ge=0)
    # of the frozen base; auto: the faster one here
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    evaluate_every: int = pydantic.Field(4, ge=0)  # rounds; 0: only at the end
    evaluate_rows: int = pydantic.Field(512, ge=1)  # test rows of a check on the way
    evaluate_devices: int = pydantic.Field(4, ge=1)  # device models of a check on the way
    final_devices: int = pydantic.Field(8, ge=1)  # device models scored at the end
    final_rows: int = pydantic.Field(0, ge=0)  # test rows of the end; 0: all
    workers: int = pydantic.Field(0, ge=0)  # processes; 0: one per core. Never changes a result
    device: Literal["auto", "cpu", "cuda"] = "auto"  # what computes; auto: a GPU where there is one
    # devices trained in one batched pass; 0: 1 on a CPU, 32 on a GPU
    together: int = pydantic.Field(0, ge=0)
    references: bool = True  # whether simple yardsticks stand beside the results

    def final_rows_of(self, rows: int) -> int:
        """Of a test set of so many rows, those that are scored at the end."""
        return min(self.final_rows or rows, rows)

    def over(self, round: int, now: float) -> bool:
        """Whether no round is left after `round` rounds, or no time for one."""
        return round >= self.rounds or 0 < self.seconds <= now

    def expected_rounds(self, round: int, now: float) -> int:
        """How many rounds there will be: all, or as many as fit the time if they take what `round`
        of them took.
        """
        if self.over(round, now):
            return round
        if not self.seconds or not now:
            return self.rounds
        return min(self.rounds, max(round + 1, math.ceil(round * self.seconds / now)))


class PrivacySection(Section):
    """Differential privacy of what leaves a device; no promise unless `epsilon` is given."""

    level: Level = "rows"  # of a device's rows, or of a whole device
    # of each device in the whole run; "inf": clipped and sampled, without noise
    epsilon: Annotated[
        float | None,
        pydantic.Field(gt=0, allow_inf_nan=True),
        pydantic.BeforeValidator(lambda value: math.inf if value == "inf" else value),
        pydantic.PlainSerializer(lambda value: "inf" if value == math.inf else value),
    ] = None
    delta: float | None = pydantic.Field(None, gt=0, lt=1)
    clip: float = pydantic.Field(1.0, gt=0)  # norm of a row's gradient, or of a device's update

    @property
    def promised(self) -> bool:
        """Whether the section is in force."""
        return self.epsilon is not None


# what the embedded job's method was tuned in, on that job's own data
OF_ITS_DATA = ("learning_rate", "head_lr_multiplier")
SECTIONS: dict[str, type[Section]] = {
    "task": TaskSection,
    "fleet": FleetSection,
    "run": RunSection,
    "privacy": PrivacySection,
}


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
        made = {"method": _method(method)}
        flat = _by_section(values, made["method"])
        given = (task, fleet, run, privacy)
        for (name, cls), whole in zip(SECTIONS.items(), given, strict=True):
            made[name] = _section(name, cls, whole, flat[name])
        _check_privacy(made["privacy"], made["method"])
        made["task"] = _of_one_kind(made["task"])
        _check_quorum(made["method"], made["fleet"])
        _check_aggregation(made["method"], made["fleet"])
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
        task = _of_arrays(self.task, net)
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
    """Read a recipe, or the embedded default job, with `section.key=value` settings and the seed
    laid over it.
    """
    overlay = _settings(settings or [])
    if seed is not None:
        overlay.setdefault("run", {})["seed"] = seed
    if path is None:
        return anchored(recipe(_laid_over(_without_tuned_values(embedded(), overlay), overlay)))
    return anchored(
        recipe(
            _laid_over(
                strict.read_toml(path, "recipe", "give a TOML file, or none for the embedded job"),
                overlay,
            )
        )
    )


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that a run can be resumed and exported from any
    folder.
    """
    task = recipe.task
    local = {
        key: str(Path(name).expanduser().resolve())
        for key, name, built_in in (
            ("model", task.model, (AUTO, *BUILT_IN_MODELS, *NETS)),
            ("data", task.data, BUILT_IN_DATA),
        )
        if name.strip() and name not in built_in and Path(name).expanduser().exists()
    }
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
            raise BadInput(f"[{name}] must be a table of keys and values; {table!r} came")
    return Recipe(**tables)


def _by_section(values: dict[str, Any], method: Any) -> dict[str, dict[str, Any]]:
    """Values by the section whose field they name; a path is its text, as in a file."""
    homes = {key: name for name, cls in SECTIONS.items() for key in cls.model_fields}
    found: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        if key not in homes and key in parts.table_of(method):
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
        raise BadInput(f"{name} must be a {cls.__name__} or a table; {whole!r} came")
    return strict.section(name, cls, (whole or {}) | values)


def _check_privacy(privacy: PrivacySection, method: Any) -> None:
    """Raise BadInput for a promise that is not complete, or that the method cannot keep."""
    if not privacy.promised:
        if privacy.model_fields_set:
            raise BadInput(
                "privacy.epsilon is missing; give the epsilon of each device in the whole run, or "
                "leave [privacy] out"
            )
        return
    if privacy.delta is None:
        raise BadInput(
            f"privacy.epsilon is {privacy.epsilon} and privacy.delta is missing; give a delta well "
            "below 1 over the rows of a device, such as 1e-5"
        )
    if privacy.level not in method.privacy:
        able = [name for name, cls in all_methods().items() if privacy.level in cls.privacy]
        raise BadInput(
            f"method {method.name!r} cannot keep [privacy], since more leaves its devices than "
            f"clipped updates with noise; choose one of {', '.join(able)}, or leave [privacy] out"
        )


def _of_one_kind(task: TaskSection) -> TaskSection:
    """The section with the kind that follows from its other keys."""
    if task.model in NETS or task.kind == "array":
        return _of_arrays(task, task.model)
    if task.pair is not None and task.kind == "classification":
        return task.model_copy(update={"kind": "pair"})
    return task


def _of_arrays(task: TaskSection, net: str) -> TaskSection:
    """The section with kind "array"; raises BadInput where something in it is for texts."""
    if net not in (AUTO, *NETS):
        raise BadInput(
            f'task.kind is "array", which {net!r} cannot read; set task.model to one of '
            f'{", ".join(NETS)}, or to "auto"'
        )
    reads = "arrays are read by a net" if net == AUTO else f"{net!r} is a net for arrays"
    # of what "auto" finds, the default says nothing: a recipe that was written out has every key
    fitting = ("array", "classification") if task.model == AUTO else ("array",)
    if "kind" in task.model_fields_set and task.kind not in fitting:
        raise BadInput(
            f'{reads}, but task.kind is {task.kind!r}; leave task.kind out, or say "array"'
        )
    for key in ("text", "pair", "label", "encoding", "layers"):
        if getattr(task, key) != TaskSection.model_fields[key].default:
            raise BadInput(f"task.{key} is for texts, but {reads}; leave it out")
    return task.model_copy(update={"kind": "array"})


def _method(given: Any) -> Any:
    """The method that a name, a table or an instance stands for, its settings checked."""
    match given:
        case str():
            table = {"name": given}
        case dict():
            table = dict(given)
        case _ if type(given) in registered().values():
            table = parts.table_of(given)
        case type() if given in registered().values():
            raise BadInput(f"method is the class {given.__name__}; write {given.__name__}()")
        case _:
            raise BadInput(
                f"method is {given!r}, which is no instance of a registered method; decorate its "
                "class with @method(NAME), or give the name of a method"
            )
    name = table.pop("name", "fedspine")
    if not isinstance(name, str):
        raise BadInput(f"method.name must be a name in quotes; {name!r} came")
    cls = find(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in (key for key in table if key not in fields):
        _refuse_moved(name, cls, key)
    strict.known_keys(f"key of [method] for {name}", table, fields)
    composed = {
        key: parts.part(f"method.{key}", choices, fields[key].default, table.pop(key))
        for key, choices in parts.choices_of(cls).items()
        if key in table
    }
    made = strict.validated("method", pydantic.TypeAdapter(cls), table, by_json=True)
    return dataclasses.replace(made, **composed)


def _check_quorum(method: Any, fleet: FleetSection) -> None:
    """Raise BadInput for a quorum below 1 where late replies cannot be merged or timed."""
    if fleet.quorum == 1:
        return
    if method.merges_late is None:
        able = [name for name, cls in all_methods().items() if cls.merges_late is not None]
        raise BadInput(
            f"fleet.quorum is {fleet.quorum:g}, but {method.name} needs all replies of a round; "
            f"set it to 1, or choose one of {', '.join(able)}"
        )
    if fleet.delay_seconds:
        raise BadInput(
            f"fleet.quorum is {fleet.quorum:g}, but fleet.delay_seconds delays only replies that "
            "a round waits for; set the one to 1 or the other to 0"
        )


def _check_aggregation(method: Any, fleet: FleetSection) -> None:
    """Raise BadInput for an aggregation that the method lacks, or that needs more replies."""
    how = fleet.aggregation or Mean()
    if how != Mean() and not method.robust:
        able = [name for name, cls in all_methods().items() if cls.robust]
        raise BadInput(
            f"fleet.aggregation is {how.name}, but {method.name} knows the mean alone; leave it "
            f"out, or choose one of {', '.join(able)}"
        )
    how.check(fleet.replies)


def _keys(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _refuse_moved(name: str, cls: type[Any], key: str) -> None:
    """Raise BadInput for a key that has another name or place by now, or belongs to a method that
    extends this one.
    """
    if key in OF_THE_FLEET:
        raise BadInput(
            f"method.{key} is no setting of a method any more; write fleet.{OF_THE_FLEET[key]}"
        )
    extended = {
        other: found
        for other, found in all_methods().items()
        if issubclass(found, cls) and found is not cls
    }
    for other, found in {name: cls, **extended}.items():
        now = (MOVED | getattr(found, "renamed", {})).get(key, key)
        if now.partition(".")[0] in _keys(found):
            write = f"write {now}" if other == name else f'write name = "{other}"'
            also = f" and {now} for {key}" if other != name and now != key else ""
            if other == name and extended:  # which is what it was by default
                also = f'; for the form that it had before write name = "{next(iter(extended))}"'
            raise BadInput(f"method.{key} is no setting of {name} any more; {write}{also}")


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
    if "data" in named and "model" not in named:
        task.pop("model")
    name = overlay.get("method", {}).get("name", method["name"])
    other = name != method["name"] and isinstance(name, str)
    if other:
        fleet.pop("quorum")
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
