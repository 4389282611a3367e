"""The frozen pre-trained model: loaded once, cut to any structure, never changed.

`Base` holds the weights of the prunable sites apart from a skeleton module. `fit` installs one model's slices,
adapter and task head into that skeleton, which costs a few milliseconds instead of building a module.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedspine.lm.anatomy import Anatomy
from fedspine.lm.lora import AdaptedLinear, a_name, b_name
from fedspine.lm.structure import Structure, cut, kept_columns, kept_rows
from fedspine.message import Tensors, message


@message
class Model:
    """What a device runs: a structure, the adapter cut to it, and the task head, on top of the base.

    `adapter` maps PEFT's names to factors of any rank (empty: none), `head` full parameter names to tensors.
    """

    structure: Structure
    adapter: Tensors
    head: Tensors
    scale: float


@dataclass(frozen=True)
class HeadLayer:
    """A linear layer of the task head; `fresh` where the checkpoint did not hold it."""

    path: str
    weight: Tensor
    bias: Tensor | None
    fresh: bool


class Base:
    """A frozen transformer for one task, in one precision; `skeleton` must not be used but through `fit`."""

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        head: tuple[HeadLayer, ...],
        precision: torch.dtype,
    ) -> None:
        self.anatomy, self.head, self.precision = anatomy, head, precision
        self.skeleton = module.eval().requires_grad_(False).to(precision)
        self.config = module.config
        self.config.use_cache = False  # nothing here generates token by token
        self._sites = {site.path: site for site in anatomy.sites}
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        for site in anatomy.sites:
            linear = module.get_submodule(site.path)
            self.weights[site.path] = (linear.weight.data, None if linear.bias is None else linear.bias.data)
            module.set_submodule(site.path, AdaptedLinear(*self.weights[site.path]))
        for layer in head:
            module.set_submodule(layer.path, AdaptedLinear(layer.weight, layer.bias))
        # what is left are embeddings and norms: all that neither pruning nor the head's training touches
        self.embeddings = sum(parameter.numel() for parameter in module.parameters())

    def initial_head(self, rng: np.random.Generator) -> Tensors:
        """The task head to start from: the checkpoint's where it has one, else normal weights and zero biases."""
        spread = getattr(self.config, "initializer_range", 0.02)
        tensors: Tensors = {}
        for layer in self.head:
            weight = layer.weight
            if layer.fresh:
                weight = torch.from_numpy(rng.normal(0, spread, tuple(weight.shape)).astype(np.float32))
            tensors[f"{layer.path}.weight"] = weight.clone()
            if layer.bias is not None:
                tensors[f"{layer.path}.bias"] = torch.zeros_like(layer.bias) if layer.fresh else layer.bias.clone()
        return tensors

    def fit(self, model: Model, *, merge: bool = False) -> nn.Module:
        """The module that computes `model`; it is valid until the next call.

        The tensors of the adapter and the head are used as they are, so gradients reach them if they ask for it; with
        `merge` the adapter is added to the weights instead, as a deployed model has it, which runs faster.
        """
        for site in self.anatomy.sites:
            weight, bias = self.slice(site.path, model.structure)
            a, b = model.adapter.get(a_name(site.path)), model.adapter.get(b_name(site.path))
            if merge and a is not None and b is not None:
                weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=model.scale).to(weight.dtype)
                a = b = None
            self.skeleton.get_submodule(site.path).put(weight, bias, a, b, model.scale)
        for layer in self.head:
            weight, bias = model.head[f"{layer.path}.weight"], model.head.get(f"{layer.path}.bias")
            self.skeleton.get_submodule(layer.path).put(weight, bias)
        return self.skeleton

    def slice(self, path: str, structure: Structure) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one site, physically cut to `structure`."""
        site = self._sites[path]
        weight, bias = self.weights[path]
        rows, columns = kept_rows(site, structure), kept_columns(site, structure)
        return cut(cut(weight, rows, 0), columns, 1), None if bias is None else cut(bias, rows, 0)


def line_energy(base: Base) -> Tensors:
    """Squared norms of the rows (or columns, where those are cut) of every site's unpruned weight, by path."""
    return {
        site.path: base.weights[site.path][0].float().square().sum(1 if site.row_units else 0)
        for site in base.anatomy.sites
    }


def site_norms(anatomy: Anatomy, energy: Tensors, structure: Structure) -> Float[Tensor, " sites"]:
    """Frobenius norm of every site's weight cut to `structure`, from `line_energy`."""
    sums = []
    for site in anatomy.sites:
        kept = kept_rows(site, structure) if site.row_units else kept_columns(site, structure)
        sums.append(energy[site.path][kept].sum())
    return torch.stack(sums).sqrt()
