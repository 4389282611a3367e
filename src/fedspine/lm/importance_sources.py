"""The sources of unit importance on a device: gradients, activations, weights, or chance.

Each source is a dataclass of its settings; `order` is the part that is sent to a device.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar, Literal, TypeAlias

from fedspine.core.device import Device
from fedspine.core.errors import check_ranges
from fedspine.core.message import message
from fedspine.core.reads import lasting
from fedspine.lm.base import Model
from fedspine.lm.cost import NO_SCORING, ScoringCost, training_memory_bytes
from fedspine.lm.distillation import Taught
from fedspine.lm.importance import Scores, magnitude_scores, random_scores, smooth
from fedspine.lm.importance_tracker import MOST_CROSS, Scoring
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.request import TuneResult
from fedspine.lm.scoring_cost import magnitude_cost, tracking_cost, updates
from fedspine.lm.structure import Structure
from fedspine.lm.training_account import rank_of
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning


@message
class ByMagnitude:
    """Units matter as their weights are large."""


@message
class AtRandom:
    """Units matter by chance: the control that knows nothing."""


ScoringOrder: TypeAlias = Scoring | ByMagnitude | AtRandom  # as sent to a device


def remembered(how: ScoringOrder, steps: int) -> int:
    """The steps that scores rest on, of a moving average those that last.

    >>> remembered(Scoring(keep=0.9), 20), remembered(Scoring(keep=0.0), 20)
    (10, 1)
    >>> remembered(Scoring(keep=1.0, every=5), 20), remembered(ByMagnitude(), 20)
    (4, 20)
    """
    match how:
        case Scoring(every=every, keep=keep):
            return lasting(-(-steps // max(1, every)), 1 - keep)
    return steps


_AVERAGE = {"every": (1, inf), "keep": (0, 1)}


@dataclass(frozen=True)
class Gradient:
    """LoRAPrune's estimate of each weight's gradient, from the gradients of its factors."""

    name: ClassVar = "gradient"
    every: int = 1  # steps between two updates
    keep: float = 0.9  # of the moving average
    square: bool = False
    cross: float = 0.0  # eta, of the second-order term
    normalise: bool = False  # each layer's scores by their norm

    def check(self) -> None:
        cross = {"cross": (-MOST_CROSS, MOST_CROSS)}
        check_ranges(self, _AVERAGE | cross, "method.importance")

    @property
    def order(self) -> Scoring:
        return Scoring(
            every=self.every,
            keep=self.keep,
            square=self.square,
            cross=self.cross,
            normalise=self.normalise,
        )


@dataclass(frozen=True)
class _Tracked:
    """The settings of sources that hook the forward or backward pass of units."""

    name: ClassVar[Literal["activation", "gate", "blend"]]
    every: int = 1  # steps between two updates
    keep: float = 0.9  # of the moving average

    def check(self) -> None:
        check_ranges(self, _AVERAGE, "method.importance")

    @property
    def order(self) -> Scoring:
        return Scoring(of=self.name, every=self.every, keep=self.keep)


@dataclass(frozen=True)
class Activation(_Tracked):
    """A unit's contribution to its layer's output, as in Wanda (arXiv:2306.11695)."""

    name = "activation"


@dataclass(frozen=True)
class Gate(_Tracked):
    """The Fisher information of a factor on a unit's output, as in Kwon et al.
    (arXiv:2204.09656).
    """

    name = "gate"


@dataclass(frozen=True)
class Blend(_Tracked):
    """The geometric mean of `Activation` and `Gate`."""

    name = "blend"


@dataclass(frozen=True)
class Magnitude:
    """The norm of a unit's effective weights, after tuning."""

    name: ClassVar = "magnitude"

    def check(self) -> None:
        pass

    @property
    def order(self) -> ByMagnitude:
        return ByMagnitude()


@dataclass(frozen=True)
class RandomImportance:
    """A new draw in every round: the control that knows nothing."""

    name: ClassVar = "random"

    def check(self) -> None:
        pass

    @property
    def order(self) -> AtRandom:
        return AtRandom()


Importance: TypeAlias = Gradient | Activation | Gate | Blend | Magnitude | RandomImportance


def scoring_cost(
    how: ScoringOrder,
    layout: PrunableLayout,
    structure: Structure,
    *,
    rank: int,
    tokens: int | float = 0,
    largest: int = 0,
    steps: int = 0,
) -> ScoringCost:
    """What importance of this kind costs in a training of `steps` that reads `tokens` padded
    tokens, in equal batches.

    `largest` is the padded tokens of the largest batch.
    """
    match how:
        case Scoring() as scoring:
            count = updates(scoring, steps)
            read = tokens * count / max(1, steps)
            return tracking_cost(
                layout,
                structure,
                scoring,
                rank=rank,
                tokens=read,
                largest=largest,
                updates=count,
            )
        case ByMagnitude():
            return magnitude_cost(layout, structure, rank)
        case AtRandom():
            return NO_SCORING


def tune_and_score(
    device: Device,
    model: Model,
    tuning: Tuning,
    how: ScoringOrder,
    known: Scores | None,
    taught: Taught | None = None,
    blocks: tuple[int, ...] | None = None,
) -> TuneResult:
    """`tune`, with the importance of the units after training in its result.

    Gradients and activations are tracked during training, starting from what is `known`. Weights
    and chance are scored once, after training; known scores stay only for dropped units, and where
    a weight is not finite. Of adapters that are trained on some `blocks` only, gradients tell
    nothing of the others.
    """
    match how:
        case Scoring() as scoring:
            return tune(
                device, model, tuning, scoring=scoring, scores=known, taught=taught, blocks=blocks
            )
        case ByMagnitude():
            result = tune(device, model, tuning, taught=taught, blocks=blocks)
            now = magnitude_scores(device.base, result.model)
            _account(
                device,
                result.model,
                scoring_cost(how, device.base.layout, model.structure, rank=rank_of(model)),
            )
        case AtRandom():
            result = tune(device, model, tuning, taught=taught, blocks=blocks)
            now = random_scores(device.base.layout, model.structure, device.rng)
    return replace(result, scores=smooth(known, now, 0.0))


def _account(device: Device, model: Model, cost: ScoringCost) -> None:
    """Charge what is computed once after training, when activations are gone but the adapter's
    moments are not yet.
    """
    memory = training_memory_bytes(
        device.base.layout,
        model.structure,
        rank=rank_of(model),
        embeddings=device.base.embeddings,
        batch=0,
        tokens=0,
        scoring=cost,
    )
    device.spend(flops=cost.flops, memory_bytes=memory)
