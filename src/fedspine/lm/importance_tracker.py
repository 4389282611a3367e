"""Tracks the importance of units while a model trains, from LoRA's gradients, activations or unit
gates.
"""

from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedspine.core.checks import Asked, need, within
from fedspine.core.message import Tensors, message
from fedspine.lm.importance import Criterion, Scores, geometric_mean, smooth
from fedspine.lm.trainable_stack import TrainableStack

Source: TypeAlias = Literal["gradient", "activation", "gate", "blend"]


# of the second-order term, which is of the size of a learning rate; with one far larger, scores
# overflow, and which do would show whatever the noise of an answer
MOST_CROSS = 1e3


@message
class Scoring:
    """How unit importance is tracked during training.

    `of` is the source. "gradient": LoRAPrune's estimate of the weight's gradient; `square`, `cross`
    and `normalise` apply to it only. "activation": how much a unit contributes to its layer's
    output. "gate": the Fisher information of a factor on the unit's output. "blend": the geometric
    mean of the last two.
    """

    of: Source = "gradient"
    every: int = 1  # steps
    keep: float = 0.9  # share of the old average at each update
    square: bool = False
    cross: float = 0.0
    normalise: bool = False

    def check(self, asked: Asked) -> None:
        """An update every so many steps, and a share that is kept."""
        need(self.every >= 1, f"every is {self.every}, but at least 1 is needed")
        within("keep", self.keep, 0, 1)
        within("cross", self.cross, -MOST_CROSS, MOST_CROSS)

    @property
    def criterion(self) -> Criterion:
        return Criterion(square=self.square, cross=self.cross, normalise=self.normalise)


class ImportanceTracker:
    """The smoothed importance of the units of all models in `stack`, updated every `scoring.every`
    steps.

    `scores` has the current importance of each model, None where nothing is known yet. Without a
    `scoring` it never changes. Use the tracker as a context manager, which removes its hooks from
    the base on exit.
    """

    def __init__(
        self, stack: TrainableStack, scoring: Scoring | None, known: list[Scores | None]
    ) -> None:
        self.scores = known
        self._stack, self._scoring = stack, scoring
        # of each token in a mean; None: not recording
        self._weights: Float[Tensor, "models 1 tokens"] | None = None
        # [models, columns] by path: the mean square of what enters a column
        self._squares: Tensors = {}
        # [models, columns] by path: the sum over rows of a gate's squared gradient
        self._gates: Tensors = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "ImportanceTracker":
        if self._scoring is not None and self._scoring.of != "gradient":
            for site, linear in self._stack.readers():
                record = partial(self._record_input, site.path, site.per_unit)
                self._hooks.append(linear.register_forward_pre_hook(record))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def before_forward(self, step: int, mask: Int[Tensor, "rows tokens"]) -> None:
        """Prepare for the forward pass of `step`; `mask` is 1 for tokens that count."""
        self._weights = None
        if self._hooks and self._due(step):
            weights = mask.reshape(len(self.scores), 1, -1).float()
            self._weights = weights / weights.sum(-1, keepdim=True)

    def update(self, step: int) -> None:
        """Update the scores, after the backward pass of `step` and before the optimiser's step."""
        if self._scoring is None or not self._due(step):
            return
        match self._scoring.of:
            case "gradient":
                found = self._stack.importance(self._scoring.criterion)
            case "activation":
                found = self._stack.importance_by_output(self._squares)
            case "gate":
                found = self._stack.importance_by_gate(self._gates)
            case "blend":
                pairs = zip(
                    self._stack.importance_by_output(self._squares),
                    self._stack.importance_by_gate(self._gates),
                    strict=True,
                )
                found = [geometric_mean(one, other) for one, other in pairs]
        keep = self._scoring.keep
        self.scores = [
            smooth(before, now, keep) for before, now in zip(self.scores, found, strict=True)
        ]

    def _due(self, step: int) -> bool:
        return self._scoring is not None and step % self._scoring.every == 0

    def _record_input(self, path: str, width: int, _: nn.Module, args: tuple[Tensor]) -> None:
        if self._weights is None or self._scoring is None:
            return
        models, (x,) = len(self.scores), args
        if self._scoring.of != "gate":
            with torch.no_grad():
                squares = x.reshape(models, -1, x.shape[-1]).float().square()
                self._squares[path] = (self._weights @ squares).squeeze(1)
        if self._scoring.of != "activation":
            x.register_hook(partial(self._record_gate, path, width, x.detach()))

    def _record_gate(
        self,
        path: str,
        width: int,
        values: Float[Tensor, "rows tokens columns"],
        gradient: Float[Tensor, "rows tokens columns"],
    ) -> None:
        by_row = (values * gradient).float().sum(1).unflatten(-1, (-1, width)).sum(-1)
        fisher = by_row.square_().view(len(self.scores), -1, by_row.shape[-1]).sum(1)
        self._gates[path] = fisher.repeat_interleave(width, -1) / width
