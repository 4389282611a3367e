"""What a unit's importance should be read from: one model, tuned whole, pruned once by each
criterion, then tuned on.

No federation: all rows in one place, so that nothing but the criterion differs. Prints a table and
appends its rows to
`results/importance.jsonl`.

    python experiments/importance.py --data DATA --sets pydoc-topics trec6 --seeds 0 1 2
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.core.device import Device
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.importance import Scores, magnitude_scores, random_scores
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.lora import fresh
from fedspine.lm.score import score
from fedspine.lm.structure import cut_adapter, full, shrink
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning
from fedspine.runs import config
from fedspine.runs.assemble import assemble

RESULTS = Path(__file__).parent / "results" / "importance.jsonl"
TRACKED = {
    "gradient": Scoring(of="gradient"),
    "gradient, cross 1": Scoring(of="gradient", cross=1.0),
    "gradient, square": Scoring(of="gradient", square=True),
    "gradient, normalise": Scoring(of="gradient", normalise=True),
    "activation": Scoring(of="activation"),
    "gate": Scoring(of="gate"),
    "blend": Scoring(of="blend"),
}
SPARSITIES = (0.5, 0.75, 0.9)
TUNING = Tuning(steps=400, batch=16, learning_rate=1.5e-3, head_learning_rate=4.5e-3)
LISTENING = 30  # steps in which importance is read, at a tenth of the learning rate
AGAIN = replace(TUNING, steps=60, learning_rate=7.5e-4, head_learning_rate=2.25e-3)  # after pruning


def main() -> None:
    measured(__doc__, RESULTS, compared)


def measured(
    doc: str, results: Path, compared: Callable[[Task, int], Iterable[dict[str, Any]]]
) -> None:
    """Print and append what `compared` gives for every set and seed on the command line."""
    arguments = argparse.ArgumentParser(description=doc.splitlines()[0])
    arguments.add_argument(
        "--data", type=Path, help="folder that holds the sets which are not built in"
    )
    arguments.add_argument("--sets", nargs="+", default=["pydoc-topics"])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    for name in chosen.sets:
        for seed in chosen.seeds:
            for row in compared(task_of(name, chosen.data, seed), seed):
                row = {"data": name, "seed": seed, **row}
                print(json.dumps(row), flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def task_of(name: str, folder: Path | None, seed: int) -> Task:
    """Three layers of MiniLM on a built-in set or one in the folder, texts of 32 tokens."""
    data = name if folder is None or not (folder / name).exists() else str(folder / name)
    kind = "pair" if name in ("mrpc", "rte") else "classification"
    settings = [
        f"task.data={data}",
        f"task.kind={kind}",
        "task.layers=3",
        "task.max_tokens=32",
        "method.name=fedlora",
        "run.precision=fp32",
        f"run.seed={seed}",
    ]
    return assemble(config.load(None, settings)).task


def compared(task: Task, seed: int):
    """A row for the whole model, and one for each sparsity and criterion."""
    layout, rng = task.base.layout, np.random.default_rng(seed)
    whole = tuned_whole(task, rng, seed)
    yield {
        "criterion": "none",
        "sparsity": 0.0,
        "accuracy": score(task.base, whole, task.test).accuracy,
    }
    known = {name: tracked_scores(task, whole, scoring, seed) for name, scoring in TRACKED.items()}
    known["magnitude"] = magnitude_scores(task.base, whole)
    known["random"] = random_scores(layout, full(layout), np.random.default_rng(seed))
    for sparsity in SPARSITIES:
        for criterion, scores in known.items():
            pair = (scores.heads, scores.channels)
            structure = shrink(layout, full(layout), pair, sparsity=sparsity, target=sparsity)
            pruned = replace(
                whole,
                structure=structure,
                adapter=cut_adapter(whole.adapter, layout.sites, structure),
            )
            at_once = score(task.base, pruned, task.test).accuracy
            tuned = tune(all_rows(task, seed), pruned, AGAIN).model
            recovered = score(task.base, tuned, task.test).accuracy
            yield {
                "criterion": criterion,
                "sparsity": sparsity,
                "at_once": at_once,
                "accuracy": recovered,
            }


def tuned_whole(task: Task, rng: np.random.Generator, seed: int) -> Model:
    """The unpruned model with an adapter of rank 8 and a head, tuned on all rows."""
    layout = task.base.layout
    adapter = fresh(layout.sites, 8, rng)
    start = Model(
        structure=full(layout), adapter=adapter, head=task.base.initial_head(rng), scale=2.0
    )
    return tune(all_rows(task, seed), start, TUNING).model


def tracked_scores(task: Task, model: Model, scoring: Scoring, seed: int) -> Scores:
    """Importance tracked over a few slow steps, whose training is thrown away."""
    slow = replace(TUNING, steps=LISTENING, learning_rate=1.5e-4, head_learning_rate=4.5e-4)
    scores = tune(all_rows(task, seed), model, slow, scoring=scoring).scores
    assert scores is not None
    return scores


def all_rows(task: Task, seed: int) -> Device:
    return Device(
        id="all", data=task.train, base=task.base, memory={}, rng=np.random.default_rng(seed)
    )


if __name__ == "__main__":
    main()
