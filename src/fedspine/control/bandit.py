"""S-UCB: one device's choice of a pair in the unit square, from a quad tree with discounted upper
confidence bounds.

Reconstructed from FedSpine (2025, arXiv 2501.02438), whose formulas are not public: the tree is
that of E-UCB (FedMP, ICDE 2022) in two dimensions, the discount that of D-UCB (arXiv 0805.3415). u
is a share of the pruning still allowed in this round, v a rank. What a bandit is credited with is
the reward of section 4.
"""

from collections.abc import Iterable, Mapping
from dataclasses import field
from math import isfinite, tanh

import numpy as np
from numpy.typing import NDArray

from fedspine.control.plan import MOST_NATS, Limits, Plan, PlanResult, plan_at
from fedspine.core.message import message

Leaves = NDArray[np.float64]  # [leaves, 6]
# lower corner, side length, depth, discounted plays, discounted sum of rewards
U0, V0, SIDE, DEPTH, N, S = range(6)

WHOLE = ((0.0, 1.0), (0.0, 1.0))
FRESH_PLAYS = 1e-3  # a leaf with fewer discounted plays counts as never played


def _quadrants() -> Leaves:
    return np.array([[u, v, 0.5, 1.0, 0.0, 0.0] for u in (0.0, 0.5) for v in (0.0, 0.5)])


@message
class Bandit:
    """The bandit of one device: the leaves of its tree, which partition the unit square, with the
    evidence of its trials.

    >>> Bandit().leaves.shape
    (4, 6)
    """

    leaves: np.ndarray = field(default_factory=_quadrants)


def choose(
    bandit: Bandit,
    *,
    exploration: float,
    frozen_ratio: bool = False,
    within: tuple[tuple[float, float], tuple[float, float]] = WHOLE,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """A point (u, v) drawn uniformly from the leaf with the highest bound S/N + c*sqrt(ln n/N).

    Leaves never played come first; ties are broken at random. With `frozen_ratio` (nothing is left
    to prune), u is 0 and the arms are the `bands` of v. `within` = ((lowest u, highest u), (lowest
    v, highest v)) is what can be executed. Leaves outside it are not chosen: they could never be
    credited and would stay the most promising forever. Raises ValueError if `within` is not an
    ordered part of the unit square.

    >>> u, v = choose(Bandit(), exploration=0.1, rng=np.random.default_rng(0))
    >>> 0 <= u < 1 and 0 <= v < 1
    True
    """
    _check_window(within)
    (u_low, u_high), (v_low, v_high) = ((0.0, 0.0), within[1]) if frozen_ratio else within
    arms = bands(bandit) if frozen_ratio else bandit.leaves
    u_side = np.ones(len(arms)) if frozen_ratio else arms[:, SIDE]
    inside = _meets(arms[:, U0], u_side, u_low, u_high) & _meets(
        arms[:, V0], arms[:, SIDE], v_low, v_high
    )
    bound = np.where(inside, _bounds(arms, exploration), -np.inf)
    best = rng.choice(np.flatnonzero(bound == bound.max()))
    u0, v0, side = arms[best, :3]
    u = rng.uniform(max(u0, u_low), min(u0 + u_side[best], u_high))
    v = rng.uniform(max(v0, v_low), min(v0 + side, v_high))
    return float(u), float(v)


def choose_plan(
    bandit: Bandit, limits: Limits, *, exploration: float, rng: np.random.Generator
) -> Plan:
    """The bandit's choice among the plans that the schedule and the memory allow."""
    last, affordable = limits.last, limits.affordable
    highest = min((affordable - 0.5) / last, 1.0) if last else 1.0
    u, v = choose(
        bandit,
        exploration=exploration,
        frozen_ratio=limits.frozen,
        within=((limits.lowest, 1.0), (0.0, highest)),
        rng=rng,
    )
    return plan_at(limits, u, v, min(round(v * last), affordable - 1))


def credit(
    bandit: Bandit,
    u: float,
    v: float,
    reward: float,
    *,
    discount: float = 0.95,
    split_at: float = 2,
    max_tree_depth: int = 2,
) -> Bandit:
    """The bandit after the executed action (u, v) earned `reward`: all leaves are discounted, the
    leaf of (u, v) is credited and then split.

    (u, v) is what the device did, not what was chosen; with a frozen ratio, u = 0. A leaf above
    `max_tree_depth` with at least `split_at` plays is cut at its midpoints, and each child inherits
    a quarter of its evidence. Raises ValueError for a point outside the unit square or a reward
    that is not finite.

    >>> credit(Bandit(), 0.7, 0.2, 1.0).leaves[:, N]
    array([0., 0., 1., 0.])
    """
    if not isfinite(reward):
        raise ValueError(
            f"expected a finite reward, got {reward}; leave devices without a measured loss out"
        )
    hit = leaf_of(bandit, u, v)
    leaves = bandit.leaves.copy()
    leaves[:, (N, S)] *= discount
    leaves[hit, (N, S)] += (1.0, reward)
    if leaves[hit, N] >= split_at and leaves[hit, DEPTH] < max_tree_depth:
        leaves = np.concatenate([leaves[:hit], _children(leaves[hit]), leaves[hit + 1 :]])
    return Bandit(leaves=leaves)


def leaf_of(bandit: Bandit, u: float, v: float) -> int:
    """The row of the leaf that contains (u, v); the square's upper edges belong to the last leaves.

    >>> leaf_of(Bandit(), 1.0, 0.5)
    3
    """
    if not (0 <= u <= 1 and 0 <= v <= 1):
        raise ValueError(f"expected an action in the unit square, got ({u}, {v}); clip it first")
    leaves = bandit.leaves
    inside = _meets(leaves[:, U0], leaves[:, SIDE], u, u) & _meets(
        leaves[:, V0], leaves[:, SIDE], v, v
    )
    return int(np.flatnonzero(inside)[0])


def bands(bandit: Bandit) -> Leaves:
    """The evidence about v alone, as leaves of full width in u (their U0 is 0; SIDE and DEPTH are
    those of v).

    The edges of all leaves cut v into elementary bands. A leaf taller than a band gives it the
    share of its evidence that the band covers, as if its plays were spread evenly, which a split
    assumes, too. So bands neither overlap nor lose evidence, however unevenly u was split. (Ours.)

    >>> bands(credit(Bandit(), 0.7, 0.2, 1.0))[:, N]
    array([1., 0.])
    """
    leaves = bandit.leaves
    low = np.unique(leaves[:, V0])
    side = np.diff(np.append(low, 1.0))
    overlap = (leaves[:, V0] <= low[:, None]) & (low[:, None] < leaves[:, V0] + leaves[:, SIDE])
    share = overlap * side[:, None] / leaves[:, SIDE]  # [bands, leaves]
    return np.column_stack(
        [np.zeros_like(low), low, side, -np.log2(side), share @ leaves[:, N], share @ leaves[:, S]]
    )


def rewards(
    results: Mapping[str, PlanResult], gain_scale: float | None
) -> tuple[dict[str, float], float | None]:
    """The reward of every device that had a choice and whose gain is known, and the updated scale
    of gains.
    """
    mean_seconds = float(np.mean([result.seconds for result in results.values()]))
    largest = max(result.importance for result in results.values()) or 1.0
    gains = {
        id: min(max(result.gain, -MOST_NATS), MOST_NATS)
        for id, result in results.items()
        if result.gain is not None
    }
    gain_scale = update_scale(gain_scale, gains.values())
    earned = {}
    for id, gain in gains.items():
        result = results[id]
        if result.plan.action is None or gain_scale is None:
            continue
        earned[id] = reward(
            gain=gain,
            scale=gain_scale,
            progress=result.plan.progress,
            importance=result.importance / largest,
            lateness=abs(result.seconds - mean_seconds) / mean_seconds,
        )
    return earned, gain_scale


def reward(
    *, gain: float, scale: float, progress: float, importance: float, lateness: float
) -> float:
    """The reward of a round, in [0, 1]: the mean of three merits, divided by 1 + lateness.

    gain: loss before minus loss after; scale: the fleet's usual |gain| (`update_scale`); progress:
    sparsity gained over the most allowed, 0 once the target is reached; importance: of the
    adapter's change, over the round's largest; lateness: |T - mean T| / mean T. progress and
    importance are clipped to [0, 1]. Raises ValueError for a value that is not finite, or a
    negative scale or lateness.

    >>> reward(gain=0.0, scale=0.1, progress=1.0, importance=0.0, lateness=1.0)
    0.25
    """
    if not all(map(isfinite, (gain, scale, progress, importance, lateness))):
        raise ValueError(
            f"expected finite values, got {gain=} {scale=} {progress=} {importance=} {lateness=}"
        )
    if min(scale, lateness) < 0:
        raise ValueError(f"{scale=} and {lateness=} must not be negative")
    quality = 0.5 * (1 + tanh(gain / (2 * (scale + 1e-3))))
    merits = (quality, min(max(progress, 0.0), 1.0), min(max(importance, 0.0), 1.0))
    # the mean of three ones may exceed 1 by rounding
    return min(sum(merits) / 3, 1.0) / (1 + lateness)


def update_scale(scale: float | None, gains: Iterable[float], *, keep: float = 0.9) -> float | None:
    """The running average of the median |gain| over a round's devices, in which the old value has
    the weight `keep`; None starts it, and without gains it does not change.

    Raises ValueError for a gain that is not finite.

    >>> update_scale(None, [0.1, -0.3, 0.2])
    0.2
    """
    sizes = np.abs(np.fromiter(gains, dtype=float))
    if not np.isfinite(sizes).all():
        raise ValueError(
            f"expected finite gains, got {sizes.tolist()}; "
            "leave devices without a measured loss out"
        )
    if not len(sizes):
        return scale
    median = float(np.median(sizes))
    return median if scale is None else keep * scale + (1 - keep) * median


def _bounds(arms: Leaves, exploration: float) -> NDArray[np.float64]:
    plays = np.maximum(arms[:, N], FRESH_PLAYS)
    total = max(arms[:, N].sum(), 1.01)  # the logarithm must stay positive
    bound = arms[:, S] / plays + exploration * np.sqrt(np.log(total) / plays)
    return np.where(arms[:, N] < FRESH_PLAYS, np.inf, bound)


def _children(leaf: NDArray[np.float64]) -> Leaves:
    children = np.repeat(leaf[None], 4, axis=0)
    children[:, SIDE] /= 2
    children[:, DEPTH] += 1
    children[:, (N, S)] /= 4
    children[2:, U0] += leaf[SIDE] / 2
    children[1::2, V0] += leaf[SIDE] / 2
    return children


def _meets(
    start: NDArray[np.float64], side: NDArray[np.float64], low: float, high: float
) -> NDArray[np.bool_]:
    """Which intervals hold a point of [low, high]; they are half-open, but those that end at 1
    contain it.
    """
    end = start + side  # exact: sides are powers of two
    return (start <= high) & ((end > low) | (end == 1))


def _check_window(within: tuple[tuple[float, float], tuple[float, float]]) -> None:
    if not all(0 <= low <= high <= 1 for low, high in within):
        raise ValueError(
            f"expected ((lowest u, highest u), (lowest v, highest v)) in [0, 1], got {within}"
        )
