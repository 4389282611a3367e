"""The cost of training and running a model in floating-point operations and bytes, from shapes
alone.

Source: FedSpine (reconstructed), section 5. Frozen weights take a forward product and an input
gradient, 4 operations per weight and token; an adapter takes 6.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedspine.lm.prunable_layout import PrunableLayout, QuantisedLayout
from fedspine.lm.structure import Structure, full, kept_counts, sparsity

HALF, SINGLE = 2, 4  # bytes of one number
QUANTISING = 8  # operations to quantise a number and to read it back
EXPANDING = 2  # the latter of a weight: less the zero point, times the scale


@dataclass(frozen=True)
class Extent:
    """The amount of text: padded tokens, and the sum over sequences of their squared length."""

    tokens: int
    squared_tokens: int


@dataclass(frozen=True)
class ScoringCost:
    """The cost of scoring units on top of training; derived in `lm/scoring_cost.py`."""

    flops: float = 0.0
    bytes_beside: int = 0  # needed at once while a pass holds its activations
    bytes_after: int = 0  # needed at once when they are gone


NO_SCORING = ScoringCost()


Ranks: TypeAlias = int | Sequence[int]  # of all blocks, or of each one, from input to output


def adapter_width(layout: PrunableLayout, structure: Structure, first: int = 0) -> int:
    """Parameters of an adapter per unit of rank: kept rows plus kept columns, over all sites from
    block `first` on.
    """
    return adapter_parameters(layout, structure, 1, first)


def adapter_parameters(
    layout: PrunableLayout, structure: Structure, rank: Ranks, first: int = 0
) -> int:
    """Parameters of an adapter of these ranks, on the blocks from `first` on."""
    heads, channels = kept_counts(structure)
    total = 0
    for site in layout.sites:
        if site.layer < first:
            continue
        counts = heads if "heads" in (site.row_units, site.column_units) else channels
        kept = int(counts[site.layer]) * site.per_unit
        width = kept if site.row_units else site.rows
        width += kept if site.column_units else site.columns
        total += width * (rank if isinstance(rank, int) else rank[site.layer])
    return total


def frozen_bytes(layout: PrunableLayout, structure: Structure, embeddings: int) -> float:
    """Memory of the frozen weights: 16 bits each, or as the blocks' are held and, of these, the
    largest layer expanded to 16 bits.

    `embeddings` counts the parameters outside the blocks.
    """
    kept = layout.parameters * (1 - sparsity(layout, structure))
    if not isinstance(layout, QuantisedLayout):
        return HALF * (embeddings + kept)
    queries = layout.query_heads // layout.heads * layout.head_dim
    heads, channels = (int(kept.max()) for kept in kept_counts(structure))
    largest = layout.width * max(heads * queries, channels)
    return HALF * (embeddings + largest) + kept * layout.bits_each / 8


def expanding_flops(layout: PrunableLayout, structure: Structure, first: int = 0) -> float:
    """Operations to expand quantised weights in a training step: of all blocks for the forward
    pass, and of those from `first` on once more for the backward pass.
    """
    if layout.held_bits is None:
        return 0.0
    kept = layout.parameters * (1 - sparsity(layout, structure))
    return EXPANDING * (2 * kept - _parameters_below(layout, structure, first))


def training_flops(
    layout: PrunableLayout, structure: Structure, rank: Ranks, extent: Extent, first: int = 0
) -> float:
    """Operations to train an adapter of `rank` over this much text, on the blocks from `first` on.

    The blocks below take a forward pass only.
    """
    kept = 1 - sparsity(layout, structure)
    above = layout.parameters * kept - _parameters_below(layout, structure, first)
    per_token = (
        2 * layout.parameters * kept
        + 2 * above
        + 6 * adapter_parameters(layout, structure, rank, first)
    )
    layers = 4 * layout.layers + 8 * (layout.layers - first)
    attention = layers * layout.width * kept * extent.squared_tokens
    return extent.tokens * per_token + attention


def frozen_adapter(
    layout: PrunableLayout,
    structure: Structure,
    ranks: Sequence[int],
    trained: Collection[int],
) -> tuple[int, int]:
    """What adapters cost that take part as they are where only the blocks `trained` are trained,
    beside an adapter that is trained from the lowest of them on: operations for each token, bytes.

    Above that block a factor takes no gradient of its own, 2 operations less, and no room for it
    and for two moments. Below, it takes a forward product, 2 operations, and its own room.
    """
    lowest = min(trained)
    above = [0 if block in trained or block < lowest else rank for block, rank in enumerate(ranks)]
    below = [rank if block < lowest else 0 for block, rank in enumerate(ranks)]
    more, less = (adapter_parameters(layout, structure, some) for some in (below, above))
    return 2 * (more - less), SINGLE * (more - 3 * less)


def forward_flops(layout: PrunableLayout, extent: Extent) -> float:
    """Operations to run this much text through the whole unpruned model, once and without a
    backward pass.
    """
    attention = 4 * layout.layers * layout.width * extent.squared_tokens
    return 2.0 * layout.parameters * extent.tokens + attention


def teaching_flops(layout: PrunableLayout, rank: int, extent: Extent) -> float:
    """Operations of a teacher over this much text: the whole unpruned model with an adapter of this
    rank, once and without a backward pass.
    """
    return forward_flops(layout, extent) + 2.0 * _whole_adapter(layout, rank) * extent.tokens


def teaching_memory_bytes(
    layout: PrunableLayout, rank: int, *, embeddings: int, rows: int, tokens: int
) -> int:
    """Peak memory of a teacher's pass over so many rows of so many tokens: the unpruned base, an
    fp32 adapter, and one block's 16-bit activations at a time.
    """
    weights = frozen_bytes(layout, full(layout), embeddings)
    adapter = SINGLE * _whole_adapter(layout, rank)
    # what enters and leaves, queries, keys and values, and the widest inner layer
    per_token = 5 * layout.width + layout.channels
    block = rows * tokens * per_token + rows * layout.query_heads * tokens**2
    return int(weights + adapter + HALF * block)


def taught_states_bytes(layout: PrunableLayout, tokens: int) -> int:
    """What a language model's teacher says about so many tokens, held while its student trains: the
    16-bit states that enter the output layer.
    """
    return HALF * tokens * layout.width


def _whole_adapter(layout: PrunableLayout, rank: int) -> int:
    """Parameters of an adapter of the unpruned model."""
    return rank * sum(site.rows + site.columns for site in layout.sites)


def _parameters_below(layout: PrunableLayout, structure: Structure, layer: int) -> int:
    heads, channels = int(structure.heads[:layer].sum()), int(structure.channels[:layer].sum())
    return heads * layout.shape.head_parameters + channels * layout.shape.channel_parameters


def _kept_bytes(layout: PrunableLayout, kept: float, extent: Extent) -> float:
    """What a block keeps for the backward pass over this much text, in 16 bits."""
    return (
        extent.tokens * layout.width * (10 + 24 * kept)
        + 5 * extent.squared_tokens * layout.query_heads * kept
    )


def quantising_flops(
    layout: PrunableLayout, structure: Structure, extent: Extent, blocks: int
) -> float:
    """Operations to quantise what so many blocks keep over this much text, and to read it back:
    for each number its group's two extremes, its place between them, rounded and bounded, and back.
    """
    kept = 1 - sparsity(layout, structure)
    return blocks * QUANTISING * _kept_bytes(layout, kept, extent) / HALF


def training_memory_bytes(
    layout: PrunableLayout,
    structure: Structure,
    *,
    rank: Ranks,
    embeddings: int,
    batch: int,
    tokens: int,
    first: int = 0,
    scoring: ScoringCost = NO_SCORING,
    quantised: int = 0,
    bits: float = 16,
) -> int:
    """Peak memory of one training step: the frozen base, an fp32 adapter with its gradient and two
    moments, activations.

    The adapter sits on the blocks from `first` on; nothing below is kept for a backward pass.
    `embeddings` counts the parameters outside the blocks. Activations take 10 bytes per token and
    unit of width that pruning cannot cut, 24 that it can, and the attention scores. `scoring` is
    what a device that scores units needs besides: some of it beside the activations, some when they
    are gone. The lowest `quantised` of the trained blocks keep their activations at so many `bits`
    a number instead of 16; each is whole while it is computed.
    """
    kept = 1 - sparsity(layout, structure)
    weights = frozen_bytes(layout, structure, embeddings)
    adapter = 4 * SINGLE * adapter_parameters(layout, structure, rank, first)
    per_layer = _kept_bytes(layout, kept, Extent(batch * tokens, batch * tokens**2))
    blocks = layout.layers - first
    if quantised:
        ratio = bits / (8 * HALF)
        blocks = max(blocks - quantised + ratio * quantised, 1 + ratio * (quantised - 1))
    activations = blocks * per_layer
    return int(weights + adapter + max(activations + scoring.bytes_beside, scoring.bytes_after))
