"""Run the recipes of this folder over seeds and variants, and write one table: `python
experiments/real_data.py --help`.

Every finished run is kept as one line of results/real_data.jsonl and is not run again; delete the
line to repeat it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from fedspine.lm.score import score
from fedspine.runs.assemble import assemble
from fedspine.runs.config import load
from fedspine.runs.loop import new_run
from fedspine.ui.progress import progress_for

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real_data.jsonl"
TABLE = HERE / "results" / "real_data.md"
DENSE = ["method.name=fedlora", "method.rank=8"]
PLAN: dict[
    str, dict[str, list[str]]
] = {  # recipe: variants by name, each a list of settings laid over the recipe
    "trec6": {"FedLoRA": DENSE, "FedSpine 0.5": []},
    "ag_news": {"FedLoRA": DENSE, "FedSpine 0.5": []},
    "mrpc": {"FedLoRA": DENSE, "FedSpine 0.5": []},
    "pydoc_topics": {"FedSpine 0.5": ["run.final_devices=16"], "FedLoRA": DENSE},
    "tinystories": {
        "FedLoRA": DENSE,
        "FedSpine 0.3": ["method.sparsity=0.3"],
        "FedSpine 0.5": ["method.sparsity=0.5"],
    },
}
SPINE_ONLY = (
    "sparsity",
    "ranks",
    "controller",
    "importance",
    "global_importance_weight",
    "until",
    "head_start",
)  # fields that FedLoRA does not have, or had not when this was measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder that holds ag_news, trec6, mrpc, tinystories",
    )
    parser.add_argument("--models", type=Path, required=True, help="folder that holds stories260k")
    parser.add_argument("--only", nargs="*", choices=list(PLAN), default=list(PLAN))
    parser.add_argument(
        "--variants", nargs="*", help="only variants whose name starts with one of these"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.only:
            for variant, settings in PLAN[name].items():
                if arguments.variants and not variant.startswith(tuple(arguments.variants)):
                    continue
                if (name, variant, seed) not in {
                    (row["recipe"], row["variant"], row["seed"]) for row in rows()
                }:
                    one(name, variant, settings, seed, arguments)
                    TABLE.write_text(table(rows()))


def one(
    name: str, variant: str, settings: list[str], seed: int, arguments: argparse.Namespace
) -> None:
    """Run one recipe in one variant and append its summary."""
    recipe = recipe_for(name, settings, seed, arguments)
    print(f"{name}, {variant}, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        summary = new_run(recipe, Path(folder) / "run", progress_for(json=False))
    named = {
        "recipe": name,
        "variant": variant,
        "commit": commit(),
        "loss_before": loss_before(recipe),
    }
    # where data and model lay says nothing of the result
    row = summary | named | {"data": name, "model": Path(recipe.task.model).name}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def recipe_for(name: str, settings: list[str], seed: int, arguments: argparse.Namespace) -> Any:
    """The recipe with its local data and model filled in; the embedded job where the file holds
    only a remark.
    """
    if name == "pydoc_topics":
        return load(None, settings, seed)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        tables = tomllib.loads((HERE / f"{name}.toml").read_text())
        if settings is DENSE:
            for key in SPINE_ONLY:
                tables["method"].pop(key, None)
        file.write(tomli_w.dumps(tables))
        file.flush()
        local = [f"task.data={arguments.data / name}"]
        if name == "tinystories":
            local.append(f"task.model={arguments.models / 'stories260k'}")
        return load(Path(file.name), [*settings, *local], seed)


def loss_before(recipe: Any) -> float:
    """Mean loss on the test set before any training, with the head as it starts."""
    torch.set_num_threads(1)
    task = assemble(recipe).task
    state = recipe.method.start(task, np.random.default_rng(recipe.run.seed))
    return score(task.base, recipe.method.unpruned(state), task.test).mean_loss


def rows() -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def table(found: list[dict[str, Any]]) -> str:
    """Means over seeds with their standard deviation, one line per recipe and variant."""
    lines = [
        f"Commits {', '.join(sorted({row['commit'] for row in found}))}; {os.cpu_count()} cores, "
        f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}. Mean and "
        "standard deviation over seeds. *Deployed*: mean over the device models scored, *global*: "
        "one model pruned by averaged scores, *dense*: the same adapter on the unpruned base, for "
        "which it was not tuned. Accuracy in %, loss in nats per token; seconds are simulated. "
        "*FedSpine*: the paper's form, but for the fleet's weight in what is pruned.",
        "",
        (
            "| recipe | method | seeds | sparsity | before "
            "| deployed | global | dense | simulated s | MB up |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["recipe"], row["variant"]) for row in found):
        group = [row for row in found if (row["recipe"], row["variant"]) == key]
        language = group[0]["kind"] == "causal-lm"
        marks = (
            ("loss", "loss_global", "loss_dense")
            if language
            else ("accuracy", "accuracy_global", "accuracy_dense")
        )
        cells = [
            spread(group, mark, 1 if language else 100, 3 if language else 1) for mark in marks
        ]
        before = spread(group, "loss_before", 1, 3) if language else "-"
        lines.append(
            f"| {key[0]} | {key[1]} | {', '.join(str(row['seed']) for row in group)} "
            f"| {spread(group, 'sparsity', 1, 3)} | {before} | {' | '.join(cells)} "
            f"| {spread(group, 'simulated_seconds', 1, 0)} "
            f"| {spread(group, 'bytes_up', 1e-6, 0)} |"
        )
    return "\n".join(lines) + "\n"


def spread(group: list[dict[str, Any]], name: str, factor: float, digits: int) -> str:
    values = [factor * row[name] for row in group]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()


def processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
