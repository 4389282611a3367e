"""The learning rate that a run chooses where its recipe leaves it open."""

from dataclasses import replace
from typing import Any

import numpy as np

from fedspine.core.fleet import Fleet
from fedspine.lm.tuning import UNPROBED
from fedspine.pruning.rate_probe import is_open, probe
from fedspine.runs.assemble import PROBE
from fedspine.runs.config import Recipe
from fedspine.runs.run_context import Point, RunContext


def with_rate(method: Any, rate: float | None) -> Any:
    """The method at the rate that was chosen; itself where none was."""
    return method if rate is None else replace(method, learning_rate=rate)


def at_rate(recipe: Recipe, rate: float | None) -> Recipe:
    """The recipe with its method at the rate that was chosen."""
    return recipe if rate is None else replace(recipe, method=with_rate(recipe.method, rate))


def choose_rate(context: RunContext, point: Point, fleet: Fleet) -> str | None:
    """Choose the rate on the first round's devices, note it in `point` and in the records; returns
    a line about it, None where the recipe gives a rate.
    """
    method, task = context.recipe.method, context.assembled.task
    if not is_open(method):
        return None
    found = None
    if task.privacy is None:
        rng = np.random.default_rng([context.recipe.run.seed, PROBE])
        found = probe(method, task, fleet, rng)
    if found is None:
        point.learning_rate = UNPROBED
        why = "losses would tell of rows" if task.privacy else "no device answered"
        line = f"learning rate: {UNPROBED:g}, not chosen by a probe ({why})"
        context.records.write("learning_rate", rate=UNPROBED)
        return line
    point.learning_rate = found.rate
    context.records.write("learning_rate", rate=found.rate, rates=found.rates, losses=found.losses)
    return found.line
