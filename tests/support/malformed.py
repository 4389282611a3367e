"""Malformed messages: every field at every depth, changed in many ways.

Also a recording of a round's messages, which can be replayed to a method with one of them changed,
without training.
"""

import copy
import dataclasses
import math
from collections import defaultdict

import numpy as np
import torch

from fedspine.core.fleet import Idle, Reply

NUMBERS = (
    *(math.nan, math.inf, -math.inf, 1e308, -1e308, 1e30, 0.5, -1.0, 0.0),
    *(0, 1, -1, -7, 99, 10**9, -(10**6), 2**63 - 1, 2**63, 10**400, 10**5000),
)
OTHERS = (None, "", "x", True, (), {}, (1.0,), {"x": 1.0})


def mutants(value):
    """Values that differ from a message, tensor or number somewhere, one after another."""
    match value:
        case torch.Tensor():
            yield from _tensors(value)
        case np.ndarray():
            for other in _tensors(torch.from_numpy(value.copy())):
                yield other.numpy()
            yield from (value.tolist(), value.astype(np.int64), np.array("x"))
        case dict():
            yield from _dicts(value)
        case tuple():
            yield from ((), value[:-1], (*value, None))
            for i, item in enumerate(value):
                yield from ((*value[:i], each, *value[i + 1 :]) for each in mutants(item))
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                for each in mutants(getattr(value, field.name)):
                    yield changed(value, field.name, each)
        case bool() | int() | float() | None:
            yield from NUMBERS
    yield from OTHERS
    yield Stray()


@dataclasses.dataclass(frozen=True)
class Stray:
    """A message that nothing expects."""

    loss: float = 0.0


def changed(value, name, field):
    """The message with another field, unchecked, as it could be decoded."""
    other = copy.copy(value)
    object.__setattr__(other, name, field)
    return other


def _dicts(value):
    yield {}
    names = list(value)
    for name in (*names[:1], *names[-1:]):
        yield {key: item for key, item in value.items() if key != name}
        yield {f"{key}x" if key == name else key: item for key, item in value.items()}
        for each in mutants(value[name]):
            yield value | {name: each}
    if names:
        yield value | {"other": value[names[0]]}
        first = value[names[0]]
        if isinstance(first, torch.Tensor):
            yield dict.fromkeys(names, first)
            yield {key: item.flatten()[:0] for key, item in value.items()}
            yield {key: item[..., :1] for key, item in value.items()}


def _tensors(value):
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool):
        if value.dtype != dtype:
            yield value.to(dtype)
    yield torch.zeros_like(value)
    yield torch.ones_like(value)
    yield value[None]
    yield value.flatten()
    yield value.flatten()[:0]
    yield torch.zeros((), dtype=value.dtype)
    yield torch.cat([value, value]) if value.dim() else value.repeat(2)
    if value.dim() and len(value):
        yield value[:0]
        yield value[:1]
        yield value[:-1]
        yield value[..., :-1]
    if value.dim() > 1:
        yield value.transpose(0, 1).contiguous()
        yield value[:, :0]
        yield torch.cat([value, value], 1)
    if value.numel() and value.dtype != torch.bool:
        extremes = (-1, -7, 99, 127, 120)
        if value.is_floating_point():
            extremes = (math.nan, math.inf, -math.inf, -1.0, 1e-30, 65504.0, 3e38)
        for extreme in extremes:
            one = value.clone()
            one.view(-1)[-1] = torch.tensor(extreme, dtype=torch.float64).to(value.dtype)
            yield one
            yield torch.full(value.shape, extreme, dtype=torch.float64).to(value.dtype)
    if value.dtype == torch.bool:
        yield ~value


class Recorded:
    """A fleet that records the exchanges with another one, by work and device, in order."""

    def __init__(self, fleet):
        self._fleet = fleet
        self.base, self.devices, self.unusable = fleet.base, fleet.devices, {}
        self.aggregation, self.server = fleet.aggregation, fleet.server
        self.exchanges = defaultdict(list)  # (work, order, reply) by device

    @property
    def now(self):
        return self._fleet.now

    def ask(self, work, orders, *, within=math.inf):
        replies = self._fleet.ask(work, orders, within=within)
        for reply in replies:
            self.exchanges[reply.device].append((work, orders[reply.device], reply))
        return replies

    def note(self, **values):
        pass

    def foresee(self, device, **cost):
        return self._fleet.foresee(device, **cost)


class Replayed:
    """A fleet whose devices reply as recorded, whatever the order; `change` maps (device, number of
    the exchange) to another value, or to None for no reply.
    """

    def __init__(self, recorded, change):
        self.base, self.devices, self.unusable = recorded.base, recorded.devices, {}
        self.aggregation, self.server = recorded.aggregation, recorded.server
        self._left = {id: list(each) for id, each in recorded.exchanges.items()}
        self._taken, self._change, self._recorded = defaultdict(int), change, recorded
        self.now, self.left_out = 0.0, {}  # why, by device

    def ask(self, work, orders, *, within=math.inf):
        replies = []
        for id in orders:
            number = self._taken[id]
            left = self._left[id]
            while left and left[0][0] is not work:  # the round continues without some of the others
                left.pop(0)
                number = self._taken[id] = number + 1
            if not left:
                continue
            _, _, reply = left.pop(0)
            self._taken[id] += 1
            value = self._change.get((id, number), reply.value)
            if value is not None:
                replies.append(Reply(id, value, reply.cost, orders[id]))
        return replies

    def send(self, work, orders):
        raise NotImplementedError("no toy settings send without waiting")

    def next(self):
        raise Idle("nothing was sent")

    def note(self, device=None, left_out=None, **values):
        if left_out is not None:
            self.left_out[device] = left_out

    def foresee(self, device, **cost):
        return self._recorded.foresee(device, **cost)
