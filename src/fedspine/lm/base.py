"""The frozen pre-trained model: loaded once, cut to any structure, never changed.

`Base` holds the weights of the prunable sites apart from a skeleton module. `fit` installs one
model's slices, adapter and task head into that skeleton, which costs a few milliseconds instead of
building a module.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedspine.core.message import Tensors, message
from fedspine.core.task import Pooling
from fedspine.core.tensors import moved, padded
from fedspine.lm.attention import module_inputs
from fedspine.lm.digest import tensors_sha256
from fedspine.lm.frozen import Frozen, QuantisedWeight, expanded, quantised
from fedspine.lm.lora import AdaptedLinear, a_name, b_name, check_complete, w_name
from fedspine.lm.pooling import BiEncoder, reading
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite, QuantisedLayout, unit_map
from fedspine.lm.structure import Structure, cut, is_full, kept_columns, kept_rows, key_of

SLICED = 2  # structures whose slices are kept: what is trained, and what was scored in between


@message
class Model:
    """What a device runs: a structure, the adapter cut to it, and the task head, on top of the
    base.

    `adapter` maps PEFT's names to factors of any rank (empty: none), `head` full parameter names to
    tensors.
    """

    structure: Structure
    adapter: Tensors
    head: Tensors
    scale: float

    def to(self, device: torch.device) -> "Model":
        """The same model with its tensors on another device; a structure is always on the CPU."""
        return replace(self, adapter=moved(self.adapter, device), head=moved(self.head, device))


@dataclass(frozen=True)
class HeadLayer:
    """A linear layer of the task head; `fresh` where the checkpoint did not hold it."""

    path: str
    weight: Tensor
    bias: Tensor | None
    fresh: bool

    @property
    def tensors(self) -> Tensors:
        """Weight and bias by name."""
        own = {"weight": self.weight, "bias": self.bias}
        return {f"{self.path}.{part}": each for part, each in own.items() if each is not None}


class Base:
    """A frozen transformer for one task, in one precision.

    Use `skeleton` only through `fit`. `weights_sha256` is of the module as it came, so it is the
    same in every precision; it is given where the module has no weights (`lm.weightless`). A
    `QuantisedLayout` says that the blocks' weights are held quantised.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: PrunableLayout,
        head: tuple[HeadLayer, ...],
        precision: torch.dtype,
        pooling: Pooling | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        self.layout, self.head, self.precision = layout, head, precision
        self.pooling = pooling  # None: a language model, which has no task head
        self.weights_sha256 = (
            _weights_sha256(module, head) if weights_sha256 is None else weights_sha256
        )
        self.skeleton = module.eval().requires_grad_(False)
        self.config = module.config
        self.config.use_cache = False  # nothing here generates token by token
        self.weights: dict[str, tuple[Frozen, Tensor | None]] = {}
        self._linears: dict[str, AdaptedLinear] = {}
        self.split_models: dict[Any, Any] = {}  # kept by `split.cut`
        self._slices: OrderedDict[bytes, dict[str, tuple[Frozen, Tensor | None]]] = OrderedDict()
        for site in layout.sites:
            linear = module.get_submodule(site.path)
            self.weights[site.path] = (
                self._held_weight(linear.weight.data, site),
                None if linear.bias is None else linear.bias.data.to(precision),
            )
            self._linears[site.path] = AdaptedLinear(*self.weights[site.path])
        for layer in head:
            self._linears[layer.path] = AdaptedLinear(layer.weight, layer.bias)
        for path, linear in self._linears.items():
            module.set_submodule(path, linear)
        module.to(precision)
        self._readout = reading(module, pooling)
        backbone, names = module.get_submodule(layout.prefix), unit_map(layout.architecture)
        self._embeddings = backbone.get_submodule(names.embeddings)
        self._blocks = list(backbone.get_submodule(names.layers))
        self.embeddings = self._parameters_left()

    def _held_weight(self, weight: Tensor, site: PrunableSite) -> Frozen:
        """A weight as devices hold it; one without values stays as it is."""
        if isinstance(self.layout, QuantisedLayout) and not weight.is_meta:
            return quantised(weight, site, self.layout, self.precision)
        return weight.to(self.precision)

    def _parameters_left(self) -> int:
        """Parameters of embeddings and norms: all that neither pruning nor the head's training
        touches.
        """
        return sum(parameter.numel() for parameter in self.whole_skeleton().parameters())

    def keep_tokens(self, kept: Int[Tensor, " tokens"]) -> None:
        """Cut the token embedding, and an output layer that is not tied to it, to these rows, in
        this order; `weights_sha256` stays that of the whole.
        """
        module = self.whole_skeleton()
        rows = [layer.weight.data[kept.to(layer.weight.device)] for layer in _of_tokens(module)]
        with torch.random.fork_rng(devices=[]):  # it draws new rows, of which there are none here
            module.resize_token_embeddings(len(kept), mean_resizing=False)
        for layer, weight in zip(_of_tokens(module), rows, strict=True):
            layer.weight.data.copy_(weight)
        names = unit_map(self.layout.architecture)
        self._embeddings = module.get_submodule(self.layout.prefix).get_submodule(names.embeddings)
        self.skeleton.requires_grad_(False)
        self.embeddings = self._parameters_left()

    def initial_head(self, rng: np.random.Generator) -> Tensors:
        """The task head to start from: the checkpoint's where it has one, else normal weights and
        zero biases.
        """
        spread = getattr(self.config, "initializer_range", 0.02)
        tensors: Tensors = {}
        for layer in self.head:
            weight = layer.weight
            if layer.fresh:
                weight = torch.from_numpy(
                    rng.normal(0, spread, tuple(weight.shape)).astype(np.float32)
                )
            tensors[f"{layer.path}.weight"] = weight.clone()
            if layer.bias is not None:
                tensors[f"{layer.path}.bias"] = (
                    torch.zeros_like(layer.bias) if layer.fresh else layer.bias.clone()
                )
        return tensors

    @property
    def token_bytes(self) -> int:
        """Bytes in fp32 of all weights with a row for each token; a tied one counts once."""
        weights = {id(layer.weight): layer.weight for layer in _of_tokens(self.whole_skeleton())}
        return 4 * sum(weight.numel() for weight in weights.values())

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(
            self._embeddings.parameters()
        ).device  # the skeleton may stand without any at the moment

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on; the task head's initial weights stay where they are."""
        self.skeleton.to(device)
        self.weights = {
            path: (weight.to(device), None if bias is None else bias.to(device))
            for path, (weight, bias) in self.weights.items()
        }
        self._slices.clear()

    def fit(self, model: Model, *, merge: bool = False) -> nn.Module:
        """The module that computes `model`; it is valid until the next call.

        The tensors of the adapter and the head are used as they are, so gradients reach them if
        they ask for it; with `merge` the adapter is added to the weights instead, as a deployed
        model has it, which runs faster.
        """
        slices = self._sliced(model.structure)
        check_complete(model.adapter, self.weights)
        for site in self.layout.sites:
            weight, bias = slices[site.path]
            a, b = model.adapter.get(a_name(site.path)), model.adapter.get(b_name(site.path))
            if merge and a is not None and b is not None:
                whole = expanded(weight)
                merged = torch.addmm(whole.float(), b.float(), a.float(), alpha=model.scale)
                weight = merged.to(whole.dtype)
                a = b = None
            self._linears[site.path].put(weight, bias, a, b, model.scale)
        return self._with_head(model.head)

    def fit_stack(
        self, structures: Sequence[Structure], adapter: Tensors, head: Tensors, scale: float
    ) -> nn.Module:
        """The module that computes several models in one pass, until the next call; the first
        dimension of its inputs counts the rows of all of them, one model after another.

        `adapter` and `head` are stacked along a first dimension, with zeros where a model is
        smaller than the largest. Models of the same structure share the base's weights.
        """
        slices = [self._sliced(structure) for structure in structures]
        check_complete(adapter, self.weights)
        shared = all(each is slices[0] for each in slices)
        for site in self.layout.sites:
            weight, bias = slices[0][site.path]
            if not shared:
                weight = padded([expanded(each[site.path][0]) for each in slices])
                bias = None if bias is None else padded([each[site.path][1] for each in slices])
            a, b = adapter.get(a_name(site.path)), adapter.get(b_name(site.path))
            self._linears[site.path].put(weight, bias, a, b, scale)
        return self._with_head(head)

    def add(self, change: Tensors, scale: float) -> None:
        """Add `scale * change` to weights of the model that was last fitted, of which the full
        structure is kept, until the next one is; `change` is named `<path>.weight`.
        """
        for site in self.layout.sites:
            linear, extra = self._linears[site.path], change.get(w_name(site.path))
            if extra is not None:
                whole = expanded(linear.weight)
                added = extra.to(whole.device).float()
                linear.weight = whole.float().add(added, alpha=scale).to(self.precision)

    def whole_skeleton(self) -> nn.Module:
        """The skeleton with all its parts put back, some of which `through` and `start_at` take
        out.
        """
        self._place(self._embeddings, list(self._blocks))
        return self.skeleton

    def _with_head(self, head: Tensors) -> nn.Module:
        for layer in self.head:
            weight, bias = head[f"{layer.path}.weight"], head.get(f"{layer.path}.bias")
            self._linears[layer.path].put(weight, bias)
        self.whole_skeleton()
        return self._readout

    def below(self, layer: int, inputs: Tensors) -> Float[Tensor, "rows tokens width"]:
        """What enters block `layer` of the model that was last fitted, which must be fitted again
        afterwards.
        """
        with torch.no_grad():
            return self.through(0, layer, inputs)

    def through(
        self,
        first: int,
        last: int,
        inputs: Tensors,
        hidden: Float[Tensor, "rows tokens width"] | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        """What leaves the blocks from `first` to before `last` of the model that was last fitted,
        which must be fitted again afterwards; `hidden` enters them, or None for what the embeddings
        make of `inputs`.

        Gradients reach all that asks for them.
        """
        if first == last and hidden is not None:
            return hidden
        embeddings = self._embeddings if hidden is None else Entry(hidden)
        tap = _Tap()
        blocks = (
            [_Passing()] * first
            + self._blocks[first:last]
            + [tap]
            + [_Passing()] * len(self._blocks)
        )
        self._place(embeddings, blocks[: len(self._blocks)])
        watch = (
            None if last < len(self._blocks) else self._blocks[-1].register_forward_hook(tap.watch)
        )
        try:
            self.skeleton.get_submodule(self.layout.prefix)(**self._backbone_inputs(inputs))
        finally:
            if watch is not None:
                watch.remove()
        return tap.seen

    def _backbone_inputs(self, inputs: Tensors) -> Tensors:
        of_module = module_inputs(inputs)
        match self._readout:
            case BiEncoder():
                return self._readout.backbone_inputs(**of_module)
        return of_module

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, from input to output, as they were last fitted."""
        return list(self._blocks)

    @property
    def default_cut(self) -> int:
        """Blocks on a device in split learning by default: 2 of 12, and at least 1."""
        return max(1, self.layout.layers // 6)

    def start_at(self, layer: int) -> "Entry":
        """Start the last fitted model at block `layer`; its inputs are what the returned entry
        holds.
        """
        entry = Entry(torch.empty(0))
        self._place(entry, [_Passing()] * layer + self._blocks[layer:])
        return entry

    def _place(self, embeddings: nn.Module, blocks: list[nn.Module]) -> None:
        backbone = self.skeleton.get_submodule(self.layout.prefix)
        names = unit_map(self.layout.architecture)
        setattr(backbone, names.embeddings, embeddings)
        places = backbone.get_submodule(names.layers)
        for i, block in enumerate(blocks):
            places[i] = block

    def fitted_weights(self) -> dict[str, Frozen]:
        """The weights of all sites, by path, as they were last fitted: stacked where several models
        were, quantised where they are held so.
        """
        return {site.path: self._linears[site.path].weight for site in self.layout.sites}

    def slice(self, path: str, structure: Structure) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one site, physically cut to `structure`; a quantised one expanded."""
        weight, bias = self._sliced(structure)[path]
        return expanded(weight), bias

    def _sliced(self, structure: Structure) -> dict[str, tuple[Frozen, Tensor | None]]:
        """Weight and bias of every site cut to `structure`; those of the last few structures are
        kept.
        """
        if is_full(structure):
            return self.weights
        key = key_of(structure)
        slices = self._slices.pop(key, None) or {
            site.path: self._cut_site(site, structure) for site in self.layout.sites
        }
        self._slices[key] = slices
        while len(self._slices) > SLICED:
            self._slices.popitem(last=False)
        return slices

    def _cut_site(self, site: PrunableSite, structure: Structure) -> tuple[Frozen, Tensor | None]:
        weight, bias = self.weights[site.path]
        rows, columns = kept_rows(site, structure), kept_columns(site, structure)
        bias = None if bias is None else cut(bias, rows, 0)
        if isinstance(weight, QuantisedWeight):
            return weight.cut(rows if columns is None else columns), bias
        return cut(cut(weight, rows, 0), columns, 1), bias


def _of_tokens(module: nn.Module) -> list[nn.Module]:
    """The layers with a row for each token: the embedding, and the output layer of a decoder."""
    found = (module.get_input_embeddings(), module.get_output_embeddings())
    return [layer for layer in found if layer is not None]


def _weights_sha256(module: nn.Module, head: tuple[HeadLayer, ...]) -> str:
    """A digest of what the checkpoint holds; every method draws anew the layers that it lacks."""
    fresh = tuple(f"{layer.path}." for layer in head if layer.fresh)
    held = {name: p for name, p in module.named_parameters() if not name.startswith(fresh)}
    return tensors_sha256(held)


class Entry(nn.Module):
    """Replaces the embeddings: returns the stored hidden states instead of looking tokens up."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class _Passing(nn.Module):
    """Replaces a block that is not computed."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _Tap(_Passing):
    """Records the hidden states that pass through."""

    seen: Tensor

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen = hidden
        return hidden

    def watch(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Record the output of the last block, which no block follows."""
        self.seen = output
