"""Orders that a server writes to learn as much as possible: within what a device computes, or also
within the terms of a site.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from leakage_ground import DEVICE, Update, Wiretap, entered_by_embeddings, updates, weights_in

from fedspine.core.message import Tensors
from fedspine.core.task import Examples, Task
from fedspine.core.tensors import single
from fedspine.flare.run_terms import Refused, RunTerms
from fedspine.flare.site_terms import AllowSection, check_order, check_training, check_used
from fedspine.flare.site_weights import check_magnitudes, check_weights
from fedspine.lm.base import Base
from fedspine.lm.importance_sources import AtRandom
from fedspine.lm.lora import a_name, b_name, is_a
from fedspine.methods.fedavg import AverageOrder
from fedspine.methods.fedlora import LoraOrder
from fedspine.methods.linear_probe import ProbeOrder
from fedspine.pruning.device import SpineOrder

# AdamW divides a gradient by its size plus 1e-8. One that was clipped far below that comes through
# in proportion, so the order decides whether a step shows signs or the gradient itself.
QUIET, LOUD = 1e-12, 1e7  # the clip, and a rate that brings the step back to what fp16 holds
DOUBT = 10.0  # nats that the steered head takes from every class but the favoured one
# so small that all steps are at the same weights, and above what fp16 rounds away beside a small A
STILL = 1e-5


def asked_again(
    tap: Wiretap,
    update: Update,
    order: Any,
    data: Examples | None = None,
    *,
    noise: float = 0.0,
) -> Update:
    """What the same work answers to another order, on the same rows or other `data`, with a site's
    `noise`.
    """
    return asked_often(tap, update, [order], data, noise=noise)[0]


def asked_often(
    tap: Wiretap,
    update: Update,
    orders: Sequence[Any],
    data: Examples | None = None,
    *,
    noise: float = 0.0,
) -> list[Update]:
    """The answers to orders one after another, whose noise grows as that of a site does."""
    work = next(work for work, _, got in tap.seen if got is update.result)
    other = Wiretap(tap.base, tap.data if data is None else data, tap.seed, noise)
    for order in orders:
        other.ask(work, {DEVICE: order})
    return updates(other)


def for_tokens(base: Base, order: Any, rank: int | None = None) -> Any:
    """An order whose answer holds the gradient of the weights that the embeddings enter, as far as
    `rank` goes; None: all of it.

    Factors with A zero change nothing, whatever B is. The gradient of A is then that of the weight
    times B, which is the unit matrix, or orthogonal and drawn.
    """
    factors: Tensors = {}
    for number, path in enumerate(entered_by_embeddings(base)):
        rows, columns = base.weights[path][0].shape
        drawn = torch.from_numpy(np.random.default_rng(number).normal(size=(rows, rank or rows)))
        b = torch.eye(rows) if rank is None else torch.linalg.qr(drawn)[0].float()
        factors[a_name(path)] = torch.zeros(b.shape[1], columns)
        factors[b_name(path)] = b
    heads = tuple(f"{layer.path}." for layer in base.head)
    head = {n: t for n, t in single(weights_in(order)).items() if n.startswith(heads)}
    return _with_weights(_unmasked(order), factors, head)


def for_one(order: Any) -> Any:
    """The same order with one step on one row, which a server can compute for a suspected row."""
    return of_steps(order, 1, 1)


def of_steps(order: Any, steps: int, batch: int) -> Any:
    """The same order with this many steps, on this many rows each."""
    if isinstance(order, AverageOrder):
        return replace(order, training=replace(order.training, steps=steps, batch=batch))
    return replace(order, tuning=replace(order.tuning, steps=steps, batch=batch))


def steps_of(order: Any) -> tuple[int, int]:
    """An order's steps, and the rows of each."""
    how = order.training if isinstance(order, AverageOrder) else order.tuning
    return how.steps, how.batch


def for_labels(base: Base, order: Any, favoured: int = 0) -> Any:
    """An order whose answer holds the counts of the labels and the mean features of each class.

    The head predicts `favoured` with certainty. The gradient of another class's row is then the sum
    of the features of that class, and that of its bias the count.
    """
    name = base.head[-1].path
    bias = torch.full((base.head[-1].weight.shape[0],), -DOUBT)
    bias[favoured] = 0.0
    head = {f"{name}.weight": torch.zeros_like(base.head[-1].weight), f"{name}.bias": bias}
    return _with_weights(_unmasked(order), {}, head)


# --- the same within a site's terms ---


def refusal(order: Any, method: str, task: Task, allow: AllowSection, rows: int) -> str | None:
    """What a site of these terms, with so many rows, replies to an order instead of an answer;
    None: it answers.
    """
    terms = RunTerms(
        method=method,
        kind=task.kind,
        model="minilm",
        model_sha256="",
        layers=None,
        precision="fp32",
        pooling="mean",
        max_tokens=task.max_tokens,
        label_names=task.label_names,
    )
    try:
        check_order("site", allow, terms, order)
        check_weights("site", allow, order, task.base)
        check_training("site", allow, order)
        check_magnitudes("site", allow, order, task.base)
        check_used("site", allow, rows)
    except Refused as error:
        return error.detail
    return None


def tokens_within(
    base: Base, order: Any, allow: AllowSection, steps: int, batch: int, draw: int = 0
) -> Any:
    """`for_tokens` as far as a site's terms go: the largest rank, the smallest A and the lowest
    clip, on B factors that show as many directions of the gradient as there are, others at each
    `draw`.
    """
    rank, least = min(allow.largest_rank, base.layout.width), allow.norms[0]
    factors: Tensors = {}
    entered = entered_by_embeddings(base)
    for number, site in enumerate(base.layout.sites):
        rng = np.random.default_rng([draw, number] if draw else number)
        a = torch.from_numpy(rng.normal(size=(rank, site.columns))).float()
        b = torch.zeros(site.rows, rank)
        if site.path in entered:
            b = torch.linalg.qr(torch.from_numpy(rng.normal(size=(site.rows, rank))))[0].float()
        factors[a_name(site.path)] = 2 * least * a / a.norm(dim=1, keepdim=True)
        factors[b_name(site.path)] = b
    heads = tuple(f"{layer.path}." for layer in base.head)
    head = {n: t for n, t in single(weights_in(order)).items() if n.startswith(heads)}
    return _with_weights(_still(order, allow, rank, steps, batch), factors, head)


def labels_within(base: Base, order: Any, allow: AllowSection, steps: int, batch: int) -> Any:
    """`for_labels` as far as a site's terms go: a head as sure of the first class as it may be."""
    weights, name = single(weights_in(order)), base.head[-1].path
    bias = torch.full((base.head[-1].weight.shape[0],), -allow.largest_bias)
    bias[0] = 0.0
    small = weights[f"{name}.weight"]
    head = {f"{name}.weight": 2 * allow.norms[0] * small / small.norm(), f"{name}.bias": bias}
    adapter = {n: t for n, t in weights.items() if not n.startswith(f"{name}.")}
    rank = max((len(t) for n, t in adapter.items() if is_a(n)), default=1)
    return _with_weights(_still(order, allow, rank, steps, batch), adapter, head)


def _still(order: Any, allow: AllowSection, rank: int, steps: int, batch: int) -> Any:
    """The order with so many steps, all of them at about the same weights."""
    order = of_steps(order, steps, batch)
    if isinstance(order, AverageOrder):
        cutting = replace(order.training.cutting, rank=rank)
        how = replace(order.training.optimising, kind="adamw", learning_rate=STILL)
        how = replace(how, weight_decay=0.0, clip=allow.lowest_clip)
        training = replace(order.training, cutting=cutting, optimising=how)
        return replace(order, training=training)
    how = replace(order.tuning, learning_rate=STILL, head_learning_rate=STILL)
    return replace(order, tuning=replace(how, weight_decay=0.0, clip=allow.lowest_clip))


def _unmasked(order: Any) -> Any:
    """The order, with settings under which a step is proportional to the gradient."""
    if isinstance(order, AverageOrder):
        how = replace(order.training.optimising, kind="sgd", learning_rate=1.0, weight_decay=0.0)
        training = replace(order.training, optimising=replace(how, clip=0.0))
        return replace(order, training=training, precision="fp32")
    how = replace(order.tuning, learning_rate=LOUD, head_learning_rate=LOUD)
    return replace(order, tuning=replace(how, weight_decay=0.0, clip=QUIET))


def _with_weights(order: Any, adapter: Tensors, head: Tensors) -> Any:
    wired = {n: t.half() for n, t in adapter.items()}, {n: t.half() for n, t in head.items()}
    match order:
        case AverageOrder():
            return replace(order, weights={**adapter, **head})
        case ProbeOrder():
            return replace(order, head=wired[1])
        case LoraOrder():
            return replace(order, adapter=wired[0], head=wired[1])
        case SpineOrder():
            # factors of zeros wherever nothing is sought, since pruning asks for all of them
            filled = {**_nothing(order.adapter), **wired[0]}
            return replace(order, adapter=filled, head=wired[1], scoring=AtRandom())
    raise TypeError(f"{type(order).__name__} sends no weights to train")


def _nothing(adapter: Tensors) -> Tensors:
    """Factors of rank 1 in place of each, without effect or gradient."""
    return {
        name: torch.zeros_like(tensor[:1] if name.endswith(".lora_A") else tensor[:, :1])
        for name, tensor in adapter.items()
    }
