"""A model cut in two: the client model runs on devices, the server model on the server.

Features (smashed data) go up, their gradients come down. This is all that split methods know of a
model. `cut.split_model_of` gives it for transformers (trainable: LoRA and the task head) and for
convolutional nets (trainable: everything), so one method file serves both.
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
    """The output of a client model for some rows, or the gradient of a loss with respect to it.

    `values` is [rows, ...]: [rows, tokens, width] for text, [rows, channels, ...] for arrays.
    `mask`, bool [rows, tokens], is true for tokens and false for padding; None if all rows have one
    shape.
    """

    values: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tokens(self) -> int:
        """Of all rows, without padding; 1 for each row of arrays."""
        return len(self) if self.mask is None else int(self.mask.sum())

    def times(self, factor: float) -> "Features":
        """The same with all values multiplied."""
        return Features(values=self.values * factor, mask=self.mask)


@dataclass(frozen=True)
class Losses:
    """The losses of some rows: `total` is each row's sum, `counted` the number of labels in it.

    `adjusted` is `total` with the logit adjustments that were asked for.
    """

    total: Float[Tensor, " rows"]
    counted: Int[Tensor, " rows"]
    adjusted: Float[Tensor, " rows"] | None = None

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The loss that is minimised: the mean over all labels of all rows; 0 if none counts."""
        return self.total.sum() / self.labels

    @property
    def labels(self) -> Int[Tensor, ""]:
        """The number of labels in the mean, at least 1: if no label counts, all sums are 0."""
        return self.counted.sum().clamp(min=1)


def seed_at(seed: int, number: int) -> int:
    """The seed of round `number` of a run with this seed, or of an iteration of a round with it."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def adjusted_losses(
    logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    adjustments: Float[Tensor, "rows classes"] | None,
) -> Float[Tensor, " rows"] | None:
    """The cross-entropy of each row with `adjustments` added to its logits, None without them."""
    if adjustments is None:
        return None
    return cross_entropy(logits.float() + adjustments.to(logits.device), labels, reduction="none")


class SplitModel(Protocol):
    """One model cut at one place. Weights are handed in; nothing is kept between calls.

    Gradients reach every tensor of `weights` that requires one. `seed` fixes what is drawn
    (dropout); with None the half computes as a deployed model does.
    """

    @property
    def statistics(self) -> frozenset[str]:
        """Names of weights that are averaged but not trained, such as batch norm's.

        `client_forward` and `server_forward` update those handed in, in place, where a seed is
        given.
        """
        ...

    @property
    def entry(self) -> frozenset[str]:
        """Names of the weights of the server model's first block, if it still makes features.

        Such a block is a transformer's or a convolution. Empty where all blocks only classify.
        """
        ...

    def start(self, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """The initial weights of both halves: all that training changes."""
        ...

    def client_forward(self, weights: Tensors, inputs: Tensors, *, seed: int | None) -> Features:
        """The features of a batch of `Examples` or `Arrays`; labels in it are ignored."""
        ...

    def server_forward(
        self,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        *,
        seed: int | None,
        adjustments: Float[Tensor, "rows classes"] | None = None,
    ) -> Losses:
        """The server model's losses on these features; `labels` are padded to the features' tokens.

        `adjustments`, for classes only, asks for the losses with them added to the logits too.
        """
        ...

    def join(self, client_model: Tensors, server_model: Tensors) -> Any:
        """Both halves as one model that can be deployed, scored and saved."""
        ...

    def parts(self, model: Any) -> tuple[Tensors, Tensors]:
        """Both halves of a model that `join` made, here or at another cut."""
        ...

    # U-shaped: labels stay on the devices, and so does the last part of the server model

    @property
    def ends(self) -> frozenset[str]:
        """Names of the server model's weights in `ending_forward`; the others are the middle's."""
        ...

    def middle_forward(self, weights: Tensors, features: Features, *, seed: int | None) -> Features:
        """What enters the last part of the server model."""
        ...

    def ending_forward(
        self, weights: Tensors, features: Features, labels: Tensor, *, seed: int | None
    ) -> Losses:
        """The losses of the last part, which with the middle is `server_forward`."""
        ...

    def flops(self, half: str, rows: int, tokens: int) -> float:
        """Floating-point operations of a forward and a backward pass of "client" or "server".

        `tokens` is the padded length of text, 1 for arrays.
        """
        ...

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int:
        """Peak memory of training "client" or "server"."""
        ...

    def launches(self, half: str) -> int:
        """Layers or blocks of a half, each of which costs a device a start-up time."""
        ...

    def feature_shape(self, tokens: int) -> tuple[int, ...]:
        """Shape of one row's features."""
        ...
