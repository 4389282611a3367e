"""Replies of a bad device: attacks on every method that merges what devices trained."""

from dataclasses import replace

import torch

from fedspine.core.tensors import single
from fedspine.lm.lora import is_a
from fedspine.methods.flora import FloraOrder
from fedspine.methods.pyramidfl import PyramidResult
from fedspine.pruning.device import SpineResult, contribution

MOST = torch.finfo(torch.float16).max


def on_changes(reply, layout, change):
    """The reply with `change` applied to its device's change, by name and field, in fp16."""
    result, order = reply.value, reply.order
    if isinstance(result, PyramidResult):
        return replace(reply, value=replace(result, update=wired(change(single(result.update)))))
    changed = {}
    for field in ("adapter", "head", "weights"):
        back = getattr(result, field, None)
        if back is None:
            continue
        back = single(back)
        if field == "adapter" and isinstance(order, FloraOrder):  # a fresh one, whose B is zero
            sent = {n: each if is_a(n) else torch.zeros_like(each) for n, each in back.items()}
        else:
            sent = single(getattr(order, field))
        if field == "adapter" and isinstance(result, SpineResult):
            sent = contribution(layout, reply).sent
        sent = {name: sent[name][tuple(map(slice, tensor.shape))] for name, tensor in back.items()}
        now = change({name: back[name] - sent[name] for name in back})
        changed[field] = wired({name: sent[name] + now[name] for name in back})
    return replace(reply, value=replace(result, **changed))


def wired(tensors):
    return {name: tensor.clamp(-MOST, MOST).half() for name, tensor in tensors.items()}


def flipped(times):
    """The change, negated and scaled."""
    return lambda change: {name: -times * tensor for name, tensor in change.items()}
