"""A convolutional net cut between two blocks: the first on devices, the others on the server."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors
from fedspine.core.tensors import moved
from fedspine.nets.models import Shape
from fedspine.nets.net import Net, NetModel
from fedspine.split.interface import Features, Losses, adjusted_losses

SINGLE = 4  # bytes of an fp32 number


class SplitNet:
    """`SplitModel` of a net after its first `cut` blocks. Not thread-safe.

    Raises BadInput for a cut outside the net.
    """

    def __init__(self, net: Net, cut: int) -> None:
        if not 1 <= cut < len(net.blocks):
            raise BadInput(
                f"the cut is after block {cut}, but {net.name} has {len(net.blocks)} blocks and "
                "each half needs one; "
                f"choose 1 to {len(net.blocks) - 1}"
            )
        self._net = net
        blocks = list(net.blocks.named_children())
        self._client_model, self._server_model = _sequence(blocks[:cut]), _sequence(blocks[cut:])
        self._middle, self._ending = _sequence(blocks[cut:-1]), _sequence(blocks[-1:])
        self.statistics = frozenset(name for name, _ in net.blocks.named_buffers())
        parts = (self._client_model, self._server_model, self._middle, self._ending)
        self._names = {part: tuple(part.state_dict()) for part in parts}
        self.ends = frozenset(self._names[self._ending])  # the classifier, which draws nothing
        row = torch.empty(1, *net.shape, device="meta")
        self._costs = {"client": _RowCost(self._client_model, row, first=True)}
        self._costs["server"] = _RowCost(
            self._server_model, self._costs["client"].output, first=False
        )
        first = _sequence(blocks[cut : cut + 1])
        makes_features = any(isinstance(layer, nn.Conv1d | nn.Conv2d) for layer in first.modules())
        self.entry = (
            frozenset(first.state_dict()) - self.statistics if makes_features else frozenset()
        )

    def start(self, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """Fresh weights of the client model and the server model; together the same wherever the
        cut is.
        """
        return self._split(self._net.start(rng))

    def client_forward(self, weights: Tensors, inputs: Tensors, *, seed: int | None) -> Features:
        """The features [rows, channels, ...] of a batch of `Arrays`."""
        return Features(values=self._run(self._client_model, weights, inputs["inputs"], seed))

    def server_forward(
        self,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        *,
        seed: int | None,
        adjustments: Tensor | None = None,
    ) -> Losses:
        """The cross-entropy of each row, in nats."""
        return self._losses(
            weights, self.middle_forward(weights, features, seed=seed), labels, seed, adjustments
        )

    def middle_forward(self, weights: Tensors, features: Features, *, seed: int | None) -> Features:
        """What enters the classifier, the last block."""
        return Features(values=self._run(self._middle, weights, features.values, seed))

    def ending_forward(
        self, weights: Tensors, features: Features, labels: Tensor, *, seed: int | None
    ) -> Losses:
        """The cross-entropy of each row after the classifier, in nats."""
        return self._losses(weights, features, labels, seed, None)

    def _losses(
        self,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        seed: int | None,
        adjustments: Tensor | None,
    ) -> Losses:
        logits = self._run(self._ending, weights, features.values, seed)
        labels = labels.to(logits.device)
        return Losses(
            total=nn.functional.cross_entropy(logits, labels, reduction="none"),
            counted=torch.ones_like(labels),
            adjusted=adjusted_losses(logits, labels, adjustments),
        )

    def _run(
        self, half: nn.Sequential, weights: Tensors, inputs: Tensor, seed: int | None
    ) -> Tensor:
        half.train(seed is not None)
        there = self._weights_of(half, weights)
        here = moved(there, self._net.device)
        with _seeded(seed, self._net.device):
            out = functional_call(half, here, (inputs.to(self._net.device),), strict=True)
        if seed is not None:
            for name in self.statistics & there.keys():
                if there[name] is not here[name]:  # a copy on a GPU was updated
                    there[name].copy_(here[name])
        return out

    def _split(self, weights: Tensors) -> tuple[Tensors, Tensors]:
        """The weights of the client model and those of the server model."""
        halves = (self._client_model, self._server_model)
        client_model, server_model = (self._weights_of(half, weights) for half in halves)
        return client_model, server_model

    def _weights_of(self, half: nn.Sequential, weights: Tensors) -> Tensors:
        """Those of the weights that a half or a part of it computes with."""
        return {name: weights[name] for name in self._names[half]}

    def join(self, client_model: Tensors, server_model: Tensors) -> NetModel:
        """Both halves as one model."""
        return NetModel(net=self._net.name, weights={**client_model, **server_model})

    def parts(self, model: NetModel) -> tuple[Tensors, Tensors]:
        """The client model and the server model of a model that was cut anywhere."""
        return self._split(model.weights)

    def flops(self, half: str, rows: int, tokens: int = 1) -> float:
        """Operations of convolutions and linear layers, forward and backward; the data itself gets
        no gradient.
        """
        return float(self._costs[half].flops * rows)

    def memory_bytes(self, half: str, rows: int, tokens: int = 1) -> int:
        """Weights and the outputs of all layers, each with its gradient, in fp32."""
        cost = self._costs[half]
        return 2 * SINGLE * (cost.weights + rows * cost.values)

    def launches(self, half: str) -> int:
        """Blocks of a half."""
        return len(self._client_model if half == "client" else self._server_model)

    def feature_shape(self, tokens: int = 1) -> Shape:
        """Shape of one row's features."""
        return tuple(self._costs["client"].output.shape[1:])


class _RowCost:
    """What one row costs in a half: operations, numbers that its layers give, and its weights;
    computed on no device.
    """

    def __init__(self, half: nn.Sequential, row: Tensor, *, first: bool) -> None:
        given: list[int] = [row.numel()]
        leaves = [module for module in half.modules() if not list(module.children())]
        hooks = [
            leaf.register_forward_hook(lambda _m, _i, out: given.append(out.numel()))
            for leaf in leaves
        ]
        with FlopCounterMode(display=False) as counter:
            out = half.eval()(row.detach().requires_grad_(not first))
            out.sum().backward()
        for hook in hooks:
            hook.remove()
        for parameter in half.parameters():
            parameter.grad = None
        self.flops, self.values, self.output = counter.get_total_flops(), sum(given), out.detach()
        self.weights = sum(tensor.numel() for tensor in half.state_dict().values())


def _sequence(blocks: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    made = nn.Sequential()
    for name, block in blocks:
        made.add_module(name, block)
    return made


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """A context in which random draws (dropout) follow from `seed` alone; torch's own generators do
    not change.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # not torch.manual_seed, which formats a traceback each time
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
