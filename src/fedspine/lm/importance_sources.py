"""What the importance of a device's units is read from while it tunes: gradients, activations, weights, or chance."""

from dataclasses import replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from fedspine.core.device import Device
from fedspine.core.message import message
from fedspine.lm.base import Model
from fedspine.lm.cost import NO_SCORING, ScoringCost, training_memory_bytes
from fedspine.lm.importance import Scores, magnitude_scores, random_scores, smooth
from fedspine.lm.importance_tracker import Scoring, Source
from fedspine.lm.prunable_layout import Anatomy
from fedspine.lm.scoring_cost import following_cost, magnitude_cost, updates
from fedspine.lm.structure import Structure
from fedspine.lm.tune import Trace, Tuning, rank_of, tune


@message
class ByMagnitude:
    """Units matter as their weights are large."""


@message
class AtRandom:
    """Units matter by chance: the control that knows nothing."""


Importance: TypeAlias = (
    Scoring | ByMagnitude | AtRandom
)  # a scoring follows it while the model trains


@runtime_checkable
class ScoringFields(Protocol):
    """The hyper-parameters of importance that is read from gradients."""

    score_every: int
    score_keep: float
    score_square: bool
    score_cross: float
    score_normalise: bool


@runtime_checkable
class ImportanceFields(ScoringFields, Protocol):
    """The hyper-parameters that say what importance is read from."""

    importance: Source | Literal["magnitude", "random"]


def by_gradient(fields: ScoringFields) -> Scoring:
    """Importance from gradients, as the fields want it followed."""
    return Scoring(
        every=fields.score_every,
        keep=fields.score_keep,
        square=fields.score_square,
        cross=fields.score_cross,
        normalise=fields.score_normalise,
    )


def importance_of(fields: ImportanceFields) -> Importance:
    """The importance as it is ordered from a device."""
    match fields.importance:
        case "magnitude":
            return ByMagnitude()
        case "random":
            return AtRandom()
        case "gradient":
            return by_gradient(fields)
        case source:
            return Scoring(of=source, every=fields.score_every, keep=fields.score_keep)


def scoring_cost(
    how: Importance,
    anatomy: Anatomy,
    structure: Structure,
    *,
    rank: int,
    tokens: int | float = 0,
    largest: int = 0,
    steps: int = 0,
) -> ScoringCost:
    """What importance of this kind costs in a training of `steps` that reads `tokens` padded tokens, in equal batches.

    `largest` is the padded tokens of the largest batch.
    """
    match how:
        case Scoring() as scoring:
            count = updates(scoring, steps)
            read = tokens * count / max(1, steps)
            return following_cost(
                anatomy,
                structure,
                scoring,
                rank=rank,
                tokens=read,
                largest=largest,
                updates=count,
            )
        case ByMagnitude():
            return magnitude_cost(anatomy, structure, rank)
        case AtRandom():
            return NO_SCORING


def tune_and_score(
    device: Device, model: Model, tuning: Tuning, how: Importance, known: Scores | None
) -> Trace:
    """`tune`, whose trace holds the importance of the units after it.

    Gradients and activations are followed while it trains, on top of what is `known`. Weights and chance are asked
    once, after it, and what was known stays only for units that are gone, and where a weight is not finite.
    """
    match how:
        case Scoring() as scoring:
            return tune(device, model, tuning, scoring=scoring, scores=known)
        case ByMagnitude():
            trace = tune(device, model, tuning)
            now = magnitude_scores(device.base, trace.model)
            _account(
                device,
                trace.model,
                scoring_cost(how, device.base.anatomy, model.structure, rank=rank_of(model)),
            )
        case AtRandom():
            trace = tune(device, model, tuning)
            now = random_scores(device.base.anatomy, model.structure, device.rng)
    return replace(trace, scores=smooth(known, now, 0.0))


def _account(device: Device, model: Model, cost: ScoringCost) -> None:
    """Charge what is computed once after training, when activations are gone but the adapter's moments are not yet."""
    memory = training_memory_bytes(
        device.base.anatomy,
        model.structure,
        rank=rank_of(model),
        embeddings=device.base.embeddings,
        batch=0,
        tokens=0,
        scoring=cost,
    )
    device.spend(flops=cost.flops, memory_bytes=memory)
