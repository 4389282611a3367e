"""The first round of a recipe as a plan: its task without weights and rows, and the orders of its
devices.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedspine.core.aggregation import Mean
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput, listed
from fedspine.core.fleet import NoMemory
from fedspine.core.method import Prunable, planned_sparsities
from fedspine.core.task import BUILT_IN_DATA, Examples, Task, row_tokens
from fedspine.data.pydocs import TOPICS
from fedspine.fleets.planned import Planned, PlannedExchange, PlannedFleet, Prices, Quote
from fedspine.fleets.simulated import profiles
from fedspine.lm.fits import check_lengths, positions
from fedspine.lm.tuning import HeadTraining
from fedspine.lm.weightless import Weightless
from fedspine.lm.weightless import load as load_base
from fedspine.methods import all_methods
from fedspine.runs.assemble import begun, cohort, hardware_of, turns_of
from fedspine.runs.config import Recipe
from fedspine.runs.optimisation import server_of
from fedspine.runs.read_data import dataset

ASSUMED_CLASSES = 2  # if neither the data nor the user gives their number
ENOUGH = 3  # planned devices of each kind, if there are so many


@dataclass(frozen=True)
class Rounds:
    """The planned orders; `plans` are first rounds of the run's first cohorts, as many as needed to
    include a few devices of each kind.
    """

    task: Task  # without weights and rows
    plans: list[PlannedFleet]
    pruned: dict[DeviceId, Quote]  # of the same devices once pruned; empty if they never are

    @property
    def first(self) -> PlannedFleet:
        """The first round of the run."""
        return self.plans[0]

    @property
    def trainings(self) -> dict[DeviceId, PlannedExchange]:
        """The training exchange of each device that has one."""
        return {id: one for fleet in self.plans for id, one in trainings(fleet).items()}


def rounds_of(recipe: Recipe, kinds: list[str], classes: int) -> Rounds:
    """The planned rounds of a fleet with devices of these kinds, on a task with `classes` classes.

    Raises BadInput for a recipe that a run would refuse before it begins, and for one that cannot
    be planned.
    """
    task = _task(recipe, classes)
    recipe.method.check(task)
    try:
        with Weightless():
            state = begun(recipe, task)
            drawn = recipe.method.steps * recipe.method.batch
            prices = Prices(task.base, _rows(recipe, drawn, task.max_tokens))
            plans, met, wanted = [], set(), Counter(kinds)
            while any(
                sum(kinds[i] == kind for i in met) < min(ENOUGH, count)
                for kind, count in wanted.items()
            ):
                part = cohort(recipe, len(plans)).tolist()
                plans.append(_round(recipe, state, kinds, prices, part))
                met |= set(part)
            rounds = Rounds(task, plans, {})
            return replace(rounds, pruned=_pruned(recipe, rounds, prices))
    except NotImplementedError as error:
        raise _unable(recipe, str(error)) from None


def check_able(recipe: Recipe) -> None:
    """Raise BadInput for a recipe whose costs cannot be planned."""
    if not isinstance(recipe.method, HeadTraining) or recipe.task.kind == "array":
        raise _unable(recipe, "it does not tune an adapter or a head of a transformer")
    if recipe.privacy.promised:
        raise BadInput(
            "a run with [privacy] cannot be planned, since its batches are drawn at random; leave "
            "privacy.epsilon out"
        )


def _unable(recipe: Recipe, why: str) -> BadInput:
    able = [name for name, cls in all_methods().items() if issubclass(cls, HeadTraining)]
    return BadInput(
        f"method {recipe.method.name!r} on {recipe.task.model!r} cannot be planned: {why}; methods "
        f"that can be, on texts: {listed(able)}"
    )


def classes_of(recipe: Recipe, given: int | None) -> tuple[int, str | None]:
    """The number of the task's classes, and a remark if it is assumed.

    The data is read only if the number is not `given`.
    """
    if recipe.task.kind == "causal-lm":
        return 0, None
    if given is not None:
        return given, None
    if recipe.task.data == BUILT_IN_DATA[0] and recipe.task.label == "label":
        return len(TOPICS), None
    try:
        return len(dataset(recipe).label_names), None
    except BadInput:
        return ASSUMED_CLASSES, (
            f"{recipe.task.data} cannot be read here, so {ASSUMED_CLASSES} classes are assumed; "
            "give their number with --classes"
        )


def _task(recipe: Recipe, classes: int) -> Task:
    section = recipe.task
    base = load_base(
        section.model,
        kind=section.kind,
        classes=classes,
        layers=section.layers,
        pooling=section.pooling,
        bits=recipe.run.frozen_bits,
    )
    longest, answer = positions(base.config), recipe.run.tokens_answered
    check_lengths(section.model, base.config, longest, section.max_tokens, answer)
    tokens = row_tokens(base.pooling, section.max_tokens)
    rows = _rows(recipe, 1, tokens)
    return Task(
        kind=section.kind,
        base=base,
        train=rows,
        test=rows,
        label_names=tuple(map(str, range(classes))),
        max_tokens=tokens,
        rounds=recipe.run.rounds,
        turns=turns_of(recipe),
    )


def _rows(recipe: Recipe, count: int, tokens: int) -> Examples:
    """`count` rows of so many `tokens`; only their lengths matter."""
    count = max(1, count)
    return Examples(
        ids=np.zeros(count * tokens, np.int32),
        offsets=np.arange(count + 1, dtype=np.int64) * tokens,
        labels=None if recipe.task.kind == "causal-lm" else np.zeros(count, np.int64),
        segments=None,
        padding=0,
    )


def _round(
    recipe: Recipe, state: Any, kinds: list[str], prices: Prices, part: Iterable[int]
) -> PlannedFleet:
    """The first round of these devices of the fleet."""
    declared = profiles(kinds, [len(prices.data)] * len(kinds))
    fleet = PlannedFleet(
        devices=tuple(declared[i] for i in part),
        ids=tuple(profile.id for profile in declared),
        hardware=hardware_of(recipe, kinds),
        prices=prices,
        aggregation=recipe.fleet.aggregation or Mean(),
        server=server_of(recipe.method, recipe.fleet),
    )
    try:
        recipe.method.round(state, fleet)
    except (Planned, NoMemory):
        return fleet
    raise NotImplementedError("its round trains nothing")


def _pruned(recipe: Recipe, rounds: Rounds, prices: Prices) -> dict[DeviceId, Quote]:
    """The charges of devices at the last round's sparsity."""
    sparsity = planned_sparsities(recipe.method, recipe.run.rounds)[-1]
    layout, found, known = rounds.task.base.layout, {}, {}
    for id, one in rounds.trainings.items():
        if not sparsity or not isinstance(one.order, Prunable):
            continue
        alike = (one.work, one.quote)  # two orders that cost the same also do when pruned
        if alike not in known:
            known[alike] = prices.of(one.work, one.order.pruned(layout, sparsity))
        found[id] = known[alike]
    return found


def trainings(fleet: PlannedFleet) -> dict[DeviceId, PlannedExchange]:
    """The training exchange of each device that has one: its last."""
    return {one.device: one for one in fleet.exchanges if one.quote.price.trained is not None}
