"""A model cut in two: the bottom runs on devices, the top on the server; features go up, their gradients come down.

What split methods know of a model. `cut.halves_of` gives it for transformers (trainable: LoRA and
the task head) and for convolutional nets (trainable: everything), so one method file serves both.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedspine.core.message import Tensors, message


@message
class Features:
    """What a bottom gives for some rows, or the gradient of a loss with respect to it.

    `values` is [rows, ...]: [rows, tokens, width] for text, [rows, channels, ...] for arrays. `mask`, bool
    [rows, tokens], says what is a token and not padding; None where all rows are of one shape.
    """

    values: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tokens(self) -> int:
        """Of all rows, without padding; 1 for each row of arrays."""
        return len(self) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True)
class Losses:
    """What a top says of some rows: `total` is each row's summed loss, `counted` how many labels that sums over.

    `shifted` is what `total` would be with the shifts that were asked for added to the scores.
    """

    total: Float[Tensor, " rows"]
    counted: Int[Tensor, " rows"]
    shifted: Float[Tensor, " rows"] | None = None

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The loss that is minimised: the mean over all labels of all rows; 0 where none counts."""
        return self.total.sum() / self.labels

    @property
    def labels(self) -> Int[Tensor, ""]:
        """How many labels the mean is over, and at least 1: where none counts, all sums are 0."""
        return self.counted.sum().clamp(min=1)


def shifted_losses(
    logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    shifts: Float[Tensor, "rows classes"] | None,
) -> Float[Tensor, " rows"] | None:
    """The cross-entropy of each row with `shifts` added to its logits, in nats; None where no shifts are asked for."""
    if shifts is None:
        return None
    return cross_entropy(logits.float() + shifts.to(logits.device), labels, reduction="none")


class Halves(Protocol):
    """One model cut at one place. Weights are handed in; nothing is kept between calls.

    Gradients reach every tensor of `weights` that asks for one. `seed` fixes what is drawn (dropout); with None the half
    computes as a deployed model does.
    """

    @property
    def statistics(self) -> frozenset[str]:
        """Names of weights that are averaged but not trained, such as batch norm's; `bottom` and `top` update those
        handed in, in place, where a seed is given."""
        ...

    @property
    def entry(self) -> frozenset[str]:
        """Names of the weights that the top's first block trains, if it still makes features: a transformer's block or
        a convolution. None where the top only classifies."""
        ...

    def start(self, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """The bottom's and the top's weights to start from: all that training changes."""
        ...

    def bottom(self, weights: Tensors, inputs: Tensors, *, seed: int | None) -> Features:
        """The features of a batch as `Examples.batch` or `Arrays.batch` gives it; labels in it are ignored."""
        ...

    def top(
        self,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        *,
        seed: int | None,
        shifts: Float[Tensor, "rows classes"] | None = None,
    ) -> Losses:
        """What the top loses on these features; `labels` as the batch has them, padded to the features' tokens.

        `shifts`, for classes only, asks what it would lose with them added to its scores.
        """
        ...

    def join(self, bottom: Tensors, top: Tensors) -> Any:
        """Both halves as one model that can be deployed, scored and saved."""
        ...

    def parts(self, model: Any) -> tuple[Tensors, Tensors]:
        """The bottom and the top of a model that `join` made, here or at another cut."""
        ...

    # U-shaped: labels stay on the devices, and so does the last part of the top

    @property
    def ends(self) -> frozenset[str]:
        """Names of the top's weights that `ending` computes with; `middle` computes with the others."""
        ...

    def middle(self, weights: Tensors, features: Features, *, seed: int | None) -> Features:
        """What enters the last part of the top."""
        ...

    def ending(
        self, weights: Tensors, features: Features, labels: Tensor, *, seed: int | None
    ) -> Losses:
        """What the last part of the top loses: `top` is `ending` after `middle`."""
        ...

    def flops(self, half: str, rows: int, tokens: int) -> float:
        """Floating-point operations of a forward and a backward pass of "bottom" or "top"; `tokens` is the padded
        length of text, 1 for arrays."""
        ...

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int:
        """Memory that training "bottom" or "top" needs at once."""
        ...

    def launches(self, half: str) -> int:
        """Layers or blocks of a half, each of which costs a device a start-up time."""
        ...

    def feature_shape(self, tokens: int) -> tuple[int, ...]:
        """Shape of one row's features."""
        ...
