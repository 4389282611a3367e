"""Checks the shapes of a site's result against its order, so that an untrusted peer cannot crash a
run.
"""

from dataclasses import fields
from typing import Any

import torch

from fedspine.core.tensors import single
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, cut_adapter

_UNUSABLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    RuntimeError,
)  # raised by cutting with a wrong structure


def mismatch(result: Any, order: Any, layout: PrunableLayout | None) -> str | None:
    """A line that says what is wrong with the shapes of a result; None if nothing is.

    Where order and result share a field of named tensors, their names, shapes and types must be
    equal; an adapter that comes with a structure must be the order's, cut to it. The method checks
    all other fields.
    """
    known = {field.name for field in fields(order)}
    for field in fields(result):
        came, sent = (
            getattr(result, field.name),
            getattr(order, field.name) if field.name in known else None,
        )
        if not (_tensors(came) and _tensors(sent)):
            continue
        if field.name == "adapter" and layout is not None:
            sent = _cut_to_result(sent, order, result, layout)
        if sent is None:
            return "its structure does not fit the order"
        if wrong := _first_difference(came, sent):
            return f"{field.name} {wrong}"
    return None


def _cut_to_result(adapter: Any, order: Any, result: Any, layout: PrunableLayout) -> Any:
    """The order's adapter, cut to the result's structure; None if this model cannot have that
    structure.
    """
    kept, within = (vars(value).get("structure") for value in (result, order))
    if not (isinstance(kept, Structure) and isinstance(within, Structure)):
        return adapter
    try:
        cut = cut_adapter(single(adapter), layout.sites, kept, within=within)
    except _UNUSABLE:
        return None
    return {name: tensor.to(adapter[name].dtype) for name, tensor in cut.items()}


def _first_difference(came: Any, sent: Any) -> str | None:
    if came.keys() != sent.keys():
        return f"has {len(came)} tensors of other names; {len(sent)} were expected"
    for name, tensor in came.items():
        if tensor.shape != sent[name].shape or tensor.dtype != sent[name].dtype:
            return (
                f"has a tensor of {tuple(tensor.shape)} where "
                f"{tuple(sent[name].shape)} was expected"
            )
    return None


def _tensors(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(item, torch.Tensor) for item in value.values())
    )
