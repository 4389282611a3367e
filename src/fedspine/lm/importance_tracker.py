"""Importance of units that is followed while a model trains: read off LoRA's gradients, activations, or unit gates."""

from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedspine.core.message import Tensors, message
from fedspine.lm.importance import Criterion, Scores, geometric_mean, smooth
from fedspine.lm.trainable_stack import Leaves

Source: TypeAlias = Literal["gradient", "activation", "gate", "blend"]


@message
class Scoring:
    """Whether and how unit importance is followed while training.

    `of` says what it is read from. "gradient": LoRAPrune's estimate of the weight's gradient, to which `square`, `cross`
    and `normalise` belong. "activation": how much a unit adds to what its layer puts out. "gate": the Fisher
    information of a factor on what the unit gives. "blend": the geometric mean of the last two.
    """

    of: Source = "gradient"
    every: int = 1  # steps
    keep: float = 0.9  # share of the old average at each update
    square: bool = False
    cross: float = 0.0
    normalise: bool = False

    @property
    def criterion(self) -> Criterion:
        return Criterion(square=self.square, cross=self.cross, normalise=self.normalise)


class Following:
    """The smoothed importance of the units of all models in `leaves`, updated in every `scoring.every`th step.

    `scores` is what is known so far, None of a model of which nothing is. Without a `scoring` it stays as it is. Use it
    as a context: what listens to the base is taken off at the end.
    """

    def __init__(self, leaves: Leaves, scoring: Scoring | None, known: list[Scores | None]) -> None:
        self.scores = known
        self._leaves, self._scoring = leaves, scoring
        self._weights: Float[Tensor, "models 1 tokens"] | None = (
            None  # of each token in a mean; None: not listening
        )
        self._squares: Tensors = {}  # [models, columns] by path: the mean square of what enters a column
        self._gates: Tensors = {}  # [models, columns] by path: the sum over rows of a gate's squared gradient
        self._ears: list[Any] = []

    def __enter__(self) -> "Following":
        if self._scoring is not None and self._scoring.of != "gradient":
            for site, linear in self._leaves.readers():

                def hear(
                    _: Any, args: tuple[Tensor], path: str = site.path, width: int = site.per_unit
                ) -> None:
                    self._hear(path, args[0], width)

                self._ears.append(linear.register_forward_pre_hook(hear))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for ear in self._ears:
            ear.remove()

    def listen(self, step: int, mask: Int[Tensor, "rows tokens"]) -> None:
        """Prepare for the forward pass of `step`; `mask` is 1 for tokens that count."""
        self._weights = None
        if self._ears and self._due(step):
            weights = mask.reshape(len(self.scores), 1, -1).float()
            self._weights = weights / weights.sum(-1, keepdim=True)

    def update(self, step: int) -> None:
        """Take in what `step` says, after its backward pass and before the optimiser's step."""
        if self._scoring is None or not self._due(step):
            return
        match self._scoring.of:
            case "gradient":
                found = self._leaves.importance(self._scoring.criterion)
            case "activation":
                found = self._leaves.importance_by_output(self._squares)
            case "gate":
                found = self._leaves.importance_by_gate(self._gates)
            case "blend":
                pairs = zip(
                    self._leaves.importance_by_output(self._squares),
                    self._leaves.importance_by_gate(self._gates),
                    strict=True,
                )
                found = [geometric_mean(one, other) for one, other in pairs]
        keep = self._scoring.keep
        self.scores = [
            smooth(before, now, keep) for before, now in zip(self.scores, found, strict=True)
        ]

    def _due(self, step: int) -> bool:
        return self._scoring is not None and step % self._scoring.every == 0

    def _hear(self, path: str, x: Float[Tensor, "rows tokens columns"], width: int) -> None:
        if self._weights is None or self._scoring is None:
            return
        models = len(self.scores)
        if self._scoring.of != "gate":
            with torch.no_grad():
                squares = x.reshape(models, -1, x.shape[-1]).float().square()
                self._squares[path] = (self._weights @ squares).squeeze(1)
        if self._scoring.of != "activation":
            values = x.detach()

            def gate(gradient: Tensor) -> None:
                by_row = (values * gradient).float().sum(1).unflatten(-1, (-1, width)).sum(-1)
                fisher = by_row.square_().view(models, -1, by_row.shape[-1]).sum(1)
                self._gates[path] = fisher.repeat_interleave(width, -1) / width

            x.register_hook(gate)
