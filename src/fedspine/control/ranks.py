"""Fixed ranks that differ by device, for methods that do not choose ranks during a run.

HetLoRA (arXiv:2401.06432) and FlexLoRA (arXiv:2402.11505) assume that a device's rank suits it. A
device declares its memory here, never its speed; so its rank follows from its memory, or is drawn
at random, as in FlexLoRA's released code.
"""

from typing import Literal, TypeAlias

import numpy as np

from fedspine.core.errors import BadInput

RankRule: TypeAlias = Literal["memory", "random"]
DRAW = 401  # the purpose of this random stream


def check_rising(ranks: tuple[int, ...]) -> None:
    """Raise BadInput if there are no ranks, or if they do not rise."""
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise BadInput(
            f"method.ranks is {list(ranks)}, but rising ranks without repeats were expected"
        )


def one_of_device(
    choices: tuple[int, ...],
    by: RankRule,
    largest_gib: float,
    device: str,
    memory_bytes: int,
    seed: int,
) -> int:
    """One of the rising `choices`, such as ranks, for one device.

    By memory: the largest choice whose ratio to the last choice is at most the ratio of the
    declared memory to `largest_gib`, or else the first choice. At random: each choice is equally
    likely, drawn from (seed, device).
    """
    if by == "random":
        return int(np.random.default_rng([seed, DRAW, *device.encode()]).choice(choices))
    earned = choices[-1] * (memory_bytes / 2**30) / largest_gib
    return max((each for each in choices if each <= earned), default=choices[0])
