"""A device's plan for a round: the sparsity to which it prunes and the rank at which it tunes.

Every plan keeps to the schedule and the device's memory; `bandit.py` chooses among the allowed
plans. FedSpine (reconstructed), sections 2.4 and 4. The cubic schedule is that of gradual pruning
(Zhu & Gupta 2017, arXiv 1710.01878), which the pruning baselines share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedspine.core.errors import BadInput

# nats of a loss that count in a reward: a guess among 9 million classes loses no more, so what a
# device claims beyond it would only make all others count alike
MOST_NATS = 16.0

NOTHING_LEFT = 1e-9
TINY = 1e-9  # 0.7 * 10 rounds are seven rounds, whatever the last bit says
SHARES = 5  # between the least pruning due and the most allowed, among which times are compared

# seconds that a device would take to reach a sparsity, at each of these ranks
Foresee = Callable[[str, float, Sequence[int]], Sequence[float]]


def cubic_floor(
    round: int,
    rounds: int,
    target: float,
    *,
    warmup: float = 0.05,
    until: float = 0.7,
    share: float = 0.8,
) -> float:
    """The least cumulative sparsity in `round`, counted from 0: 0, then share*target*(1-(1-x)^3),
    then the target.

    `warmup` and `until` are shares of the run. The last of several rounds is at the target even if
    the run is too short to reach `until`; a run of one round only warms up. Raises BadInput for
    shares out of order or values out of range.

    >>> [round(cubic_floor(r, 20, 0.5), 3) for r in (0, 1, 7, 13, 14)]
    [0.0, 0.0, 0.338, 0.4, 0.5]
    """
    if not 0 <= warmup < until <= 1:
        raise BadInput(f"expected 0 <= warmup < until <= 1, got warmup {warmup} and until {until}")
    if not (0 <= target < 1 and 0 <= share <= 1):
        raise BadInput(f"expected target in [0, 1) and share in [0, 1], got {target} and {share}")
    start, end = warmup * rounds, until * rounds
    if rounds > 1 and (round >= end - TINY or round >= rounds - 1):
        return target
    if round <= start:
        return 0.0  # nothing is pruned before its importance is known
    x = min((round - start) / (end - start), 1.0)
    return share * target * (1 - (1 - x) ** 3)


@dataclass(frozen=True)
class Plan:
    """A device's plan: prune to `sparsity`, tune at `rank`.

    `action` is the plan's point in the unit square, at which the device's bandit is credited; None
    if the device only warms up. `progress` is the sparsity gained as a share of the most that a
    round allows, 0 once the target is reached.
    """

    sparsity: float
    rank: int
    action: tuple[float, float] | None
    progress: float


@dataclass(frozen=True)
class PlanResult:
    """The result of a plan: seconds, the drop in loss (None if unknown), and the adapter's change.

    `compute_seconds` of the seconds are the device's work, the rest traffic of so many `bytes`.
    `importance` is the size of that change relative to the weights, `effective_rank` the number of
    directions over which it spreads, and `load` the operations relative to batches of full-length
    texts.
    """

    plan: Plan
    seconds: float
    gain: float | None
    importance: float
    effective_rank: float
    compute_seconds: float = 0.0
    bytes: int = 0
    load: float = 1.0


@dataclass(frozen=True)
class Limits:
    """The limits of a plan: the sparsity so far, the least due this round, the target, and the
    affordable ranks, rising.
    """

    sparsity: float
    due: float
    target: float
    most_per_round: float
    ranks: Sequence[int]
    affordable: int  # how many of `ranks`, at least one

    @property
    def frozen(self) -> bool:
        """Whether nothing is left to prune."""
        return self.target - self.sparsity <= NOTHING_LEFT

    @property
    def most(self) -> float:
        """The largest sparsity gain that may be chosen."""
        return min(self.most_per_round, self.target - self.sparsity)

    @property
    def lowest(self) -> float:
        """The smallest share of `most` that the schedule allows."""
        return 0.0 if self.frozen else min(max((self.due - self.sparsity) / self.most, 0.0), 1.0)

    @property
    def last(self) -> int:
        return len(self.ranks) - 1


@dataclass(frozen=True)
class Turn:
    """A device to be planned; it only warms up while nothing is known of its units."""

    limits: Limits
    warm: bool
    rng: np.random.Generator

    @property
    def binding(self) -> Limits:
        """The limits, with nothing left to prune where the device only warms up."""
        limits = self.limits
        return replace(limits, due=0.0, target=limits.sparsity) if self.warm else limits


def warm_up(limits: Limits, rng: np.random.Generator) -> Plan:
    """A plan without pruning, since no importance is known yet, at a random rank, so that the
    device's time at that rank becomes known.
    """
    return Plan(limits.sparsity, limits.ranks[int(rng.integers(limits.affordable))], None, 0.0)


def random_plan(limits: Limits, rng: np.random.Generator) -> Plan:
    """A plan drawn uniformly among those that the schedule and the memory allow."""
    u = 0.0 if limits.frozen else rng.uniform(limits.lowest, 1.0)
    return _plan_of(limits, float(u), int(rng.integers(limits.affordable)))


def fixed_plan(limits: Limits, ratio: float, rank: int) -> Plan:
    """A plan that prunes `ratio` of the largest pruning that a round allows, or what is due if that
    is more, and tunes at `rank`, or at the largest rank below it that fits the memory.

    A ratio of 0 prunes only what the schedule demands.

    >>> limits = Limits(
    ...     sparsity=0.1, due=0.0, target=0.5, most_per_round=0.05, ranks=(4, 8), affordable=2
    ... )
    >>> fixed_plan(limits, 0.5, 8)
    Plan(sparsity=0.125, rank=8, action=(0.5, 1.0), progress=0.5)
    """
    u = (
        0.0
        if limits.frozen
        else max(min(ratio * limits.most_per_round / limits.most, 1.0), limits.lowest)
    )
    return _plan_of(limits, u, min(list(limits.ranks).index(rank), limits.affordable - 1))


def plans_for_deadline(
    limits: Mapping[str, Limits], foresee: Foresee, slack: float = 0.0, margin: float = 0.0
) -> dict[str, Plan]:
    """Plans that all end by one deadline: each device's largest rank that can, with the least
    pruning that lets it.

    The deadline is the earliest moment at which all devices can be done, moved by `slack` (0 to 1)
    towards the moment at which they are done if they prune only what is due and tune at their
    largest rank. So with slack 0, no other plans end the round sooner, and none that end it as soon
    give any device a larger rank. With `margin`, uncertain times must fit even if they are longer
    by that share; a device without such a plan takes its fastest plan.
    """
    plans = {id: _menu(each) for id, each in limits.items()}
    times = {
        id: np.array([foresee(id, row[0].sparsity, [p.rank for p in row]) for row in plans[id]])
        for id in plans
    }
    if not times:
        return {}
    earliest = max(seconds.min() for seconds in times.values())
    unhurried = max(seconds[0, -1] for seconds in times.values())
    deadline = earliest + slack * max(unhurried - earliest, 0.0)
    return {
        id: plans[id][row][column]
        for id, (row, column) in _fitting(times, deadline, margin).items()
    }


def _fitting(
    times: Mapping[str, NDArray[np.float64]], deadline: float, margin: float
) -> dict[str, tuple[int, int]]:
    """The largest rank (column) that ends by the deadline, and the least pruning (row) with which
    it does.
    """
    chosen = {}
    for id, seconds in times.items():
        fits = ((1 + margin) * seconds <= deadline) | (seconds == seconds.min())
        column = int(np.flatnonzero(fits.any(axis=0))[-1])
        chosen[id] = int(np.argmax(fits[:, column])), column
    return chosen


def _menu(limits: Limits) -> list[list[Plan]]:
    """Plans to compare, by rising sparsity and, within, by rising rank."""
    shares = (
        np.array([0.0]) if limits.frozen else np.unique(np.linspace(limits.lowest, 1.0, SHARES))
    )
    return [
        [_plan_of(limits, u, index) for index in range(limits.affordable)] for u in shares.tolist()
    ]


def _plan_of(limits: Limits, u: float, index: int) -> Plan:
    return plan_at(limits, u, index / limits.last if limits.last else 0.0, index)


def plan_at(limits: Limits, u: float, v: float, index: int) -> Plan:
    """The plan at (u, v) of the unit square, v being the place of the rank with this index."""
    gain = 0.0 if limits.frozen else max(u * limits.most, limits.due - limits.sparsity)
    # the sum is rounded, but the schedule binds exactly
    sparsity = max(limits.sparsity + gain, limits.due)
    return Plan(
        sparsity=min(sparsity, limits.target),
        rank=limits.ranks[index],
        action=(u, v),
        progress=min(1.0, gain / limits.most_per_round),
    )
