"""What `fedspine compare` does not say of split learning: where devices wait, and how soon one
method overtakes another.

For each data set and partition of a sweep, a row for each method: means over seeds, ± their
standard deviation. Waiting is that of the mean device for the slowest one of each exchange, over
simulated time: in all exchanges, and without those that carry weights, as the paper of MergeSFL
(arXiv:2311.13348) has it. *In time* is the last check before `run.seconds`, on a part of the test
set; a round that began before goes on, and its model is what is scored in the end. The last column:
simulated seconds of the row's method to its own best accuracy, over those that the best method
takes to the same one, for each seed; checks on the way and the final one count.

    python experiments/split_table.py sweeps/split
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np

from fedspine.ui.compare.numbers import waiting_share
from fedspine.ui.compare.runs import Run, select

STEPS = (
    "step",
    "resize",
    "answer",
)  # how the names of works begin whose exchanges carry no weights
HEADS = (
    "method",
    "final accuracy, %",
    "in time, %",
    "rounds",
    "waiting",
    "in steps",
    "traffic, MB",
    "seconds to own best",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    groups: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in select([parser.parse_args().sweep]).runs:
        groups[", ".join(map(str, (run.settings or {}).values()))][str(run.label)][run.seed] = run
    for title, methods in groups.items():
        accuracy = {
            label: np.mean([run.summary["accuracy"] for run in runs.values()])
            for label, runs in methods.items()
        }
        first, *others = sorted(methods, key=accuracy.__getitem__, reverse=True)
        print(f"\n**{title}**\n")
        print("| " + " | ".join(HEADS) + f", over those of {first} |")
        print("|" + "---|" * len(HEADS))
        for label in (first, *others):
            print(
                "| "
                + " | ".join(
                    [label, *_cells(methods[label], {} if label == first else methods[first])]
                )
                + " |"
            )


def _cells(runs: Mapping[int, Run], rivals: Mapping[int, Run]) -> Iterable[str]:
    summaries = [run.summary for run in runs.values()]
    yield _spread((100 * one["accuracy"] for one in summaries), 1)
    yield _spread((100 * _in_time(run) for run in runs.values()), 1)
    yield _spread((one["rounds"] for one in summaries), 0)
    yield _spread((waiting_share(run) for run in runs.values()), 3)
    yield _spread((_waiting_in_steps(run) for run in runs.values()), 3)
    yield _spread(((one["bytes_up"] + one["bytes_down"]) / 1e6 for one in summaries), 0)
    ratios = [
        _to_best_of(run, run) / _to_best_of(run, rivals[seed])
        for seed, run in runs.items()
        if seed in rivals
    ]
    yield ", ".join("never" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)


def _scores(run: Run) -> list[tuple[float, float]]:
    """Simulated seconds and accuracy of all checks, the final one last."""
    final = run.summary["simulated_seconds"], run.summary["accuracy"]
    return [*zip(run.curve.seconds.tolist(), run.curve.quality.tolist(), strict=True), final]


def _in_time(run: Run) -> float:
    """The accuracy of the last check before the time that the recipe gives; nan where there is
    none.
    """
    return next(
        (accuracy for now, accuracy in reversed(_scores(run)) if now <= run.recipe.run.seconds),
        np.nan,
    )


def _to_best_of(run: Run, other: Run) -> float:
    """Simulated seconds of `other` to the best accuracy of `run`; nan where it never gets there."""
    best = max(accuracy for _, accuracy in _scores(run))
    return min((now for now, accuracy in _scores(other) if accuracy >= best), default=np.nan)


def _waiting_in_steps(run: Run) -> float:
    """The share of the time of exchanges without weights that the mean device waits; nan where
    there are none.
    """
    rows = map(json.loads, (run.folder / "records.jsonl").read_text().splitlines())
    steps = (row for row in rows if row["row"] == "exchange" and row["work"].startswith(STEPS))
    taken = waited = 0.0
    for _, asked in groupby(steps, lambda row: (row["round"], row["started"], row["work"])):
        seconds = np.array([row["seconds"] for row in asked])
        taken += seconds.max()
        waited += seconds.max() - seconds.mean()
    return waited / taken if taken else np.nan


def _spread(values: Iterable[float | None], digits: int) -> str:
    """Mean and standard deviation; nothing where a value is missing."""
    found = np.array(list(values), float)
    if np.isnan(found).any():
        return ""
    spread = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():,.{digits}f}{spread}"


if __name__ == "__main__":
    main()
