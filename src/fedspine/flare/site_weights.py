"""Checks of the weights in an order: they must belong to the site's model, be no larger, and have
magnitudes that training gives.
"""

from dataclasses import fields, is_dataclass
from math import sqrt
from typing import Any

import torch

from fedspine.core.message import Tensors
from fedspine.core.reads import reads_of
from fedspine.core.tensors import is_tensors
from fedspine.flare.run_terms import Refused
from fedspine.flare.site_terms import AllowSection, require
from fedspine.lm.base import Base
from fedspine.lm.lora import a_name, b_name, is_a, is_b

FEATURES = 4.0  # root mean square of what enters a head, at most
WIDEST = 4096  # side of weights that are not the model's own, such as a decoder's


def check_weights(site: str, allow: AllowSection, order: Any, base: Base) -> None:
    """Raise Refused for weights, anywhere in the order, whose name or size does not belong to this
    model, and for adapters, or what is merged, beyond the site's rank.

    Weights with other names must be declared by the order's messages.
    """
    declared = list(reads_of(order))
    merges = any(reads.merged is not None for reads in declared)  # and brings no other adapter
    largest = _largest(base, allow.largest_merged_rank if merges else allow.largest_rank)
    extra = {name for reads in declared for name in reads.names}
    for tensors in _weights(order):
        for name, tensor in tensors.items():
            most = largest.get(name) or ((WIDEST,) * tensor.dim() if name in extra else ())
            shape = tuple(tensor.shape)
            if len(shape) != len(most) or any(map(int.__gt__, shape, most)):
                line = f"expected at most {most or 'nothing'} as {name[:80]!r}, got {shape}"
                raise Refused(f"site {site} refuses an order: {line}", "weights")


def check_magnitudes(site: str, allow: AllowSection, order: Any, base: Base) -> None:
    """Raise Refused for weights, anywhere in the order, of a magnitude beyond the site's terms; the
    weights must be finite.
    """
    for tensors in _weights(order):
        _check_factors(site, allow, tensors)
        _check_head(site, allow, tensors, base)


def _check_factors(site: str, allow: AllowSection, tensors: Tensors) -> None:
    """Refuse directions of A or B with a norm outside `allow.norms`.

    The gradient of a direction of A is proportional to the same direction of B, and vice versa, and
    the joint gradient is clipped. If one direction is far smaller than the others, AdamW's step
    reveals its gradient exactly.
    """
    least, most = allow.norms
    for name, tensor in tensors.items():
        if not (is_a(name) or is_b(name)) or not tensor.numel():
            continue
        lengths = torch.linalg.vector_norm(tensor.float(), dim=1 if is_a(name) else 0)
        if is_b(name):  # which starts as zeros
            lengths = torch.where(lengths == 0, least, lengths.double())
        what = f"for the norm of each direction of {'A' if is_a(name) else 'B'}"
        for extreme in (lengths.min(), lengths.max()):
            require(site, "norms", float(extreme), what, least=least, most=most)


def _check_head(site: str, allow: AllowSection, tensors: Tensors, base: Base) -> None:
    """Refuse a head that is almost zero, very large, or certain of a class.

    Features have a norm of about sqrt(width), for some models a few times that. If the weights
    cannot outweigh the bias on such features, the head prefers a class whatever the text.
    """
    least, most = allow.norms
    for layer in base.head:
        weight = tensors.get(f"{layer.path}.weight")
        if weight is None:
            continue
        lengths = torch.linalg.vector_norm(weight.float(), dim=1)
        whole = float(torch.linalg.vector_norm(lengths))
        require(site, "norms", whole, "for the norm of the head", least=least)
        what = "for the norm of a class in the head"
        require(site, "norms", float(lengths.max()), what, most=most)
        if (bias := tensors.get(f"{layer.path}.bias")) is not None and layer is base.head[-1]:
            apart = torch.linalg.vector_norm(weight.float() - weight.float().mean(0), dim=1)
            moved = 2 * FEATURES * sqrt(weight.shape[1]) * float(apart.max())
            sure = float(bias.float().max() - bias.float().min()) - moved
            what = "nats of the head's bias beyond what features make up for"
            require(site, "largest_bias", max(sure, 0.0), what, most=allow.largest_bias)


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
    """The largest allowed shape of each weight that methods train, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at in base.layout.sites:
        shapes |= {a_name(at.path): (rank, at.columns), b_name(at.path): (at.rows, rank)}
    for layer in base.head:
        shapes |= {name: tuple(tensor.shape) for name, tensor in layer.tensors.items()}
    return shapes
