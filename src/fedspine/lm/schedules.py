"""How the learning rate of local training goes over the rounds of a run, the same for all devices.

Each schedule is a part (`core.parts`) of a recipe, `method.schedule`. All may begin with a warm-up:
in its rounds the rate rises in equal steps, and the round after it has the whole rate. Those that
fall may end at a floor: what is pruned late then still recovers at a rate that moves it.
"""

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar, TypeAlias

from fedspine.core.errors import check_ranges
from fedspine.core.parts import quiet


@dataclass(frozen=True)
class Linear:
    """A fall in equal steps, to the floor after the last round."""

    name: ClassVar = "linear"
    warmup_rounds: int = 0
    floor: float = quiet(0.0)  # of the full rate

    def check(self) -> None:
        """Raise BadInput for a floor that is no share."""
        _check_floor(self)

    def share(self, round: int, rounds: int) -> float:
        """Of the full rate, in this round, counted from 0.

        >>> [Linear(warmup_rounds=1).share(round, 5) for round in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
        >>> [Linear(floor=0.5).share(round, 4) for round in (0, 2)]
        [1.0, 0.75]
        """
        left = 1 - _share_done(self.warmup_rounds, round, rounds)
        return _warmup_share(self.warmup_rounds, round) or _above_floor(self.floor, left)


@dataclass(frozen=True)
class Constant:
    """The full rate in every round."""

    name: ClassVar = "constant"
    warmup_rounds: int = 0

    def check(self) -> None:
        """Nothing more can be wrong."""

    def share(self, round: int, rounds: int) -> float:
        """Of the full rate, in this round, counted from 0."""
        return _warmup_share(self.warmup_rounds, round) or 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a wave of the cosine, to the floor after the last round (Loshchilov and Hutter 2016,
    arXiv:1608.03983, without restarts).
    """

    name: ClassVar = "cosine"
    warmup_rounds: int = 0
    floor: float = quiet(0.0)  # of the full rate

    def check(self) -> None:
        """Raise BadInput for a floor that is no share."""
        _check_floor(self)

    def share(self, round: int, rounds: int) -> float:
        """Of the full rate, in this round, counted from 0.

        >>> [round(Cosine().share(at, 4), 3) for at in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        done = _share_done(self.warmup_rounds, round, rounds)
        return _warmup_share(self.warmup_rounds, round) or _above_floor(
            self.floor, (1 + cos(pi * done)) / 2
        )


Schedule: TypeAlias = Linear | Constant | Cosine


def _warmup_share(warmup_rounds: int, round: int) -> float:
    """The share in a round of the warm-up; 0 after it."""
    return (round + 1) / (warmup_rounds + 1) if round < warmup_rounds else 0.0


def _above_floor(floor: float, share: float) -> float:
    """A share that falls from 1 to 0, as one that falls from 1 to the floor."""
    return floor + (1 - floor) * share if floor else share


def _check_floor(schedule: Linear | Cosine) -> None:
    check_ranges(schedule, {"floor": (0, 1)}, "method.schedule")


def _share_done(warmup_rounds: int, round: int, rounds: int) -> float:
    """The share of the rounds after the warm-up that is over."""
    return (round - warmup_rounds) / max(1, rounds - warmup_rounds)
