"""fedspine itself, by the same entry point as `fedspine run`; training passes are timed inside its
workers.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter, time
from typing import Any

from fedspine.lm import tune
from fedspine.runs.loop import new_run
from fedspine.ui.progress import Silent
from peers.work import Outcome, Precision, Work

# environment: when this process was asked for, seconds since the epoch
SPAWNED = "BENCHMARK_SPAWNED"


class Watch(Silent):
    """Notes when rounds begin and end, and what training had used up by then."""

    def __init__(self, used: Callable[[], float]) -> None:
        self.used, self.started_at = used, 0.0
        self.times: list[float] = []
        self.passes: list[float] = []

    def started(self, rounds: int, title: str, *, done: int = 0) -> None:
        self.started_at = time()
        self._mark()

    def round_done(self, status: Any) -> None:
        self._mark()

    def _mark(self) -> None:
        self.times.append(perf_counter())
        self.passes.append(self.used())


def run(work: Work, precision: Precision, **method: Any) -> Outcome:
    """FedLoRA, or the method named, over the whole work with a worker process per core."""
    workers = len(os.sched_getaffinity(0))
    watch = Watch(_timed_training())
    with tempfile.TemporaryDirectory() as folder:
        summary = new_run(
            work.recipe(precision=precision, workers=workers, **method), Path(folder) / "run", watch
        )
        sparsities = _sparsities(Path(folder) / "run" / "records.jsonl")
    start = watch.started_at - float(os.environ.get(SPAWNED, watch.started_at))
    return Outcome(
        rounds=_differences(watch.times),
        passes=_differences(watch.passes),
        processes=workers,
        accuracy=summary["accuracy_global"],
        notes={"start_seconds": start, "sparsity": sparsities[-1]}
        if sparsities
        else {"start_seconds": start},
    )


def _timed_training() -> Callable[[], float]:
    """Put a stopwatch around local training, which workers inherit; returns what reads the sum of
    all processes.
    """
    total = multiprocessing.get_context("fork").Value("d", 0.0)
    train = tune.train

    def timed(*arguments: Any, **options: Any) -> Any:
        started = perf_counter()
        try:
            return train(*arguments, **options)
        finally:
            with total.get_lock():
                total.value += perf_counter() - started

    for module in [module for name, module in sys.modules.items() if name.startswith("fedspine.")]:
        if getattr(module, "train", None) is train:
            module.train = timed  # type: ignore[attr-defined]
    return lambda: total.value


def _sparsities(records: Path) -> list[float]:
    """The mean sparsity that devices trained at, round by round."""
    by_round: dict[int, list[float]] = {}
    for line in records.read_text().splitlines():
        row = json.loads(line)
        if row["row"] == "note" and "sparsity" in row["values"]:
            by_round.setdefault(row["round"], []).append(row["values"]["sparsity"])
    return [sum(found) / len(found) for _, found in sorted(by_round.items())]


def _differences(marks: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(marks)]
