"""Fed-HeLLo's geometric patterns, which choose the blocks of a device that can train only some.

Zhang et al. 2025, arXiv:2506.12213. A pattern says how many devices of a fleet train each block.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedspine.core.device import DeviceId

Pattern: TypeAlias = Literal["triangle", "inverted", "bottleneck", "uniform"]
DRAW = 402  # the purpose of this random stream


def heights(pattern: Pattern, layers: int) -> NDArray[np.float64]:
    """The relative number of devices that train each block, [layers], from input to output.

    >>> [heights(pattern, 4).tolist() for pattern in ("triangle", "inverted")]
    [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    >>> [heights(pattern, 4).tolist() for pattern in ("bottleneck", "uniform")]
    [[4.0, 2.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]]
    """
    block = np.arange(layers, dtype=np.float64)
    match pattern:
        case "triangle":
            return layers - block
        case "inverted":
            return block + 1
        case "bottleneck":
            return np.abs(2 * block - (layers - 1)) + 1
        case "uniform":
            return np.ones(layers)


def blocks_of_device(
    pattern: Pattern,
    layers: int,
    count: int,
    device: DeviceId,
    seed: int,
    *,
    lowest: int = 0,
    round: int | None = None,
) -> tuple[int, ...]:
    """The `count` blocks that a device trains, ascending, none below `lowest`; all if there are
    fewer.

    They are the highest blocks of the pattern, and of equal ones those nearer to the output.
    `uniform` draws them for each device. With a `round`, they are drawn for each round, with
    probabilities in proportion to `shares`.

    >>> [blocks_of_device("bottleneck", 6, count, "a", seed=0) for count in (1, 2, 3)]
    [(5,), (0, 5), (0, 4, 5)]
    >>> blocks_of_device("triangle", 6, 3, "a", seed=0, lowest=2)
    (2, 3, 4)
    """
    hosted = np.arange(lowest, layers)
    count = min(count, len(hosted))
    height = heights(pattern, layers)
    if round is None and pattern != "uniform":
        order = sorted(hosted.tolist(), key=lambda block: (-height[block], -block))
        return tuple(sorted(order[:count]))
    stream = [seed, DRAW, *device.encode()] if round is None else [seed, DRAW, round]
    rng = np.random.default_rng(stream if round is None else [*stream, *device.encode()])
    weights = shares(height)[hosted]
    drawn = rng.choice(hosted, count, replace=False, p=weights / weights.sum())
    return tuple(sorted(drawn.tolist()))


def shares(height: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The weight of each block in a draw: 3 for the highest third of a pattern, 2 and 1 for the
    others, as in the released code; equal for equal heights.

    >>> shares([6, 4, 2, 2, 4, 6]).tolist(), shares([1, 1, 1]).tolist()
    ([3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    """
    height = np.asarray(height, dtype=np.float64)
    levels, place = np.unique(height, return_inverse=True)
    if len(levels) == 1:
        return np.ones(len(height))
    lower = np.array([(height < level).mean() for level in levels])  # the share of blocks below
    return np.floor(3 * lower + 1e-9)[place] + 1
