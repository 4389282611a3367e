"""Whether a run learns at all: what is said where it is no better than one answer, or where its
loss rises.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, hypot, isfinite, sqrt
from typing import Any

import numpy as np

from fedspine.core.logit_adjustment import Unadjusted
from fedspine.lm.tuning import HeadTraining
from fedspine.report.rows import RunRows
from fedspine.report.tables import decimal, percent
from fedspine.runs.config import Recipe

PART = 5  # after this part of the rounds it is asked for the first time
# standard errors that a loss must rise by: one false alarm in 700 where nothing changes
NOISE = 3.0
FEWEST = 4  # losses of devices on either side that a comparison needs
SKEW = 0.25  # by which a device's largest class must be larger than the fleet's
SLOWER = 4  # the learning rate that is proposed is so many times lower


@dataclass(frozen=True)
class CheckContext:
    """The test rows of a run's checks, the commonest class's share of them, and whether devices'
    labels are skewed.
    """

    rows: int
    commonest: float | None  # None for language modelling
    skewed: bool = False  # False where it is not known


def due(recipe: Recipe, round: int) -> bool:
    """Whether the check after so many rounds is the first one after a fifth of them."""
    every = recipe.run.evaluate_every
    fifth = ceil(recipe.run.rounds / PART)
    return bool(every) and round == every * ceil(fifth / every)


def doubt(recipe: Recipe, rows: RunRows, seen: CheckContext, round: int) -> str | None:
    """One line on what is wrong after so many rounds, and what to change; None where nothing is."""
    when = f"after {round} of {recipe.run.rounds} rounds"
    if what := _rising(rows, seen):
        return f"{when} {what}; {_remedy(recipe, seen)}"
    if what := _one_answer(rows, seen):
        more = f"train longer with run.rounds = {2 * recipe.run.rounds}"
        return f"{when} {what}; {_remedy(recipe, seen)}, or {more}"
    return None


def _one_answer(rows: RunRows, seen: CheckContext) -> str | None:
    """Whether the last check's models are no better than the commonest class, within a standard
    error.

    Of the deployed and the unpruned models the better ones count, so that pruning alone raises no
    doubt.
    """
    last = rows.scores[-1] if rows.scores else None
    if last is None or seen.commonest is None or last.accuracy is None:
        return None
    error = sqrt(seen.commonest * (1 - seen.commonest) / seen.rows)
    if max(last.accuracy, last.accuracy_dense or 0.0) >= seen.commonest + error:
        return None
    return (
        f"the accuracy of the models is {percent(last.accuracy)}, and that of always predicting "
        f"the most common class is {percent(seen.commonest)}"
    )


def _rising(rows: RunRows, seen: CheckContext) -> str | None:
    """Whether the loss rose from the first to the last check, or in training, by more than noise.

    A mean loss over n rows has a standard error of about itself over the root of n, as the loss of
    a row spreads about as wide as its mean. In training the rounds' first and last thirds are
    compared.
    """
    tested = [loss for score in rows.scores if (loss := _unpruned(score)) is not None]
    if len(tested) > 1 and tested[-1] - tested[0] > NOISE * hypot(tested[0], tested[-1]) / sqrt(
        seen.rows
    ):
        return f"the test loss has risen from {decimal(tested[0])} to {decimal(tested[-1])}"
    by_round: dict[int, list[float]] = defaultdict(list)
    for note in rows.notes:
        if note.loss is not None:
            by_round[note.round].append(note.loss)
    losses = [by_round[round] for round in sorted(by_round)]
    third = max(1, len(losses) // 3)
    first, last = (
        [loss for losses_of_round in part for loss in losses_of_round]
        for part in (losses[:third], losses[-third:])
    )
    if len(losses) < 2 or min(len(first), len(last)) < FEWEST:
        return None
    error = hypot(_error(first), _error(last))
    if np.mean(last) - np.mean(first) > NOISE * error:
        found = f"{decimal(float(np.mean(first)))} to {decimal(float(np.mean(last)))}"
        return f"the training loss has risen from {found}"
    return None


def _unpruned(score: Any) -> float | None:
    """A check's loss before pruning, which raises losses of its own."""
    return score.loss if score.loss_dense is None else score.loss_dense


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / sqrt(len(values)))


def skewed(labels: np.ndarray, shares: Sequence[np.ndarray]) -> bool:
    """Whether the commonest class has on average a share of a device's rows that is by `SKEW`
    larger than its share of all; `shares` are the rows of each device.
    """
    own = [np.bincount(labels[rows]).max() / len(rows) for rows in shares if len(rows)]
    return bool(own) and float(np.mean(own)) >= SKEW + np.bincount(labels).max() / len(labels)


def _remedy(recipe: Recipe, seen: CheckContext) -> str:
    method = recipe.method
    if (
        seen.skewed
        and isinstance(method, HeadTraining)
        and method.logit_adjustment == Unadjusted()
        and not recipe.privacy.promised
    ):
        adjusted = 'set method.logit_adjustment.name = "label-skew"'
        return f"most rows of a device have one class: {adjusted}, or {_slower(recipe)}"
    return _slower(recipe)


def _slower(recipe: Recipe) -> str:
    rate = getattr(recipe.method, "learning_rate", None)
    if isinstance(rate, int | float) and isfinite(rate):
        return f"lower method.learning_rate from {rate:g} to {rate / SLOWER:g}"
    return "set a lower method.learning_rate, such as 0.0005"
