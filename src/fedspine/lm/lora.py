"""LoRA: the adapted linear layer, fresh and resized factors, and the algebra of products of unequal
rank.

An adapter holds two factors per site, named as PEFT names them: `<path>.lora_A` [rank, columns] and
`<path>.lora_B` [rows, rank]. The effective weight is W + scale * B @ A (Hu et al. 2021,
arXiv:2106.09685).
"""

import math
from collections.abc import Collection, Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors
from fedspine.lm.frozen import Frozen, QuantisedWeight, expanded
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite


def a_name(path: str) -> str:
    return f"{path}.lora_A"


def b_name(path: str) -> str:
    return f"{path}.lora_B"


def w_name(path: str) -> str:
    """The name of the weight itself."""
    return f"{path}.weight"


def is_a(name: str) -> bool:
    """Whether a factor of this name is an A."""
    return name.endswith(".lora_A")


def is_b(name: str) -> bool:
    """Whether a factor of this name is a B."""
    return name.endswith(".lora_B")


def check_complete(adapter: Collection[str], paths: Collection[str]) -> None:
    """Raise ValueError unless these names of factors come in pairs, A and B, of layers at `paths`;
    any other factor would have no effect.
    """
    for name in adapter:
        path = name.rpartition(".")[0]
        if path not in paths or not (is_a(name) or is_b(name)):
            raise ValueError(f"the adapter has {name}, which is no factor of a layer of this model")
        other = b_name(path) if is_a(name) else a_name(path)
        if other not in adapter:
            raise ValueError(f"the adapter has {name} without {other}; a model needs both factors")


class AdaptedLinear(nn.Module):
    """A linear layer whose weight is frozen or trained, with an optional low-rank adapter in fp32.

    The product runs in the weight's own precision; input of another one is converted, so that a
    bf16 backbone can feed an fp32 task head. Several models are run in one pass by stacking: a
    leading dimension `models` on the factors, and on the weight and bias unless they share them. A
    quantised weight is expanded for the product of each pass, and again for its gradient.
    The input's first dimension then counts the rows of all models, one model after another.
    """

    def __init__(self, weight: Frozen, bias: Tensor | None) -> None:
        super().__init__()
        self.put(weight, bias)

    def put(
        self,
        weight: Float[Tensor, "*#models rows columns"] | QuantisedWeight,
        bias: Float[Tensor, "*#models rows"] | None,
        a: Float[Tensor, "*#models rank columns"] | None = None,
        b: Float[Tensor, "*#models rows rank"] | None = None,
        scale: float = 0.0,
    ) -> None:
        """Replace everything this layer holds; nothing is copied."""
        self.weight, self.bias, self.a, self.b, self.scale = weight, bias, a, b, scale

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        x = x.to(self.weight.dtype)
        if self.a is not None and self.b is not None:
            return _Adapted.apply(x, self.weight, self.bias, self.a, self.b, self.scale)
        if isinstance(self.weight, QuantisedWeight):
            return _Expanded.apply(x, self.weight, self.bias)
        if self.weight.dim() == 2:
            return nn.functional.linear(x, self.weight, self.bias)
        out = _product(x.reshape(len(self.weight), -1, x.shape[-1]), self.weight, self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])


class _Adapted(torch.autograd.Function):
    """One node for x W^T + b + scale (x A^T) B^T, so that no product is computed twice and little
    is stored.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):  # type: ignore[no-untyped-def]
        flat = x.reshape(*a.shape[:-2], -1, x.shape[-1])
        a_low, b_low = a.to(x.dtype), (scale * b).to(x.dtype)
        narrow = flat @ a_low.mT
        out = _add_product(_product(flat, expanded(weight), bias), narrow, b_low.mT)
        # what only the gradient of a frozen factor needs is not kept; weights are no activations
        wanted_a, wanted_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(flat if wanted_a else None, narrow if wanted_b else None)
        ctx.weight, ctx.a_low, ctx.b_low = weight, a_low, b_low
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        flat, narrow = ctx.saved_tensors
        weight, a_low, b_low = ctx.weight, ctx.a_low, ctx.b_low
        grad = grad.reshape(*a_low.shape[:-2], -1, grad.shape[-1])
        grad_narrow = grad @ b_low
        grad_x = grad_a = grad_b = None
        if flat is not None:
            grad_a = (grad_narrow.mT @ flat).float()
        if narrow is not None:  # in this order: few rows, many columns
            grad_b = (narrow.mT @ grad).mT.float().mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            back = _product(grad, expanded(weight).mT, None)
            grad_x = _add_product(back, grad_narrow, a_low).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class _Expanded(torch.autograd.Function):
    """x W^T + b of a quantised weight, which the graph keeps as it is held."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return nn.functional.linear(x, weight.expanded(), bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ ctx.weight.expanded(), None, None


def _product(
    x: Float[Tensor, "*models n columns"],
    weight: Float[Tensor, "*#models rows columns"],
    bias: Float[Tensor, "*#models rows"] | None,
) -> Float[Tensor, "*models n rows"]:
    """x W^T + b; a weight that all models share makes one product of all their rows."""
    if weight.dim() == 3:
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.mm(flat, weight.T) if bias is None else torch.addmm(bias, flat, weight.T)
    return out.view(*x.shape[:-1], out.shape[-1])


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return out.addmm_(left, right) if out.dim() == 2 else out.baddbmm_(left, right)


def fresh_a(rng: np.random.Generator, rank: int, columns: int) -> Float[Tensor, "rank columns"]:
    """Rows for an A factor, uniform with Kaiming's bound 1/sqrt(columns), as PEFT starts them."""
    bound = 1 / math.sqrt(columns)
    return torch.as_tensor(rng.uniform(-bound, bound, (rank, columns)).astype(np.float32))


def fresh(sites: Iterable[PrunableSite], rank: int, rng: np.random.Generator) -> Tensors:
    """An adapter of `rank` on every site that changes nothing yet: A random, B zero."""
    adapter: Tensors = {}
    for site in sites:
        adapter[a_name(site.path)] = fresh_a(rng, rank, site.columns)
        adapter[b_name(site.path)] = torch.zeros(site.rows, rank)
    return adapter


def check_rank(field: str, ranks: Iterable[int], layout: PrunableLayout) -> None:
    """Raise BadInput for a rank below 1 or above the smaller side of any site."""
    narrowest = min(layout.sites, key=lambda site: min(site.rows, site.columns))
    most = min(narrowest.rows, narrowest.columns)
    for rank in ranks:
        if not 1 <= rank <= most:
            raise BadInput(
                f"{field} has rank {rank}, but {narrowest.path} is {most} wide; choose 1 to {most}"
            )


def adapter_rank(adapter: Tensors) -> int:
    """The largest rank of the factors, 0 where there are none."""
    ranks = (len(factor) for name, factor in adapter.items() if is_a(name))
    return max(ranks, default=0)


def check_depth(depth: int, layout: PrunableLayout) -> None:
    """Raise BadInput for a `method.depth` that is no number of the model's blocks; 0 means all."""
    if not 0 <= depth <= layout.layers:
        raise BadInput(
            f"method.depth is {depth}, but 0 to {layout.layers} blocks of this model can be "
            "adapted; 0 means all"
        )


def check_least_depth(depth: int, layout: PrunableLayout) -> None:
    """The same for a `method.least_depth`, which is one block at least."""
    if not 1 <= depth <= layout.layers:
        raise BadInput(
            f"method.least_depth is {depth}, but 1 to {layout.layers} blocks of this model can be "
            "adapted"
        )


def cut_rank(adapter: Tensors, rank: int) -> Tensors:
    """The first `rank` directions of every factor."""
    return {
        name: factor[:rank] if is_a(name) else factor[:, :rank] for name, factor in adapter.items()
    }


def on_blocks(layout: PrunableLayout, adapter: Tensors, lowest: int) -> Tensors:
    """The part of an adapter on the blocks from `lowest` on."""
    return of_blocks(layout, adapter, range(lowest, layout.layers))


def of_blocks(layout: PrunableLayout, adapter: Tensors, blocks: Collection[int]) -> Tensors:
    """The part of an adapter on these blocks."""
    sites = (site for site in layout.sites if site.layer in blocks)
    return {
        name: adapter[name] for site in sites for name in (a_name(site.path), b_name(site.path))
    }


def cut_blocks(
    layout: PrunableLayout, adapter: Tensors, lowest: int, ranks: tuple[int, ...]
) -> Tensors:
    """The first directions of every trained block, as many as `ranks` says from `lowest` on."""
    cut: Tensors = {}
    for site in layout.sites:
        if site.layer >= lowest:
            rank, a, b = ranks[site.layer - lowest], a_name(site.path), b_name(site.path)
            cut[a], cut[b] = adapter[a][:rank], adapter[b][:, :rank]
    return cut
