"""A genetic search for the devices of a split round whose merged labels match the fleet's.

MergeSFL (Liao et al. 2024, arXiv:2311.13348) searches in this way under the server's bandwidth; its
operators and sizes are not published. Individuals are the rows of a boolean matrix, so that one
numpy operation handles all of them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fedspine.control.labels import divergence, merged, reference
from fedspine.control.worker_state import priorities

TOURNAMENT = 3  # individuals of which the fittest becomes a parent
FLIP = 0.02  # chance that a bit of a child flips
# where seconds are weighed: the share of the workers, fastest links first, that the first founder
# is drawn from
REACH = 0.4

Members = Bool[np.ndarray, "individuals workers"]


@dataclass(frozen=True)
class Search:
    """The eligible workers, and the limits of a selection."""

    batches: Int[
        np.ndarray, " workers"
    ]  # rows of each one that is chosen, none above `budget_rows`
    labels: Float[np.ndarray, "workers classes"]  # V_i; rows sum to 1
    rounds: Int[np.ndarray, " workers"]  # K: in which each has taken part
    budget_rows: int  # that the server can take in one iteration
    fewest: int  # workers of a round, m_min
    most: int  # m_max
    # seconds of a round of each worker, by the kinds of exchange after which all wait for the
    # slowest, that of weights first;
    # None: not weighed
    seconds: Float[np.ndarray, "kinds workers"] | None = None
    # nats of divergence below which, where seconds are weighed, a choice is as good as any other
    enough: float = 0.0

    @property
    def reachable(self) -> int:
        """The fewest workers that can be demanded: `fewest`, or as many as fit if even the smallest
        batches exceed the budget.
        """
        fit = int((np.cumsum(np.sort(self.batches)) <= self.budget_rows).sum())
        return min(self.fewest, self.most, fit)


def select(
    search: Search, rng: np.random.Generator, *, population: int = 20, generations: int = 20
) -> Int[np.ndarray, " chosen"]:
    """Workers whose merged labels are closest to the fleet's, ascending; never worse than the
    fittest of `founders`.

    Fitness compares the divergence, then the unused bandwidth, then the indices of the workers;
    smaller is better. With seconds (ours), it compares the divergence above `enough` and then
    `seconds_lost`. The fittest individual always survives.
    """
    members = founders(search, rng, population)
    for _ in range(generations):
        members = members[_ranked(search, members)]  # the fittest first
        children, possible = _repaired(search, _children(members, rng))
        children[~possible] = members[0]
        members = np.concatenate([members[:1], children])
    return np.flatnonzero(members[_ranked(search, members)[0]])


def founders(search: Search, rng: np.random.Generator, population: int) -> Members:
    """The first individuals: of random size, with workers drawn by `priorities` without
    replacement, repaired.

    Priorities count only here and not in the fitness. With seconds, the first individual is drawn
    from the workers with the fastest links, and each further one from more workers, up to all. Such
    founders are needed because single flips do not lead away from slow links: while one slow link
    is in a selection, removing another gains nothing.
    """
    workers = len(search.batches)
    # the largest of log(weight) + Gumbel noise are a draw without replacement with these weights
    keys = np.log(priorities(search.rounds)) + rng.gumbel(size=(population, workers))
    if search.seconds is not None:
        places = search.seconds[0].argsort(kind="stable").argsort()  # from the fastest link on
        keys[places >= workers * np.linspace(REACH, 1, population)[:, None]] = -np.inf
    return _drawn(search, keys, rng)


def any_workers(search: Search, rng: np.random.Generator) -> Int[np.ndarray, " chosen"]:
    """Workers drawn regardless of labels and priorities, ascending, within the same limits; the
    baseline for `select`.
    """
    return np.flatnonzero(_drawn(search, rng.random((1, len(search.batches))), rng)[0])


def fitness(search: Search, members: Members) -> Float[np.ndarray, " individuals"]:
    """The divergence of each individual's merged labels from the mean over all workers; every
    individual must have a member.
    """
    return divergence(merged(members * search.batches, search.labels), reference(search.labels))


def seconds_lost(search: Search, members: Members) -> Float[np.ndarray, " individuals"]:
    """The seconds of the round plus the mean member's waiting in it; 0 if seconds are not weighed.

    Waiting as a share of the round would be small for a selection of slow workers only.
    """
    if search.seconds is None:
        return np.zeros(len(members))
    longest = np.where(members[:, None], search.seconds, 0.0).max(axis=2).sum(axis=1)
    busy = members @ search.seconds.sum(axis=0) / members.sum(axis=1)
    return longest + (longest - busy)


def _drawn(
    search: Search, keys: Float[np.ndarray, "individuals workers"], rng: np.random.Generator
) -> Members:
    """For each individual a random number of workers, those with the highest keys, repaired."""
    individuals, workers = keys.shape
    highest = max(min(search.most, workers), search.reachable)
    sizes = rng.integers(search.reachable, highest + 1, size=(individuals, 1))
    places = np.argsort(np.argsort(-keys, axis=1), axis=1)
    members, possible = _repaired(search, places < sizes)
    if not possible.all():
        members[~possible] = _smallest(search)
    return members


def _smallest(search: Search) -> Bool[np.ndarray, " workers"]:
    """The smallest selection, of the workers with the smallest batches, which always fits."""
    members = np.zeros(len(search.batches), bool)
    members[np.argsort(search.batches, kind="stable")[: search.reachable]] = True
    return members


def _ranked(search: Search, members: Members) -> Int[np.ndarray, " individuals"]:
    """Individuals from the fittest on."""
    unused = search.budget_rows - members @ search.batches
    apart = fitness(search, members)
    if search.seconds is not None:
        apart = np.maximum(apart - search.enough, 0.0)
    return np.lexsort((*~members.T[::-1], unused, seconds_lost(search, members), apart))


def _children(parents: Members, rng: np.random.Generator) -> Members:
    """One child fewer than there are parents, which are sorted by fitness: tournaments, one-point
    crossover, mutation.
    """
    individuals, workers = parents.shape
    drawn = rng.integers(individuals, size=(individuals - 1, 2, TOURNAMENT)).min(axis=2)
    cut = rng.integers(1, max(workers, 2), size=(individuals - 1, 1))
    children = np.where(np.arange(workers) < cut, parents[drawn[:, 0]], parents[drawn[:, 1]])
    return children ^ (rng.random(children.shape) < FLIP)


def _repaired(search: Search, members: Members) -> tuple[Members, Bool[np.ndarray, " individuals"]]:
    """The individuals within the limits, and for which of them that was possible.

    Over the budget or the largest number, the workers with the lowest priority leave first, and of
    equal ones those with the larger batches. Under the smallest number, the workers with the
    highest priority join, if they fit.
    """
    # whom to keep, the first before the others
    order = np.lexsort((search.batches, -priorities(search.rounds)))
    batches, members = search.batches[order], members[:, order]
    # dropping from the end until all fits keeps the longest beginning that fits
    fits = np.cumsum(members * batches, axis=1) <= search.budget_rows
    members = members & fits & (np.cumsum(members, axis=1) <= search.most)
    for _ in range(search.reachable):
        short = members.sum(axis=1) < search.reachable
        room = search.budget_rows - members @ batches
        welcome = ~members & (batches <= room[:, None]) & short[:, None]
        added = np.flatnonzero(welcome.any(axis=1))
        if not len(added):
            break
        members[added, welcome[added].argmax(axis=1)] = True
    repaired = np.empty_like(members)
    repaired[:, order] = members
    return repaired, members.sum(axis=1) >= search.reachable
