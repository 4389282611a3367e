"""The plan of a round of split learning: which devices take part, and with how many rows in every
iteration.

This is the control module of MergeSFL (Liao et al. 2024, arXiv:2311.13348), as reconstructed.
Batches are regulated to the devices' speed, devices are chosen for the labels of the merged batch,
batches are scaled up to what the server can take, and then tuned to bring those labels nearer to
the fleet's. The paper scales after tuning; here the tuning comes last, so that nothing moves the
labels after it, and batches are rounded once. The paper does not publish its solver; ours is marked
as such.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from fedspine.control.batch_sizes import regulate, scaled_up, waiting_share
from fedspine.control.batch_timing import levelled
from fedspine.control.genetic_selection import Search, any_workers, select
from fedspine.control.labels import divergence, merged, reference
from fedspine.core.errors import BadInput

ROUNDING = 1e-9  # nats
FREE = 1e-4  # of an iteration: waiting that counts as none
# of the limit on divergence that a choice of devices may use up, so that batches need little tuning
ROOM = 0.5


@dataclass(frozen=True)
class Candidates:
    """The devices that may take part in a round, one entry each; raises ValueError for arrays of
    unequal lengths or invalid values.
    """

    cost: Float[np.ndarray, " workers"]  # seconds that one row takes, compute and transfer; above 0
    labels: Float[np.ndarray, "workers classes"]  # V_i: the share of each class in a device's rows
    most: Int[
        np.ndarray, " workers"
    ]  # rows that its data and its memory allow in one batch, at least 1
    rounds: Int[np.ndarray, " workers"]  # K: in which it has taken part
    # seconds of an iteration beside its rows', with which batches are levelled; None: Eq. 9, which
    # knows of no such cost
    fixed: float | None = None
    # seconds that a round's exchange of weights takes each, shared out over the iterations; None:
    # devices are chosen
    # for their labels alone, as in the paper
    weights: Float[np.ndarray, " workers"] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.cost), len(self.labels), len(self.most), len(self.rounds)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"expected one entry for each of at least one device, got {sorted(lengths)}"
            )
        if not (self.cost.min() > 0 and np.isfinite(self.cost).all() and self.most.min() >= 1):
            raise ValueError(
                "finite costs above 0 and at least one row for each device were expected"
            )
        if self.fixed is not None and not 0 <= self.fixed < np.inf:
            raise ValueError("a finite fixed cost of at least 0 was expected")
        if (
            self.labels.ndim != 2
            or not np.allclose(self.labels.sum(axis=1), 1)
            or self.labels.min() < 0
        ):
            raise ValueError("shares of classes that sum to 1 for each device were expected")


@dataclass(frozen=True)
class SplitLimits:
    """The limits of every plan; raises BadInput for limits that no plan can meet."""

    largest_batch: int = 64  # D: rows of the fastest device
    fewest: int = 5  # m_min: devices of a round; fewer only where the budget has no room for them
    most: int = 20  # m_max
    feature_bytes: float = 1.0  # c: what one row's features take on the wire
    budget_bytes: float = 640.0  # B: what the server can take in one iteration
    divergence: float = 0.05  # eps: nats from the fleet's labels above which batches are tuned

    def __post_init__(self) -> None:
        if self.largest_batch < 1:
            raise BadInput(
                f"the largest batch is {self.largest_batch}, but at least 1 row is needed"
            )
        if not 1 <= self.fewest <= self.most:
            raise BadInput(
                f"between {self.fewest} and {self.most} devices a round were asked for, but at "
                "least 1 is needed, and no more as the fewest than as the most"
            )
        if not (self.feature_bytes > 0 and self.budget_rows >= 1):
            raise BadInput(
                f"the bandwidth budget is {self.budget_bytes:.0f} bytes an iteration, but one "
                f"row's features take {self.feature_bytes:.0f}; raise the budget"
            )
        if not self.divergence >= 0:
            raise BadInput(f"the divergence limit is {self.divergence}, but it cannot be negative")

    @property
    def budget_rows(self) -> int:
        """Rows that the server can take in one iteration."""
        return int(self.budget_bytes // self.feature_bytes)


@dataclass(frozen=True)
class SplitControl:
    """Which parts of the control are on: all of them in MergeSFL, fewer in ablations."""

    select: Literal["genetic", "random", "all"] = "genetic"  # "random": whatever their labels
    regulate: bool = True  # False: equal batches, about as large in all, which are not tuned either
    tune: bool = True  # False: batches are not changed for the labels' sake
    population: int = 20
    generations: int = 20


@dataclass(frozen=True)
class SplitPlan:
    """The plan of a round, and what is expected of it."""

    chosen: Int[np.ndarray, " chosen"]  # places among the candidates, ascending
    batches: Int[np.ndarray, " chosen"]  # rows of each in every iteration
    # nats of the merged labels from the fleet's; above the limit where nothing better was found
    divergence: float
    waiting: float  # share of an iteration that devices are expected to wait, on average

    @property
    def rows(self) -> int:
        """Q: rows of the merged batch."""
        return int(self.batches.sum())


def plan_split(
    workers: Candidates,
    limits: SplitLimits,
    rng: np.random.Generator,
    control: SplitControl = SplitControl(),
) -> SplitPlan:
    """Choose devices and batches (Eq. 9 to 14); the same arguments and generator state give the
    same plan.

    The merged batch always fits the budget, no batch exceeds `limits.largest_batch` or the device's
    `most`, and all have at least one row. A round counts as a device's turn when it is complete,
    not here.

    >>> alike = Candidates(np.ones(4), np.full((4, 2), 0.5), np.full(4, 100), np.zeros(4, int))
    >>> limits = SplitLimits(largest_batch=8, fewest=4, most=4)
    >>> plan = plan_split(alike, limits, np.random.default_rng(0))
    >>> plan.chosen.tolist(), plan.batches.tolist(), plan.divergence, plan.waiting
    ([0, 1, 2, 3], [8, 8, 8, 8], 0.0, 0.0)
    """
    most = np.minimum(workers.most, min(limits.largest_batch, limits.budget_rows))
    if workers.fixed is None:
        batches = regulate(workers.cost, limits.largest_batch, most)
    else:
        batches = levelled(workers.cost, workers.fixed, limits.largest_batch, most, int(most.sum()))
    if not control.regulate:  # the most devices that may be chosen fit the budget
        batches = np.minimum(max(1, limits.budget_rows // min(limits.most, len(most))), most)
    search = Search(
        batches, workers.labels, workers.rounds, limits.budget_rows, limits.fewest, limits.most
    )
    if workers.weights is not None:
        seconds = np.stack([workers.weights, (workers.fixed or 0.0) + batches * workers.cost])
        search = replace(search, seconds=seconds, enough=ROOM * limits.divergence)
    match control.select:
        case "genetic":
            chosen = select(
                search, rng, population=control.population, generations=control.generations
            )
        case "random":
            chosen = any_workers(search, rng)
        case "all":
            chosen = np.arange(len(batches))
    goal = Goal(
        cost=workers.cost[chosen],
        labels=workers.labels[chosen],
        reference=reference(workers.labels),
        most=most[chosen],
        limits=limits,
        fixed=workers.fixed or 0.0,
    )
    if not control.regulate:
        batches = np.minimum(
            min(limits.largest_batch, limits.budget_rows // len(chosen)), goal.most
        )
    elif workers.fixed is not None:
        batches = planned_again(goal, tune=control.tune)
    else:
        batches = scaled_up(
            goal.cost, limits.largest_batch, goal.most, limits.budget_rows, workers.cost.min()
        )
        batches = tuned(goal, batches) if control.tune else batches
    return SplitPlan(
        chosen=chosen,
        batches=batches,
        divergence=float(goal.divergence(batches)),
        waiting=waiting_share(goal.seconds(batches)),
    )


@dataclass(frozen=True)
class Goal:
    """What the batches of the chosen devices are tuned for, and their limits."""

    cost: Float[np.ndarray, " chosen"]
    labels: Float[np.ndarray, "chosen classes"]
    reference: Float[np.ndarray, " classes"]
    most: Int[np.ndarray, " chosen"]
    limits: SplitLimits
    fixed: float = 0.0  # seconds of an iteration beside its rows'

    def seconds(self, batches: np.ndarray) -> np.ndarray:
        """How long each device is expected to take for an iteration."""
        return self.fixed + batches * self.cost

    def divergence(self, batches: np.ndarray) -> np.ndarray:
        """Of one plan or of many, [..., chosen]."""
        return divergence(merged(batches, self.labels), self.reference)


def planned_again(goal: Goal, *, tune: bool = True) -> Int[np.ndarray, " chosen"]:
    """New batches of devices already chosen, from the speeds known so far: levelled, and with
    `tune` tuned.
    """
    batches = levelled(
        goal.cost, goal.fixed, goal.limits.largest_batch, goal.most, goal.limits.budget_rows
    )
    return tuned(goal, batches) if tune else batches


def _idle(goal: Goal, batches: np.ndarray) -> np.ndarray:
    """Seconds of an iteration that the mean device waits, of one plan or of many."""
    seconds = goal.seconds(batches)
    return seconds.max(axis=-1) - seconds.mean(axis=-1)


def tuned(goal: Goal, start: Int[np.ndarray, " chosen"]) -> Int[np.ndarray, " chosen"]:
    """Batches whose merged labels keep the limit on divergence, with as little added waiting as a
    search by single rows finds; `start` if it keeps the limit.

    Ours, in place of the paper's Lagrange dual (Eq. 14): of all changes of one batch by one row,
    take the one that reduces the divergence most for the waiting that it adds, until the limit is
    kept or no change helps.
    """
    steps = np.concatenate(
        [np.eye(len(start), dtype=np.int64), -np.eye(len(start), dtype=np.int64)]
    )
    longest = goal.seconds(start).max()
    batches, apart, idle = start, float(goal.divergence(start)), _idle(goal, start)
    while apart > goal.limits.divergence + ROUNDING:
        plans = batches + steps
        plans = plans[
            ((plans >= 1) & (plans <= goal.most)).all(axis=1)
            & (plans.sum(axis=1) <= goal.limits.budget_rows)
        ]
        nearer = apart - goal.divergence(plans)
        plans, nearer = plans[nearer > ROUNDING], nearer[nearer > ROUNDING]
        if not len(plans):
            break
        # the most divergence for the waiting; a change that costs none, or a hair, is as good as
        # free
        price = np.maximum((_idle(goal, plans) - idle) / longest, FREE)
        batches = plans[(nearer / price).argmax()]
        apart, idle = float(goal.divergence(batches)), _idle(goal, batches)
    return batches
