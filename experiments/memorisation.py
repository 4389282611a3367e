"""What a sweep's models remember of the rows that they were trained on.

    python experiments/memorisation.py sweeps/privacy

For each run with `task.train_rows`: how well the loss of the global model tells the rows of the
devices from the other training rows, as the area under the curve (AUC; 0.5: not at all), with
accuracy and the largest epsilon that a device spent; mean and standard deviation over seeds. The
attack is that of Yeom et al. 2018 (arXiv:1709.01604). Since the sample is random, a model that was
trained on none of the rows has 0.5 on average. What was measured is kept in `memorisation.json`
beside the runs and not repeated.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import nn

from fedspine.core.process import keep_freed_memory
from fedspine.data.dataset import Rows
from fedspine.exports.of_run import RunModel, open_run
from fedspine.lm.tokens import tokens
from fedspine.runs.read_data import dataset

BATCH = 64
MOST = 1500  # rows of each kind that are scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="the folder of the sweep")
    sweep = parser.parse_args().sweep
    kept = sweep / "memorisation.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[tuple[str, ...], list[tuple[float, float, float]]] = defaultdict(list)
    for place in sorted((sweep / "cells").glob("*/summary.json")):
        name, data, epsilon, _ = place.parent.name.split("--")
        if place.parent.name not in known:
            summary = json.loads(place.read_text(encoding="utf-8"))
            spent = summary["privacy"]["epsilon_spent"].values()
            auc = told_apart(open_run(place.parent))
            known[place.parent.name] = 100 * summary["accuracy"], auc, max(spent, default=0.0)
            kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print(place.parent.name, *known[place.parent.name], flush=True)
        found[data, name, epsilon.removeprefix("epsilon=")].append(known[place.parent.name])
    print("\n| data | method | epsilon | accuracy | AUC | spent | seeds |")
    print("|---|---|---|---|---|---|---|")
    for (data, name, epsilon), runs in sorted(found.items()):
        mean, spread = np.mean(runs, 0), np.std(runs, 0, ddof=1) if len(runs) > 1 else np.zeros(3)
        print(
            f"| {data} | {name} | {epsilon} | {mean[0]:.1f} ± {spread[0]:.1f} | "
            f"{mean[1]:.3f} ± {spread[1]:.3f} | {mean[2]:.2f} | {len(runs)} |"
        )


def told_apart(run: RunModel) -> float:
    """The AUC of the loss of the global model, for the rows that were drawn against the others."""
    section = run.recipe.task.model_copy(update={"train_rows": 0})
    whole = replace(run.recipe, task=section)
    drawn, everything = dataset(run.recipe).train, dataset(whole).train
    known = set(zip(drawn.texts, drawn.labels.tolist(), strict=True))
    rest = [
        i
        for i, row in enumerate(zip(everything.texts, everything.labels.tolist(), strict=True))
        if row not in known
    ]
    rng = np.random.default_rng(0)
    inside, outside = (
        losses(run, rows.take(np.sort(rng.permutation(len(rows))[:MOST])))
        for rows in (drawn, everything.take(np.array(rest)))
    )
    return float(mannwhitneyu(outside, inside).statistic / len(inside) / len(outside))


def losses(run: RunModel, rows: Rows) -> np.ndarray:
    """Cross-entropy of each row under the global model, nats, float64 [rows]."""
    section = run.recipe.task
    data = tokens(run.tokenizer, rows, section.kind, section.max_tokens, scored=True)
    found, model = [], run.model("global")
    with torch.inference_mode():
        module = run.base.fit(model)
        for start in range(0, len(data), BATCH):
            inputs = data.batch(np.arange(start, min(start + BATCH, len(data))))
            labels = inputs.pop("labels")
            logits = module(**inputs).logits.float()
            found.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(found).double().numpy()


if __name__ == "__main__":
    main()
