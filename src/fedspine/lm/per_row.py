"""Clipped gradients of single rows, for DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

The models of a stack are trained on rows of their own in one pass. So a stack of copies of one
model, each with one row, has the gradient of every row, and nothing needs a backward pass of its
own. The copies share their memory; only the gradients are one per row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedspine.core.draws import Draws
from fedspine.core.message import Tensors
from fedspine.core.task import Examples
from fedspine.core.tensors import moved
from fedspine.lm.base import Base, Model
from fedspine.lm.cost import Extent
from fedspine.lm.prefix import entering

MOST_ROWS = 32  # of one pass
MOST_BYTES = 1 << 28  # of the gradients of one pass

LossesOf = Callable[[nn.Module, Tensors, int], Float[Tensor, " models"]]


def poisson_batches(rows: int, rate: float, steps: int, draws: Draws) -> Iterator[np.ndarray]:
    """The rows of each step: every row is in it with probability `rate`, whatever the others do."""
    for _ in range(steps):
        yield np.flatnonzero(draws.uniform(rows) < rate)


@dataclass(frozen=True)
class RowGradients:
    """The gradients of `model` on the rows of `data`, of the tensors by these names.

    `stored` are the activations that enter block `first`, or None to compute from the embeddings;
    `losses_of` gives each model's loss.
    """

    base: Base
    model: Model
    names: Sequence[str]
    data: Examples
    losses_of: LossesOf
    first: int = 0
    stored: Tensor | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows of one pass, by the memory that their gradients take."""
        tensors = self.model.adapter | self.model.head
        numbers = sum(tensors[name].numel() for name in self.names)
        return min(MOST_ROWS, max(1, MOST_BYTES // (4 * max(1, numbers))))

    def clipped_sum(self, values: Mapping[str, Tensor], rows: np.ndarray, most: float) -> Tensors:
        """The sum of these rows' gradients at `values`, of all the adapter's and the head's
        tensors; each row's is scaled down to the norm `most` where it is larger.

        A gradient that is not finite counts as zero, so the sum's sensitivity is `most` whatever
        the rows are.
        """
        sums = [torch.zeros_like(values[name]) for name in self.names]
        for chosen in self.passes(rows):
            each = self._each(values, chosen)
            norms = _norms(each)
            if not bool(norms.isfinite().all()):  # only then may an entry be infinite or NaN
                each = [gradients.nan_to_num(0.0, 0.0, 0.0) for gradients in each]
            factors = _clip_factors(norms, most)
            for total, gradients in zip(sums, each, strict=True):
                total += torch.tensordot(factors, gradients, dims=1)
        return dict(zip(self.names, sums, strict=True))

    def passes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in passes, those of like length together, so that little is padded."""
        by_length = rows[np.argsort(self.data.lengths[rows], kind="stable")]
        for start in range(0, len(rows), self.rows_at_once):
            yield by_length[start : start + self.rows_at_once]

    def extent(self, rows: np.ndarray) -> Extent:
        """Padded tokens of a step over these rows."""
        widths = [(len(chosen), self.data.width(chosen)) for chosen in self.passes(rows)]
        return Extent(
            tokens=sum(count * width for count, width in widths),
            squared_tokens=sum(count * width**2 for count, width in widths),
        )

    def _each(self, values: Mapping[str, Tensor], rows: np.ndarray) -> list[Tensor]:
        """The gradient of each of these rows, fp32 [rows, ...], by tensor."""
        count = len(rows)
        copies = {
            name: value.detach().expand(count, *value.shape).requires_grad_(name in self.names)
            for name, value in values.items()
        }
        module = self.base.fit_stack(
            [self.model.structure] * count,
            {name: copies[name] for name in self.model.adapter},
            {name: copies[name] for name in self.model.head},
            self.model.scale,
        )
        width = self.data.width(rows)
        if self.stored is not None:
            entry = self.base.start_at(self.first)
            entry.hidden = entering(self.base, self.data, self.stored, rows, width)
        inputs = moved(self.data.batch(rows, width), self.base.device)
        losses = self.losses_of(module, inputs, count)
        return list(torch.autograd.grad(losses.sum(), [copies[name] for name in self.names]))


def _norms(each: Sequence[Float[Tensor, "rows ..."]]) -> Float[Tensor, " rows"]:
    """The norm of each row's gradient, over all tensors."""
    return torch.stack([gradients.flatten(1).square().sum(1) for gradients in each]).sum(0).sqrt()


def _clip_factors(norms: Float[Tensor, " rows"], most: float) -> Float[Tensor, " rows"]:
    """What each row's gradient is scaled by, 0 where its norm is not finite."""
    factors = (most / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(norms.isfinite(), factors, 0.0)
