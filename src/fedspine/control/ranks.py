"""A rank for every device, fixed by what it declares: for methods whose ranks differ and are not
chosen on the way.

HetLoRA (arXiv:2401.06432) and FlexLoRA (arXiv:2402.11505) presuppose that a device's rank suits it.
What a device declares here is its memory, never its speed; so rank follows memory, or is drawn, as
in FlexLoRA's released code.
"""

from typing import Literal, TypeAlias

import numpy as np

from fedspine.core.errors import BadInput

RankRule: TypeAlias = Literal["memory", "random"]
DRAW = 401  # the purpose of this random stream


def check_rising(ranks: tuple[int, ...]) -> None:
    """Raise BadInput for no ranks, or for ranks that do not rise."""
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

    By memory: the largest one whose share of the last one the declared memory covers as a share of
    `largest_gib`, at least the first. At random: each equally likely, drawn from (seed, device).
    """
    if by == "random":
        return int(np.random.default_rng([seed, DRAW, *device.encode()]).choice(choices))
    earned = choices[-1] * (memory_bytes / 2**30) / largest_gib
    return max((each for each in choices if each <= earned), default=choices[0])
