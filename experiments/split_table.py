"""What `fedspine compare` does not say of split learning: where devices wait, and how soon one method overtakes another.

For each data set and partition of a sweep, a row for each method: means over seeds, ± their standard deviation. Waiting is
that of the mean device for the slowest one of each exchange, over simulated time: in all exchanges, and without those that
carry weights, as the paper of MergeSFL (arXiv:2311.13348) has it. *In time* is the last check before `run.seconds`, on a part
of the test set; a round that began before goes on, and its model is what is scored in the end. The last column: simulated
seconds of the row's method to its own best accuracy, over those that the best method takes to the same one, for each seed;
checks on the way and the final one count.

    python experiments/split_table.py sweeps/split
"""

import argparse
import json
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

STEPS = ("step", "resize", "answer")  # how the names of works begin whose exchanges carry no weights


@dataclass(frozen=True)
class Run:
    """One finished cell of a sweep."""

    folder: Path

    @cached_property
    def cell(self) -> dict[str, Any]:
        return json.loads((self.folder / "cell.json").read_text())

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "records.jsonl").read_text().splitlines()]

    @property
    def scores(self) -> list[tuple[float, float]]:
        """Simulated seconds and accuracy of all checks."""
        return [(row["now"], row["accuracy"]) for row in self.rows if row["row"] == "score"]

    @property
    def in_time(self) -> float:
        """The accuracy of the last check before the time that the recipe gives; 0 where there is none."""
        limit = tomllib.loads((self.folder / "recipe.toml").read_text())["run"]["seconds"]
        return max(((now, accuracy) for now, accuracy in self.scores if now <= limit), default=(0.0, 0.0))[1]

    @property
    def waiting(self) -> tuple[float, float]:
        """The share of the time that the mean device waits: in all exchanges, and in those of features alone."""
        taken, waited = np.zeros(2), np.zeros(2)
        exchanges = (row for row in self.rows if row["row"] == "exchange")
        for (_, _, work), asked in groupby(exchanges, lambda row: (row["round"], row["started"], row["work"])):
            seconds = np.array([row["seconds"] for row in asked])
            counts = np.array([True, work.startswith(STEPS)])
            taken += counts * seconds.max()
            waited += counts * (seconds.max() - seconds.mean())
        shares = np.divide(waited, taken, out=np.full(2, np.nan), where=taken > 0)
        return float(shares[0]), float(shares[1])

    def seconds_to(self, accuracy: float) -> float:
        """Simulated seconds to the first check that is as good; nan where none is."""
        return min((now for now, reached in self.scores if reached >= accuracy), default=np.nan)

    @property
    def best(self) -> float:
        return max(accuracy for _, accuracy in self.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    groups: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(parser.parse_args().sweep.glob("cells/*/summary.json")):
        cell = (run := Run(file.parent)).cell
        groups[", ".join(map(str, cell["settings"].values()))][cell["label"]][cell["seed"]] = run
    for title, methods in groups.items():
        first, *others = sorted(
            methods, key=lambda label: -_mean(run.summary["accuracy"] for run in methods[label].values())
        )
        heads = (
            "method",
            "final accuracy, %",
            "in time, %",
            "rounds",
            "waiting",
            "in steps",
            "traffic, MB",
            "seconds to own best",
        )
        print(f"\n**{title}**\n")
        print("| " + " | ".join(heads) + f", over those of {first} |")
        print("|" + "---|" * len(heads))
        for label in (first, *others):
            print("| " + " | ".join([label, *_cells(methods[label], {} if label == first else methods[first])]) + " |")


def _cells(runs: dict[int, Run], rivals: dict[int, Run]) -> Iterable[str]:
    summaries = [run.summary for run in runs.values()]
    yield _spread((100 * one["accuracy"] for one in summaries), 1)
    yield _spread((100 * run.in_time for run in runs.values()), 1)
    yield _spread((one["rounds"] for one in summaries), 0)
    for shares in zip(*(run.waiting for run in runs.values()), strict=True):
        yield "" if np.isnan(shares).any() else _spread(shares, 3)
    yield _spread(((one["bytes_up"] + one["bytes_down"]) / 1e6 for one in summaries), 0)
    ratios = [
        runs[seed].seconds_to(runs[seed].best) / rivals[seed].seconds_to(runs[seed].best)
        for seed in runs
        if seed in rivals
    ]
    yield ", ".join("never" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _spread(values: Iterable[float], digits: int) -> str:
    found = np.array(list(values), float)
    spread = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():,.{digits}f}{spread}"


if __name__ == "__main__":
    main()
