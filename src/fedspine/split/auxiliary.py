"""A decoder on devices that reconstructs a batch from its features: LocFedMix-SL's local loss.

Oh et al. 2022 (WWW, LocFedMix-SL) take the regulariser of InfoPro (arXiv:2101.10832): features from
which the input can be reconstructed still hold what later layers may need. What is ours:
docs/methods/locfedmix.md.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedspine.core.message import Tensors, message
from fedspine.core.tensors import moved
from fedspine.lm.base import Base
from fedspine.nets.net import Net
from fedspine.split.cut import split_model_of
from fedspine.split.interface import Features, SplitModel
from fedspine.split.messages import Cutting

INTO, INTO_BIAS, OUT, OUT_BIAS = (
    "decoder.into.weight",
    "decoder.into.bias",
    "decoder.out.weight",
    "decoder.out.bias",
)
DECODER = frozenset((INTO, INTO_BIAS, OUT, OUT_BIAS))
KERNEL = 3  # of the last convolution, if inputs have spatial or time dimensions


@message
class DecodedCutting:
    """A cut with a decoder beside the client model, `width` channels wide inside."""

    cutting: Cutting
    width: int
    weight: float  # of the decoder's loss

    def of(self, base: Base | Net) -> "Decoded":
        """The client model of this model and its decoder."""
        return Decoded(base, self.cutting.of(base), self.width)


class Decoded:
    """A client model with a decoder, which share one dictionary of weights; it has the part of
    `SplitModel` that devices use.

    For texts, two linear layers reconstruct the embeddings, token by token. For arrays, a linear
    layer over channels, interpolation to the input's size and a convolution reconstruct the values.
    """

    def __init__(self, base: Base | Net, split_model: SplitModel, width: int) -> None:
        self._base, self._split_model, self._width = base, split_model, width
        match base:
            case Net(shape=(channels, *places)):
                self._aim, self._places = channels, tuple(places)
            case Base():
                self._aim, self._places = base.layout.width, ()
        shape = split_model.feature_shape(1)
        # channels of the features; dimensions that inputs lack (CNN-H arranges sensors side by
        # side) count as channels
        self._given = (
            math.prod((shape[0], *shape[1 + len(self._places) :])) if self._places else shape[-1]
        )

    @property
    def statistics(self) -> frozenset[str]:
        return self._split_model.statistics

    def start(self, rng: np.random.Generator) -> Tensors:
        """The decoder's initial weights, drawn as torch draws those of linear layers."""
        kernel = (KERNEL,) * len(self._places)
        sizes = {INTO: (self._width, self._given), OUT: (self._aim, self._width, *kernel)}
        weights = {}
        for name, bias in ((INTO, INTO_BIAS), (OUT, OUT_BIAS)):
            bound = 1 / math.sqrt(math.prod(sizes[name][1:]))
            for key, size in ((name, sizes[name]), (bias, sizes[name][:1])):
                weights[key] = torch.from_numpy(rng.uniform(-bound, bound, size).astype(np.float32))
        return weights

    def client_forward(self, weights: Tensors, inputs: Tensors, *, seed: int | None) -> Features:
        return self._split_model.client_forward(bare(weights), inputs, seed=seed)

    def loss(self, weights: Tensors, features: Features, inputs: Tensors) -> Tensor:
        """The mean squared error of the reconstruction, over all rows or tokens."""
        values = features.values.float()
        own = moved({name: weights[name] for name in DECODER}, values.device)
        if self._places:
            read = self._read_arrays(own, values)
            return functional.mse_loss(read, inputs["inputs"].to(read))
        inside = functional.relu(functional.linear(values, own[INTO], own[INTO_BIAS]))
        read = functional.linear(inside, own[OUT], own[OUT_BIAS])
        with torch.no_grad():
            aim = split_model_of(self._base, 0).client_forward({}, inputs, seed=None).values.float()
        assert features.mask is not None
        tokens = features.mask.to(read.device)
        return functional.mse_loss(read[tokens], aim[tokens])

    def _read_arrays(self, weights: Tensors, values: Tensor) -> Tensor:
        places = len(self._places)
        values = values[
            (..., *[None] * (places + 2 - values.dim()))
        ]  # a cut among linear layers leaves no places
        values = (
            values.flatten(2 + places).movedim(-1, 2).flatten(1, 2)
            if values.dim() > 2 + places
            else values
        )
        inside = functional.relu(
            functional.linear(values.movedim(1, -1), weights[INTO], weights[INTO_BIAS])
        )
        grown = functional.interpolate(
            inside.movedim(-1, 1), self._places, mode={1: "linear", 2: "bilinear"}[places]
        )
        convolve = {1: functional.conv1d, 2: functional.conv2d}[places]
        return convolve(grown, weights[OUT], weights[OUT_BIAS], padding=KERNEL // 2)

    def flops(self, half: str, rows: int, tokens: int) -> float:
        """Of the client model with its decoder."""
        given = self._split_model.feature_shape(tokens)
        cells = math.prod(given) // self._given
        into = cells * self._given * self._width
        out = math.prod(self._places) * KERNEL ** len(self._places) if self._places else tokens
        # two for each product, thrice: forward, and backward to weights and to features
        return self._split_model.flops(half, rows, tokens) + 6.0 * rows * (
            into + out * self._width * self._aim
        )

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int:
        """Of the client model with its decoder, whose activations and gradients are in fp32."""
        places = math.prod(self._places) if self._places else tokens
        return self._split_model.memory_bytes(half, rows, tokens) + 8 * rows * places * (
            self._width + self._aim
        )

    def launches(self, half: str) -> int:
        """Blocks of the client model, and one for the decoder."""
        return self._split_model.launches(half) + 1


def decoder(weights: Tensors) -> Tensors:
    """The decoder's weights alone."""
    return {name: tensor for name, tensor in weights.items() if name in DECODER}


def bare(weights: Tensors) -> Tensors:
    """The client model's weights without the decoder's."""
    return {name: tensor for name, tensor in weights.items() if name not in DECODER}
