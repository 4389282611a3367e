"""One device's plan for a round: from the schedule and its bandit to a sparsity and a rank, and back to its credit.

FedSpine (reconstructed), sections 2.4 and 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspine.planning.bandit import Bandit, choose, credit, reward, update_scale

NOTHING_LEFT = 1e-9


@dataclass(frozen=True)
class Plan:
    """What a device is to do: prune to `reached`, tune at `rank`.

    `action` is the point of the unit square its bandit is credited for, None while nothing was chosen; `progress` the
    sparsity gained over the most that a round allows, 0 once the target is reached.
    """

    reached: float
    rank: int
    action: tuple[float, float] | None
    progress: float


@dataclass(frozen=True)
class Limits:
    """What binds a plan: sparsity so far, the least due this round, the target, and the affordable ranks, rising."""

    reached: float
    due: float
    target: float
    most_per_round: float
    ranks: Sequence[int]
    affordable: int  # how many of `ranks`, at least one


def warm_up(limits: Limits, rng: np.random.Generator) -> Plan:
    """No pruning, since no importance is known yet, and any rank, so that its time becomes known."""
    return Plan(limits.reached, limits.ranks[int(rng.integers(limits.affordable))], None, 0.0)


def choose_plan(bandit: Bandit, limits: Limits, *, explore: float, rng: np.random.Generator) -> Plan:
    """The bandit's choice among what the schedule and the memory allow."""
    left, due = limits.target - limits.reached, limits.due - limits.reached
    frozen = left <= NOTHING_LEFT
    most = min(limits.most_per_round, left)
    lowest = 0.0 if frozen else min(max(due / most, 0.0), 1.0)
    last = len(limits.ranks) - 1
    highest = min((limits.affordable - 0.5) / last, 1.0) if last else 1.0
    u, v = choose(bandit, explore=explore, frozen_ratio=frozen, within=((lowest, 1.0), (0.0, highest)), rng=rng)
    gain = 0.0 if frozen else max(u * most, due)
    return Plan(
        reached=min(limits.reached + gain, limits.target),
        rank=limits.ranks[min(round(v * last), limits.affordable - 1)],
        action=(u, v),
        progress=min(1.0, gain / limits.most_per_round),
    )


@dataclass(frozen=True)
class Outcome:
    """What a plan took and brought: seconds, the drop in loss (None while unknown), the adapter's change.

    `importance` is the size of that change against the weights, `effective_rank` over how many directions it spreads.
    """

    plan: Plan
    seconds: float
    gain: float | None
    importance: float
    effective_rank: float


@dataclass(frozen=True)
class Learning:
    """How bandits learn: the constants of `credit`."""

    discount: float
    split_at: float
    deepest: int


def rewards(
    outcomes: Mapping[str, Outcome], gain_scale: float | None, weights: tuple[float, float, float, float]
) -> tuple[dict[str, float], float | None]:
    """The reward of every device that chose and whose gain is known, and the new scale of gains (section 4)."""
    mean_seconds = float(np.mean([outcome.seconds for outcome in outcomes.values()]))
    largest = max(outcome.importance for outcome in outcomes.values()) or 1.0
    gains = {id: outcome.gain for id, outcome in outcomes.items() if outcome.gain is not None}
    gain_scale = update_scale(gain_scale, gains.values())
    earned = {
        id: reward(
            gain=gain,
            scale=gain_scale,
            progress=outcomes[id].plan.progress,
            importance=outcomes[id].importance / largest,
            lateness=abs(outcomes[id].seconds - mean_seconds) / mean_seconds,
            weights=weights,
        )
        for id, gain in gains.items()
        if outcomes[id].plan.action is not None and gain_scale is not None
    }
    return earned, gain_scale


def learn(
    bandits: Mapping[str, Bandit], outcomes: Mapping[str, Outcome], earned: Mapping[str, float], how: Learning
) -> dict[str, Bandit]:
    """The bandits of the devices that earned a reward, credited for what they did."""
    return {
        id: credit(
            bandits.get(id, Bandit()),
            *outcomes[id].plan.action,
            value,
            discount=how.discount,
            split_at=how.split_at,
            deepest=how.deepest,
        )
        for id, value in earned.items()
    }
