"""The numbers of heads and channels that a layer drops at a given sparsity.

Section 2.3 of the FedSpine reconstruction. Sparsity is 1 - kept/original parameters of a layer's
prunable linear layers. Counts depend on the layer's shape only, so all devices end at the same
sparsity without being sent the counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from fedspine.core.errors import BadInput

TOLERANCE = 0.0025  # how far from the target a layer may end
TINY = 1e-9  # 0.3 * 10 heads are three heads, whatever the last bit says


@dataclass(frozen=True)
class LayerShape:
    """The prunable units of one layer, and the number of parameters of each; with grouped queries,
    heads are KV heads.

    >>> shape = LayerShape(
    ...     heads=12, channels=1536, head_parameters=49_152, channel_parameters=768
    ... )
    >>> shape.parameters
    1769472
    """

    heads: int
    channels: int
    head_parameters: int
    channel_parameters: int

    @property
    def parameters(self) -> int:
        return self.heads * self.head_parameters + self.channels * self.channel_parameters

    def sparsity(self, heads: int, channels: int) -> float:
        """The layer's sparsity when so many heads and channels are gone."""
        return (heads * self.head_parameters + channels * self.channel_parameters) / self.parameters


def counts(
    shape: LayerShape,
    sparsity: float,
    *,
    target: float,
    dropped: tuple[int, int] = (0, 0),
    keep_heads: int = 2,
    keep_channels: float = 0.25,
    heads_dropped: Sequence[int] | None = None,
    heads_target: float | None = None,
) -> tuple[int, int]:
    """The total heads and channels dropped at cumulative `sparsity`, on the way to `target`.

    If `heads_dropped` is given, the number of heads is one of these, which include 0; if
    `heads_target` is given, heads go faster than channels, as in `final_counts`. Counts are never
    below `dropped` (units do not grow back) and never above `final_counts`, which they reach at the
    target. Heads are coarse, so before the target the sparsity may be off by one head's share.
    Raises BadInput as `final_counts` does.

    >>> minilm = LayerShape(heads=12, channels=1536, head_parameters=49_152, channel_parameters=768)
    >>> counts(minilm, 0.2, target=0.5), counts(minilm, 0.5, target=0.5, dropped=(2, 336))
    ((2, 336), (6, 768))
    """
    heads_before, channels_before = dropped
    heads_after, channels_after = final_counts(
        shape,
        target,
        keep_heads=keep_heads,
        keep_channels=keep_channels,
        heads_dropped=heads_dropped,
        heads_target=heads_target,
    )
    heads_after, channels_after = (
        max(heads_after, heads_before),
        max(channels_after, channels_before),
    )
    if sparsity >= target:
        return heads_after, channels_after

    def nearest_below(heads: int) -> int:
        possible = heads if heads_dropped is None else _at_most(heads, heads_dropped)
        return _clip(possible, heads_before, heads_after)

    faster = 1.0 if heads_target is None else heads_target / target
    heads = nearest_below(floor(shape.heads * faster * sparsity + TINY))
    channels = _channels_for(shape, sparsity, heads)
    if channels > channels_after:  # what the channels cannot give any more, heads must
        return nearest_below(round(_heads_for(shape, sparsity, channels_after))), channels_after
    if channels < channels_before:  # channels went ahead earlier, so fewer heads are due
        heads = nearest_below(floor(_heads_for(shape, sparsity, channels_before) + TINY))
        channels = _channels_for(shape, sparsity, heads)
    return heads, _clip(channels, channels_before, channels_after)


def final_counts(
    shape: LayerShape,
    target: float,
    *,
    keep_heads: int = 2,
    keep_channels: float = 0.25,
    heads_dropped: Sequence[int] | None = None,
    heads_target: float | None = None,
) -> tuple[int, int]:
    """The heads and channels dropped at the end: the same share of both, within 0.0025 of `target`;
    or `heads_target` of the heads, and as many channels as make up for it.

    A layer so small that one channel is more than 0.005 of it ends within half a channel. If
    `keep_heads` (a count) and `keep_channels` (a share) forbid the target, they are relaxed only as
    far as it requires: first the channels, down to one, then the heads, down to one. If
    `heads_dropped` is given, the number of heads is the one of these that is nearest to the same
    share. Raises BadInput if even that is not enough, or if one head outweighs all channels and the
    target falls between two counts of heads.

    >>> shape = LayerShape(
    ...     heads=2, channels=4864, head_parameters=917_504, channel_parameters=2_688
    ... )
    >>> final_counts(shape, 0.5)
    (0, 2776)
    >>> minilm = LayerShape(heads=12, channels=1536, head_parameters=49_152, channel_parameters=768)
    >>> final_counts(minilm, 0.5, heads_target=0.75)
    (9, 576)
    """
    if heads_dropped is not None:
        return _final_among(shape, target, heads_dropped, keep_heads, keep_channels)
    if not 0 <= target <= highest(shape) + _tolerance(shape):
        raise _unreachable(shape, target, highest(shape))
    share = target if heads_target is None else heads_target
    most = floor(target * shape.parameters / shape.head_parameters + TINY)  # without any channel
    wanted = min(floor(shape.heads * share + TINY), most)
    heads = _clip(wanted, 0, max(shape.heads - keep_heads, 0))
    floored, bare = (
        shape.channels - max(ceil(keep_channels * shape.channels), 1),
        shape.channels - 1,
    )
    missing = _heads_for(shape, target - _tolerance(shape), bare)
    more_heads = _clip(ceil(missing - TINY), heads, shape.heads - 1)
    for dropped, most in (
        (heads, floored),
        (heads, bare),
        (more_heads, floored),
        (more_heads, bare),
    ):
        if (channels := _channels_within(shape, target, dropped, most)) is not None:
            return dropped, channels
    below, above = shape.sparsity(more_heads - 1, bare), shape.sparsity(more_heads, 0)
    raise BadInput(
        f"sparsity {target} cannot be reached: one head outweighs all channels, so nothing between "
        f"{below:.4f} and {above:.4f} can be; choose a target outside"
    )


def _final_among(
    shape: LayerShape,
    target: float,
    heads_dropped: Sequence[int],
    keep_heads: int,
    keep_channels: float,
) -> tuple[int, int]:
    """`final_counts` with one of these numbers of heads dropped."""
    bare = shape.channels - 1
    floored = shape.channels - max(ceil(keep_channels * shape.channels), 1)
    nearest_first = sorted(heads_dropped, key=lambda n: (abs(n - shape.heads * target), n))
    above_floor = [n for n in nearest_first if n <= max(shape.heads - keep_heads, 0)]
    for choices, most in (
        *((above_floor, floored), (above_floor, bare)),
        *((nearest_first, floored), (nearest_first, bare)),
    ):
        for dropped in choices:
            if (channels := _channels_within(shape, target, dropped, most)) is not None:
                return dropped, channels
    most_dropped = shape.sparsity(max(heads_dropped), bare)
    if not 0 <= target <= most_dropped:
        raise _unreachable(shape, target, most_dropped, heads_dropped)
    kept = ", ".join(str(shape.heads - n) for n in sorted(heads_dropped))
    raise BadInput(
        f"sparsity {target} cannot be reached with {kept} heads and any number of channels; choose "
        "another target"
    )


def _unreachable(
    shape: LayerShape, target: float, most: float, heads_dropped: Sequence[int] = ()
) -> BadInput:
    kept = f" that keeps {shape.heads - max(heads_dropped)} heads" if heads_dropped else ""
    return BadInput(
        f"sparsity in [0, {floor(1000 * most) / 1000:.3f}] was "
        f"expected, which a layer of {shape.heads} heads and {shape.channels} "
        f"channels{kept} can reach, got {target}; lower the target"
    )


def highest(shape: LayerShape) -> float:
    """The highest sparsity of a layer that keeps one head and one channel.

    >>> highest(LayerShape(heads=4, channels=4, head_parameters=10, channel_parameters=10))
    0.75
    """
    return shape.sparsity(max(shape.heads - 1, 0), max(shape.channels - 1, 0))


def layer_targets(
    layers: int, target: float, *, protect_first: int = 0, protect_last: int = 0
) -> list[float]:
    """Each layer's target if some layers stay whole and the others, of equal size, compensate.

    Raises BadInput if the others would have to lose more than 0.999.

    >>> [round(t, 3) for t in layer_targets(32, 0.30, protect_first=3, protect_last=1)[2:5]]
    [0.0, 0.343, 0.343]
    """
    pruned = layers - protect_first - protect_last
    if min(protect_first, protect_last) < 0 or pruned < 0:
        raise BadInput(
            f"{protect_first} first and {protect_last} last "
            f"layers cannot be protected among {layers}"
        )
    needed = target * layers / pruned if pruned else float(target > 0)
    if not 0 <= needed <= 0.999:
        raise BadInput(
            f"a mean sparsity of {target} needs {needed:.3f} in the {pruned} of {layers} layers "
            "that are not protected; lower the target"
        )
    return [0.0] * protect_first + [needed] * pruned + [0.0] * protect_last


def _channels_for(shape: LayerShape, sparsity: float, heads: int) -> int:
    """Channels to drop beside `heads`, such that a multiple that hardware likes is kept."""
    due = (sparsity * shape.parameters - heads * shape.head_parameters) / shape.channel_parameters
    if due <= 0:
        return 0
    multiple = _multiple(shape)
    kept = multiple * round((shape.channels - due) / multiple)
    return _clip(shape.channels - kept, 0, shape.channels)


def _channels_within(shape: LayerShape, target: float, heads: int, most: int) -> int | None:
    """Channels to drop beside `heads`, `most` at most; None where that misses the target."""
    channels = min(_channels_for(shape, target, heads), most)
    near = abs(shape.sparsity(heads, channels) - target) <= _tolerance(shape)
    return channels if near else None


def _at_most(value: int, choices: Sequence[int]) -> int:
    return max((choice for choice in choices if choice <= value), default=0)


def _heads_for(shape: LayerShape, sparsity: float, channels: int) -> float:
    return (
        sparsity * shape.parameters - channels * shape.channel_parameters
    ) / shape.head_parameters


def _multiple(shape: LayerShape) -> int:
    """The largest of 8, 4, 2 and 1 such that rounding to its multiples stays in the tolerance."""
    fitting = (
        m for m in (8, 4, 2) if m * shape.channel_parameters / (2 * shape.parameters) <= TOLERANCE
    )
    return next(fitting, 1)


def _tolerance(shape: LayerShape) -> float:
    return max(TOLERANCE, shape.channel_parameters / (2 * shape.parameters)) + TINY


def _clip(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)
