"""The weights that an order brings to a site: those of its model only, and no larger."""

from dataclasses import fields, is_dataclass
from typing import Any

from fedspine.core.message import Tensors
from fedspine.core.reads import reads_of
from fedspine.core.tensors import is_tensors
from fedspine.flare.run_terms import Refused
from fedspine.lm.base import Base
from fedspine.lm.lora import a_name, b_name

WIDEST = 4096  # side of weights that are not the model's own, such as a decoder's


def check_weights(site: str, order: Any, base: Base, rank: int) -> None:
    """Raise Refused for weights whose name or size is none of this model's, wherever in the order,
    and for adapters beyond this rank.

    Weights of other names have to be declared by the order's messages.
    """
    largest = _largest(base, rank)
    extra = {name for reads in reads_of(order) for name in reads.names}
    for tensors in _weights(order):
        for name, tensor in tensors.items():
            most = largest.get(name) or ((WIDEST,) * tensor.dim() if name in extra else ())
            shape = tuple(tensor.shape)
            if len(shape) != len(most) or any(map(int.__gt__, shape, most)):
                came = f"{name[:80]!r} of {shape}, where {most or 'nothing'} was expected at most"
                raise Refused(f"site {site} does not serve an order with {came}", "weights")


def _weights(part: Any) -> list[Tensors]:
    """The named tensors in a part of an order, at every depth."""
    if is_tensors(part):
        return [part]
    if isinstance(part, dict | tuple):
        inside = list(part.values() if isinstance(part, dict) else part)
    else:
        inside = [getattr(part, f.name) for f in fields(part)] if is_dataclass(part) else []
    return [found for each in inside for found in _weights(each)]


def _largest(base: Base, rank: int) -> dict[str, tuple[int, ...]]:
    """The largest shape of each weight that methods train, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at in base.layout.sites:
        shapes |= {a_name(at.path): (rank, at.columns), b_name(at.path): (at.rows, rank)}
    for layer in base.head:
        shapes[f"{layer.path}.weight"] = tuple(layer.weight.shape)
        if layer.bias is not None:
            shapes[f"{layer.path}.bias"] = tuple(layer.bias.shape)
    return shapes
