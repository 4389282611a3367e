"""How close the genetic search comes to the fleet's labels, and how long it takes: `python
benchmarks/genetic.py`.

80 devices of a Dirichlet partition into ten classes, AlexNet's features (16 KB a row) over links of
1 to 30 Mb/s, a budget of 400 rows an iteration, batches up to 64: the prototype of the
reconstruction. Random selection draws as many devices at random and drops some at random to keep
the same budget.
"""

import os
import platform
import time
from dataclasses import replace

import numpy as np

from fedspine.control.batch_sizes import regulate, waiting_share
from fedspine.control.genetic_selection import Search, fitness, select
from fedspine.control.split_parts import LeastWaiting, Regulated, control_of
from fedspine.control.split_plan import Candidates, SplitLimits, plan_split

DEVICES, CLASSES, ROWS = 80, 10, 50_000
FEATURE_BYTES, BUDGET_ROWS, LARGEST = 16_384, 400, 64
WEIGHTS = 1.0  # cost of the exchange of weights, in rows of an iteration
LONGER = control_of(LeastWaiting(), Regulated())
SEEDS, DRAWS = 10, 50  # fleets for each skew, random selections for each fleet
LIMITS = SplitLimits(
    largest_batch=LARGEST,
    feature_bytes=FEATURE_BYTES,
    budget_bytes=BUDGET_ROWS * FEATURE_BYTES,
    fewest=5,
    most=25,
)


def candidates(delta: float, rng: np.random.Generator) -> Candidates:
    """A fleet whose label shares follow Dirichlet(delta) over devices for each class, and unequal
    costs of a row.
    """
    rows = np.stack(
        [
            rng.multinomial(ROWS // CLASSES, rng.dirichlet(np.full(DEVICES, delta)))
            for _ in range(CLASSES)
        ]
    )
    held = rows.T[rows.sum(axis=0) > 0].astype(float)
    compute = rng.uniform(0.1, 1.0, len(held)) * 1e-2
    transfer = 2 * FEATURE_BYTES * 8 / (1e6 * rng.uniform(1, 30, len(held)))
    return Candidates(
        cost=compute + transfer,
        labels=held / held.sum(axis=1, keepdims=True),
        most=held.sum(axis=1).astype(int),
        rounds=rng.integers(0, 5, len(held)),
    )


def at_random(search: Search, size: int, rng: np.random.Generator) -> float:
    """The divergence of `size` workers drawn at random, fewer where the budget is too small for
    them.
    """
    drawn = rng.permutation(len(search.batches))[:size]
    drawn = drawn[np.cumsum(search.batches[drawn]) <= search.budget_rows]
    members = np.zeros((1, len(search.batches)), bool)
    members[0, drawn] = True
    return float(fitness(search, members)[0])


def fleet(delta: float, seed: int) -> list[float]:
    """Of one fleet: devices chosen, milliseconds, divergences, waiting shares and seconds of an
    iteration.
    """
    rng = np.random.default_rng([seed, int(100 * delta)])
    workers = candidates(delta, rng)
    batches = regulate(workers.cost, LARGEST, np.minimum(workers.most, LARGEST))
    search = Search(
        batches, workers.labels, workers.rounds, BUDGET_ROWS, LIMITS.fewest, LIMITS.most
    )
    started = time.perf_counter()
    chosen = select(search, rng)
    searched = time.perf_counter()
    plan = plan_split(workers, LIMITS, rng)
    planned = time.perf_counter()
    weighed = plan_split(replace(workers, weights=WEIGHTS * workers.cost), LIMITS, rng, LONGER)
    weighing = time.perf_counter()
    members = np.isin(np.arange(len(batches)), chosen)[None]
    even = np.full(len(plan.chosen), plan.rows / len(plan.chosen)) * workers.cost[plan.chosen]
    return [
        len(chosen),
        1e3 * (searched - started),
        1e3 * (planned - searched),
        float(np.mean([at_random(search, len(chosen), rng) for _ in range(DRAWS)])),
        float(fitness(search, members)[0]),
        plan.divergence,
        waiting_share(even),
        plan.waiting,
        even.max(),
        float((plan.batches * workers.cost[plan.chosen]).max()),
        1e3 * (weighing - planned),
        weighed.divergence,
        weighed.waiting,
    ]


def main() -> None:
    print(
        f"Means of {SEEDS} fleets of {DEVICES} devices; KL in "
        f"nats; random: {DRAWS} draws of as many devices each."
    )
    print(
        f"One of {os.cpu_count()} cores, numpy {np.__version__}, Python "
        f"{platform.python_version()}.\n"
    )
    print(
        "| delta | devices | search, ms | whole plan, ms | KL random | KL search | KL plan "
        "| waiting share, even batches | as planned | seconds of an iteration, even | as planned "
        "| whole plan that weighs waiting, ms | its KL | its waiting share |"
    )
    print("|" + "---|" * 14)
    slowest = 0.0
    for delta in (1.0, 0.25, 0.1):
        found = np.array([fleet(delta, seed) for seed in range(SEEDS)])
        slowest = max(slowest, found[:, [1, 10]].max())
        cells = zip((1, 1, 1, 3, 4, 4, 2, 3, 2, 2, 1, 4, 3), found.mean(axis=0), strict=True)
        print(f"| {delta} | " + " | ".join(f"{mean:.{digits}f}" for digits, mean in cells) + " |")
    print(f"\nslowest search or weighing plan: {slowest:.0f} ms")


if __name__ == "__main__":
    main()
