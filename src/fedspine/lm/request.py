"""A device's training as it is asked for, and what comes of it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from fedspine.core.device import Device
from fedspine.core.message import Tensors
from fedspine.lm.base import Model
from fedspine.lm.distillation import Taught
from fedspine.lm.held import AdamMoments
from fedspine.lm.importance import Scores
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.stored import Quantised
from fedspine.lm.tuning import Tuning


@dataclass(frozen=True)
class Request:
    """One device's training of `model`; `scores` is the importance followed so far."""

    device: Device
    model: Model
    tuning: Tuning
    scoring: Scoring | None = None
    scores: Scores | None = None
    # of adapter and head, added to what is minimised
    penalty: Callable[[Tensors], Tensor] | None = None
    lowest: int = 0  # the block below which adapters are used but not trained
    freeze_a: bool = False  # whether the adapter's A factors stay as they are
    taught: Taught | None = None  # who teaches beside the labels
    blocks: tuple[int, ...] | None = None  # whose adapters are trained; None: all from `lowest` on
    change: dict[str, Tensor] | None = None  # of the base's weights, in units of B A; frozen
    quantised: Quantised | None = None  # what blocks keep for the backward pass
    moments: AdamMoments | None = None  # AdamW's, to go on with
    keeps_moments: bool = False  # whether they are wanted back
    extra_bytes: int = 0  # of memory beside what training takes
    step_flops: float = 0.0  # of each step beside those of training

    @property
    def trained(self) -> Collection[int]:
        """The blocks whose adapters are trained."""
        layers = self.device.base.layout.layers
        return range(self.lowest, layers) if self.blocks is None else self.blocks

    @property
    def reuses(self) -> bool:
        """Whether each of the device's rows is trained on often enough to keep what enters the
        lowest trained block.
        """
        return len(self.device.data) < self.tuning.turns * self.tuning.steps * self.tuning.batch


@dataclass(frozen=True)
class TuneResult:
    """The tuned model, the mean loss of the last steps, and the importance if it was tracked.

    The loss is None where the run promises privacy, which it would break.
    """

    model: Model
    loss: float | None
    scores: Scores | None
    moments: AdamMoments | None = None  # where they are wanted
