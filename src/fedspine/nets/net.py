"""A convolutional net for one task: its shape and its blocks; the weights come with every call.

What `Base` is for transformers. Here nothing is frozen: all weights are trained, averaged and sent.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedspine.core.message import Tensors, message
from fedspine.core.tensors import moved
from fedspine.nets.models import Shape, blocks_of, design_of


@message
class NetModel:
    """What a device runs: all weights of a net by name, `block1.conv.weight`, and batch norm's
    statistics among them.
    """

    net: str
    weights: Tensors

    def to(self, device: torch.device) -> "NetModel":
        """The same model with its tensors on another device."""
        return NetModel(net=self.net, weights=moved(self.weights, device))


class Net:
    """The net called `name` for rows of `shape` [channels, ...] and this many classes, computing on
    `device`.

    Raises BadInput for an unknown net, or rows that it cannot read.
    """

    def __init__(self, name: str, shape: Shape, classes: int) -> None:
        self.name, self.shape, self.classes = name, tuple(shape), classes
        self.device = torch.device("cpu")
        with torch.device("meta"):  # weights come with every call, so none are kept here
            self.blocks = nn.Sequential(blocks_of(name, self.shape, classes))
        self.split_models: dict[Any, Any] = {}  # kept by `split.cut`

    @property
    def default_cut(self) -> int:
        """Blocks of the client model by default."""
        return design_of(self.name).cut

    def to(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        self.device = device

    def start(self, rng: np.random.Generator) -> Tensors:
        """Fresh weights as torch draws them, but for AlexNet; the same for the same state of `rng`.

        With torch's own, AlexNet learns nothing in its first few hundred steps of plain SGD; with
        He's, CNN-H does not.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            module = nn.Sequential(blocks_of(self.name, self.shape, self.classes))
            if design_of(self.name).he:
                _draw_as_he(module)
        return module.state_dict()

    def logits(self, weights: Tensors, inputs: Tensor) -> Tensor:
        """The logits of the net with these weights for [rows, ...]: [rows, classes], in evaluation
        mode.
        """
        return functional_call(self.blocks.eval(), weights, (inputs,), strict=True)


def _draw_as_he(module: nn.Sequential) -> None:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        nn.init.kaiming_normal_(
            layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu"
        )
        nn.init.zeros_(layer.bias)
