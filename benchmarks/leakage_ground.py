"""A server's view of one device: a tapped exchange, and what can be computed from it.

All data comes from packed messages of work that `core.device.serve` serves, as on any fleet. A
hostile order stays within what a device accepts: its shapes fit the model, and its settings have
the declared types.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedspine.core.aggregation import Mean
from fedspine.core.device import Call, name_of, serve
from fedspine.core.fleet import Cost, Idle, Profile, Reply
from fedspine.core.message import Tensors, pack, unpack
from fedspine.core.server_optimiser import Server
from fedspine.core.task import Examples, Task
from fedspine.core.tensors import single
from fedspine.lm.base import Base, Model
from fedspine.lm.lora import a_name
from fedspine.lm.pooling import mean_of_tokens
from fedspine.lm.structure import cut_adapter, full
from fedspine.methods.fedavg import AverageOrder, AverageResult
from fedspine.methods.fedlora import LoraResult
from fedspine.methods.linear_probe import ProbeOrder, ProbeResult
from fedspine.pruning.device import SpineResult
from fedspine.split.messages import Begin
from fedspine.split.wire import labels_unwired, unwired

ROWS = 64  # of a forward pass
DEVICE = "device"


@dataclass
class Wiretap:
    """A fleet of one device that holds `data`, whose orders and answers are all kept."""

    base: Base
    data: Examples
    seed: int
    noise: float = 0.0  # that the device adds, as a site's term says

    def __post_init__(self) -> None:
        self.devices = (
            Profile(id=DEVICE, site="here", examples=len(self.data), memory_bytes=1 << 40),
        )
        self.seen: list[tuple[Any, Any, Any]] = []  # (work, order, result)
        self.now = 0.0
        self.aggregation, self.server = Mean(), Server()
        self._memory: bytes | None = None
        self._pending: deque[Reply[Any]] = deque()

    def ask(self, work: Any, orders: Mapping[str, Any], *, within: float = inf) -> list[Reply[Any]]:
        return [self._exchange(work, orders[DEVICE])] if DEVICE in orders else []

    def send(self, work: Any, orders: Mapping[str, Any]) -> None:
        self._pending.extend(self.ask(work, orders))

    def next(self) -> Reply[Any]:
        if not self._pending:
            raise Idle("nothing is pending")
        return self._pending.popleft()

    def note(self, **values: Any) -> None:
        """Nothing is recorded."""

    def wait(self, seconds: float) -> None:
        """Time does not pass."""

    def foresee(self, device: str, **cost: float) -> None:
        """Nobody knows times here."""

    def only(self, ids: Iterable[str]) -> "Wiretap":
        return self

    def together(self, job: Callable[..., Any], groups: Mapping[str, Iterable[str]]) -> Any:
        return {name: job(name, self) for name in groups}

    def _exchange(self, work: Any, order: Any) -> Reply[Any]:
        call = Call(
            device=DEVICE,
            index=0,
            work=name_of(work),
            order=pack(order).payload,
            memory=self._memory,
            seed=(self.seed, len(self.seen)),
            noise=self.noise,
        )
        served = serve(call, self.base, self.data)
        self._memory = served.memory
        result = unpack(served.result)
        self.seen.append((work, unpack(call.order), result))
        cost = Cost(
            bytes_down=len(call.order),
            bytes_up=len(served.result),
            flops=served.flops,
            peak_memory_bytes=served.peak_memory_bytes,
            seconds=1.0,
        )
        return Reply(device=DEVICE, value=result, cost=cost, order=self.seen[-1][1])


# --- what an exchange tells ---


@dataclass(frozen=True)
class Update:
    """An order that sent weights, and the weights that came back; `rows` stand behind them."""

    base: Base
    order: Any
    result: Any

    @cached_property
    def sent(self) -> Tensors:
        """What was sent, cut to what the device kept where it pruned."""
        weights = single(weights_in(self.order))
        kept = getattr(self.result, "structure", None)
        if kept is None:
            return weights
        sites = self.base.layout.sites
        return weights | cut_adapter(weights, sites, kept, within=self.order.structure)

    @cached_property
    def back(self) -> Tensors:
        return single(weights_in(self.result))

    @cached_property
    def gradient(self) -> Tensors:
        """The direction of the steps, up to a factor: the signs of a gradient, or the gradient.

        This is the negative of what came back minus what was sent, without weight decay.
        """
        head = tuple(f"{layer.path}." for layer in self.base.head)
        kept = {inside: _kept(self.order, head=inside) for inside in (False, True)}
        return {
            name: kept[name.startswith(head)] * self.sent[name] - back
            for name, back in self.back.items()
        }

    def model(self, weights: Tensors) -> Model:
        """The model with the sent or the returned weights."""
        heads = tuple(f"{layer.path}." for layer in self.base.head)
        return Model(
            structure=getattr(self.result, "structure", None) or full(self.base.layout),
            adapter={n: t for n, t in weights.items() if not n.startswith(heads)},
            head={n: t for n, t in weights.items() if n.startswith(heads)}
            or self.base.initial_head(np.random.default_rng(0)),
            scale=_scale(self.order),
        )

    @property
    def bias(self) -> Tensor:
        """The gradient of the head's bias, fp32 [classes], up to a factor."""
        return self.gradient[f"{self.base.head[-1].path}.bias"]

    @property
    def head(self) -> Tensor:
        """The gradient of the head's weight, fp32 [classes, width], up to a factor."""
        return self.gradient[f"{self.base.head[-1].path}.weight"]

    @property
    def flat(self) -> Tensor:
        """All of the gradient, fp32 [numbers], up to a factor."""
        return torch.cat([tensor.flatten() for _, tensor in sorted(self.gradient.items())])

    @property
    def rank(self) -> int:
        """The largest rank of the adapter that was sent."""
        return max(len(t) for name, t in self.sent.items() if name.endswith(".lora_A"))

    @property
    def first_factors(self) -> Tensor:
        """The gradients of all A that the embeddings enter, one under the other [any, width]."""
        names = [a_name(path) for path in entered_by_embeddings(self.base)]
        found = [self.gradient[name] for name in names if name in self.gradient]
        return torch.cat(found) if found else torch.zeros(0, self.base.layout.width)


def updates(tap: Wiretap) -> list[Update]:
    """The weights that went and came."""
    kinds = LoraResult | SpineResult | ProbeResult | AverageResult
    return [Update(tap.base, order, got) for _, order, got in tap.seen if isinstance(got, kinds)]


def first_features(tap: Wiretap) -> tuple[Begin, list[Tensor], np.ndarray]:
    """The order that began a split round, and what came first: the features of each row's tokens,
    [tokens, width] each, and the labels, int64 [rows].
    """
    _, order, got = next(seen for seen in tap.seen if isinstance(seen[1], Begin))
    came = unwired(got.features)
    rows = [row[inside].float() for row, inside in zip(came.values, came.mask, strict=True)]
    return order, rows, labels_unwired(got.labels).numpy()


def entered_by_embeddings(base: Base) -> list[str]:
    """The linear layers that read what the embeddings make of a text."""
    parts = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")
    first = (site.path for site in base.layout.sites if site.layer == 0)
    return [path for path in first if path.rsplit(".", 1)[-1] in parts]


def weights_in(part: Any) -> Tensors:
    match part:
        case AverageOrder() | AverageResult():
            return part.weights
        case ProbeOrder() | ProbeResult():
            return part.head
    return {**part.adapter, **part.head}


def _kept(order: Any, *, head: bool) -> float:
    """The share of the head or the adapter that weight decay leaves."""
    if isinstance(order, AverageOrder):
        how = order.training.optimising
        return float((1 - how.learning_rate * how.weight_decay) ** order.training.steps)
    how = order.tuning
    rate = (how.head_learning_rate or how.learning_rate) if head else how.learning_rate
    return float((1 - rate * how.weight_decay) ** how.steps)


def _scale(order: Any) -> float:
    if isinstance(order, AverageOrder):
        return order.training.cutting.scale
    return getattr(order, "scale", 1.0)


# --- what the server can compute itself, having the base ---


def row_losses(base: Base, model: Model, data: Examples) -> np.ndarray:
    """Cross-entropy of each row under a model, nats, float64 [rows]."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(data), ROWS):
            module = base.fit(model)
            inputs = data.batch(np.arange(start, min(start + ROWS, len(data))))
            labels = inputs.pop("labels")
            logits = module(**inputs).logits.float()
            found.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(found).double().numpy()


def readout(base: Base, model: Model, data: Examples) -> Tensor:
    """The mean over tokens of what enters the head of a model, fp32 [rows, width]."""
    found: list[Tensor] = []
    entered: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(data), ROWS):
            module = base.fit(model)
            layer = base.skeleton.get_submodule(base.head[-1].path)
            hook = layer.register_forward_pre_hook(lambda _, came: entered.append(came[0]))
            inputs = data.batch(np.arange(start, min(start + ROWS, len(data))))
            inputs.pop("labels")
            module(**inputs)
            hook.remove()
            found.append(mean_of_tokens(entered.pop().float(), inputs["attention_mask"]))
    return torch.cat(found)


def client_features(base: Base, order: Begin, data: Examples) -> list[Tensor]:
    """The features of each row's tokens in the client model that `order` sent, [tokens, width]
    each.
    """
    split_model, found = order.cutting.of(base), []
    with torch.no_grad():
        for row in range(len(data)):
            got = split_model.client_forward(single(order.weights), data.batch([row]), seed=None)
            found.append(got.values[0, : data.lengths[row]].float())
    return found


def warmed(method: Any, task: Task, public: Examples, seed: int) -> Any:
    """The state after one round on rows that are not the device's."""
    state = method.start(task, np.random.default_rng(seed))
    return method.round(state, Wiretap(task.base, public, seed))


def distinct_tokens(data: Examples, known: Sequence[int]) -> set[int]:
    """The token ids of these rows but for those in every text."""
    return set(np.unique(data.ids).tolist()) - set(known)
