"""What training costs a device, charged to it when it is done."""

from collections.abc import Sequence
from typing import Any

from fedspine.lm.base import Model
from fedspine.lm.cost import (
    Extent,
    expanding_flops,
    frozen_adapter,
    quantising_flops,
    taught_states_bytes,
    training_flops,
    training_memory_bytes,
)
from fedspine.lm.lora import a_name, adapter_rank
from fedspine.lm.per_row import RowGradients
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.scoring_cost import tracking_cost
from fedspine.lm.stored import bits_each


def account(request: Any, widths: list[int], first: int) -> None:
    """Charge the device of a `tune.Request` for training on batches padded to these widths, with
    nothing kept for a backward pass below block `first`.
    """
    device, model, batch = request.device, request.model, request.tuning.batch
    layout, rank = device.base.layout, rank_of(model)
    ranks, first = ranks_by_block(layout, model), max(first, request.lowest)
    extent = Extent(
        tokens=batch * sum(widths), squared_tokens=batch * sum(width**2 for width in widths)
    )
    flops_each, frozen_bytes = (
        (0, 0)
        if request.blocks is None
        else frozen_adapter(layout, model.structure, ranks, request.blocks)
    )
    how, bits = request.quantised, 16.0
    taught_bytes = 0
    if request.taught is not None and not device.base.head:
        held = min(extent.tokens, int(device.data.lengths.sum()))  # each row once
        taught_bytes = taught_states_bytes(layout, held)
    quantised = 0 if how is None else len(how.blocks)
    if how is not None:
        bits = bits_each(how.bits)
    scored = widths[:: request.scoring.every] if request.scoring else []
    scoring = tracking_cost(
        layout,
        model.structure,
        request.scoring,
        rank=rank,
        tokens=batch * sum(scored),
        largest=batch * max(scored, default=0),
        updates=len(scored),
    )
    device.spend(
        flops=training_flops(layout, model.structure, ranks, extent, first)
        + extent.tokens * flops_each
        + quantising_flops(layout, model.structure, extent, quantised)
        + scoring.flops
        + len(widths) * (expanding_flops(layout, model.structure, first) + request.step_flops),
        launches=len(widths) * layout.layers,
        samples=len(widths) * batch,
        memory_bytes=training_memory_bytes(
            layout,
            model.structure,
            rank=ranks,
            embeddings=device.base.embeddings,
            batch=batch,
            tokens=max(widths),
            first=first,
            scoring=scoring,
            quantised=quantised,
            bits=bits,
        )
        + frozen_bytes
        + taught_bytes
        + request.extra_bytes,
    )


def account_rows(
    request: Any, gradients: RowGradients, steps: Sequence[Extent], first: int
) -> None:
    """What DP-SGD costs: each row's own tokens, and one gradient for each row of a pass."""
    device, model, layout = request.device, request.model, request.device.base.layout
    tensors, ranks = model.adapter | model.head, ranks_by_block(layout, model)
    numbers = sum(tensors[name].numel() for name in gradients.names)
    at_once = min(gradients.rows_at_once, len(device.data))
    whole = Extent(
        tokens=sum(step.tokens for step in steps),
        squared_tokens=sum(step.squared_tokens for step in steps),
    )
    memory_bytes = training_memory_bytes(
        layout,
        model.structure,
        rank=ranks,
        embeddings=device.base.embeddings,
        batch=at_once,
        tokens=int(device.data.lengths.max()),
        first=first,
    )
    device.spend(
        flops=training_flops(layout, model.structure, ranks, whole, first)
        + len(steps) * expanding_flops(layout, model.structure, first),
        launches=len(steps) * layout.layers,
        samples=request.tuning.steps * min(request.tuning.batch, len(device.data)),
        memory_bytes=memory_bytes + 4 * at_once * numbers,
    )


def rank_of(model: Model) -> int:
    """The largest rank of the model's adapter, 0 without one."""
    return adapter_rank(model.adapter)


def ranks_by_block(layout: PrunableLayout, model: Model) -> list[int]:
    """The largest rank of each block's adapter, from input to output; 0 for a block without one."""
    ranks = [0] * layout.layers
    for site in layout.sites:
        if (factor := model.adapter.get(a_name(site.path))) is not None:
            ranks[site.layer] = max(ranks[site.layer], factor.shape[0])
    return ranks
