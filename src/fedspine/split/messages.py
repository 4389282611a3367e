"""What the server and a device of split learning send each other within a round.

`Begin` asks for the first features, `Step` or `Resized` for the next ones, and `Forwarded` brings
them; the last `Step` is answered by `Ended`. In the U-shape, `Answer` and `Answered` come between.
"""

from dataclasses import replace

from torch import Tensor

from fedspine.core.checks import Asked, Terms, need, tensors_of
from fedspine.core.message import Tensors, message
from fedspine.core.reads import Reads
from fedspine.lm.base import Base
from fedspine.lm.received import check_loss, float_of, rank_in
from fedspine.nets.net import Net
from fedspine.split.batches import Budget, most_rows
from fedspine.split.cut import split_model_of
from fedspine.split.interface import SplitModel
from fedspine.split.received import (
    Agreed,
    as_sent,
    batch_of,
    check_batch,
    check_cut,
    check_ended,
    check_features,
    check_returned,
    ending_shapes,
    model_shapes,
)
from fedspine.split.trainable_half import Optimising
from fedspine.split.wire import BYTES, Wired

BESIDE = "decoder."  # begins the names of weights that are trained beside the client model


@message
class Cutting:
    """Where the model is cut and what its adapters are, for `split_model_of`."""

    cut: int
    rank: int = 8
    scale: float = 2.0

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale, rank=self.rank)

    def check(self, asked: Asked) -> None:
        check_cut(self.cut, self.rank, asked.base)

    def of(self, base: Base | Net) -> SplitModel:
        """This model, cut."""
        return split_model_of(base, self.cut, rank=self.rank, scale=self.scale)


@message
class Begin:
    """Install this client model and return the features of the first batch.

    Batches have `batch` rows, or all of the data where there are fewer.
    """

    weights: Tensors  # of the client model: fp32 with features in fp32, else fp16
    cutting: Cutting
    batch: int | Budget
    optimising: Optimising
    precision: str  # of features and gradients
    # U-shape: the last part of the server model, which stays here with the labels
    ending: "Tensors | None" = None
    ending_optimising: Optimising | None = None

    @property
    def reads(self) -> Reads:
        return Reads(batch=most_rows(self.batch), cut=self.cutting.cut, labels=self.ending is None)

    def check(self, asked: Asked) -> None:
        """The client model is this model's, and so is what stays on the device in the U-shape."""
        need(self.precision in BYTES, f"precision is not one of {', '.join(BYTES)}")
        check_batch(self.batch)
        # a method checks by itself what it trains beside the client model
        own = {name: self.weights[name] for name in self.weights if not name.startswith(BESIDE)}
        rank = rank_in(own) if own and isinstance(asked.base, Base) else self.cutting.rank
        below, _ = model_shapes(asked.base, self.cutting.cut, rank, float_of(own))
        tensors_of("weights", own, below)
        both = (self.ending is None) == (self.ending_optimising is None)
        need(both, "ending and ending_optimising belong together")
        if self.ending is not None:
            tensors_of("ending", self.ending, ending_shapes(asked, float_of(self.ending)))

    def agreed(self, before: Agreed | None, terms: Terms) -> Agreed:
        """What later messages of the round must match."""
        dtype = as_sent(self.precision)
        shape = self.cutting.of(terms.base).feature_shape(1)
        return Agreed(
            weights={name: (dtype, tuple(each.shape)) for name, each in self.weights.items()},
            ending=None
            if self.ending is None
            else {name: (dtype, tuple(each.shape)) for name, each in self.ending.items()},
            features=shape[1:] if isinstance(terms.base, Base) else shape,
            batch=self.batch,
            precision=self.precision,
        )


@message
class Step:
    """The gradient of the batch's mean loss with respect to its features; None where none is
    needed.
    """

    gradient: Wired | None

    @property
    def reads(self) -> Reads:
        return Reads()  # a batch of the size that `Begin` or `Resized` asked for


@message
class Resized:
    """A step, and the rows or tokens of the batches after it."""

    step: Step
    batch: int | Budget
    optimising: Optimising | None = None  # from now on, where it changes with the batch

    @property
    def reads(self) -> Reads:
        return Reads(batch=most_rows(self.batch))

    def check(self, asked: Asked) -> None:
        check_batch(self.batch)

    def agreed(self, before: Agreed | None, terms: Terms) -> Agreed | None:
        """Another batch."""
        return before and replace(before, batch=self.batch)


@message
class Forwarded:
    """A batch's features, and its labels unless they stay."""

    features: Wired
    labels: Tensor | None

    def check(self, asked: Asked) -> None:
        check_features(self.features, self.labels, asked)

    def agreed(self, before: Agreed | None, terms: Terms) -> Agreed | None:
        """The size of this batch."""
        rows, tokens = batch_of(self.features)
        return before and replace(before, rows=rows, tokens=tokens)


@message
class Answer:
    """The middle's output for the current batch (U-shape)."""

    features: Wired

    @property
    def reads(self) -> Reads:
        return Reads()  # the current batch


@message
class Answered:
    """The gradient of the batch's summed loss with respect to the middle's output; that loss."""

    gradient: Wired
    loss: float  # mean over the batch's labels
    counted: int  # labels

    def check(self, asked: Asked) -> None:
        check_loss(self.loss)
        check_returned(self.gradient, self.counted, asked)


@message
class Ended:
    """The client model after the round (U-shape: the last part of the server model too)."""

    weights: Tensors
    ending: "Tensors | None"

    def check(self, asked: Asked) -> None:
        check_ended(self.weights, self.ending, asked)
