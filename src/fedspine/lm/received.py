"""The model that an order brings, and what adapters, heads and losses must be that came in a
message, by the model's own shapes.
"""

from typing import Any

import torch

from fedspine.core.checks import MOST_FLOAT, Asked, Unusable, need, short, tensors_of, within
from fedspine.core.message import Tensors
from fedspine.core.tensors import single
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name, is_a
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, full

Specified = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def model_of(order: Any, layout: PrunableLayout) -> Model:
    """The unpruned model with the `adapter`, `head` and `scale` of an order, fp32."""
    return Model(
        structure=full(layout),
        adapter=single(order.adapter),
        head=single(order.head),
        scale=order.scale,
    )


def check_adapter(adapter: Tensors, layout: PrunableLayout, rank: int | None = None) -> None:
    """Raise Unusable unless an order's adapter is the model's, of this rank in all its layers
    (default: of any in each); it may lack some layers, or all.
    """
    dtype = float_of(adapter)
    specified: Specified = {}
    for site in layout.sites:
        a, b = a_name(site.path), b_name(site.path)
        if a in adapter:
            own = rank_in({a: adapter[a]}) if rank is None else rank
            check_rank_of(own, layout)
            specified[a] = (dtype, (own, site.columns))
            specified[b] = (dtype, (site.rows, own))
    tensors_of("adapter", adapter, specified)


def check_b(factors: Tensors, layout: PrunableLayout) -> None:
    """Raise Unusable unless an order's B factors are of one rank, of some of the model's layers."""
    rank = next((factor.shape[1] for factor in factors.values() if factor.dim() == 2), 0)
    if factors:
        check_rank_of(rank, layout)
    dtype = float_of(factors)
    rows = {b_name(site.path): site.rows for site in layout.sites}
    specified = {n: (dtype, (rows[n], rank)) for n in factors if n in rows}
    tensors_of("adapter", factors, specified)


def float_of(weights: Tensors) -> torch.dtype:
    """The type that all weights of an order must have: that of the first one, fp32 or else fp16."""
    first = next(iter(weights.values()), None)
    return torch.float32 if first is not None and first.dtype == torch.float32 else torch.float16


def check_rank_of(rank: int, layout: PrunableLayout) -> None:
    """Raise Unusable for a rank beyond the model's widest side, where it can only cost memory."""
    most = max(max(site.rows, site.columns) for site in layout.sites)
    need(1 <= rank <= most, f"rank is {rank}, but 1 to {most} was expected")


def check_head(head: Tensors, asked: Asked) -> None:
    """Raise Unusable unless this is the model's task head, a result's in fp16, an order's in fp32
    or fp16.
    """
    ordered = asked.order is None
    tensors_of("head", head, head_shapes(asked, float_of(head) if ordered else torch.float16))


def check_loss(loss: float | int | None, name: str = "loss") -> None:
    """Raise Unusable for a mean cross-entropy, in nats, that cannot be; None is a private one."""
    if loss is not None:
        within(name, loss, 0, MOST_FLOAT)


def check_settings(**at_least_0: float | int | None) -> None:
    """Raise Unusable for a setting below 0; None stands for one that is not given."""
    for name, value in at_least_0.items():
        need(value is None or value >= 0, f"{name} is {short(value)}, but it cannot be negative")


def adapter_shapes(
    layout: PrunableLayout,
    rank: int,
    structure: Structure | None = None,
    dtype: torch.dtype = torch.float16,
    lowest: int = 0,
) -> Specified:
    """Types and shapes of the factors of `rank` for the sub-model `structure` (default: the full
    model), by name, of the blocks from `lowest` on.
    """
    kept = None
    if structure is not None:
        kept = {
            "heads": structure.heads.sum(1).tolist(),
            "channels": structure.channels.sum(1).tolist(),
        }
    shapes: Specified = {}
    for site in layout.sites:
        if site.layer < lowest:
            continue
        rows, columns = site.rows, site.columns
        if kept is not None and site.row_units:
            rows = kept[site.row_units][site.layer] * site.per_unit
        if kept is not None and site.column_units:
            columns = kept[site.column_units][site.layer] * site.per_unit
        shapes[a_name(site.path)] = (dtype, (rank, columns))
        shapes[b_name(site.path)] = (dtype, (rows, rank))
    return shapes


def head_shapes(asked: Asked, dtype: torch.dtype = torch.float16) -> Specified:
    """Types and shapes of the task head's weights, by name; a language model has none."""
    return {
        name: (dtype, tuple(tensor.shape))
        for layer in asked.base.head
        for name, tensor in layer.tensors.items()
    }


def rank_in(adapter: Tensors) -> int:
    """The rank of the first factor A of a non-empty adapter that came; raises Unusable for none."""
    for name, tensor in adapter.items():
        if is_a(name) and tensor.dim() == 2:
            return tensor.shape[0]
    raise Unusable("adapter has no factor A")
