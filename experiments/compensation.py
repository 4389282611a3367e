"""What closed-form compensation gives back when units go: one model, tuned whole, pruned once by
`blend`, then tuned on.

When units go, what they gave the layer's output is fitted by what stays: the weights of the output
projection change by W_gone C and its bias by the rest, with C the ridge regression of the gone
columns' inputs on the kept ones (as in ZipLM, arXiv:2302.04089, and SlimGPT, arXiv:2412.18110), or
the mean of what is gone goes into the bias alone (as in FLAP, arXiv:2312.11983). Inputs are those
of the tuned model on some training rows: of all devices, or no more than one device holds. No
federation. Prints a table's rows and appends them to `results/compensation.jsonl`.

    python experiments/compensation.py --data DATA --sets trec6 --seeds 0 1 2
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from importance import (
    AGAIN,
    SPARSITIES,
    TRACKED,
    all_rows,
    measured,
    tracked_scores,
    tuned_whole,
)
from jaxtyping import Float
from torch import Tensor

from fedspine.core.task import Examples, Task
from fedspine.lm.base import Base, Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.score import score
from fedspine.lm.structure import Structure, cut_adapter, full, kept_columns, shrink
from fedspine.lm.tune import tune

RESULTS = Path(__file__).parent / "results" / "compensation.jsonl"
ALL, ONE_DEVICE = 1500, 80  # rows that inputs are read from
WAYS = (
    ("none", 0, 0.0),
    ("mean", ONE_DEVICE, 0.0),
    ("fitted", ONE_DEVICE, 0.03),
    ("fitted", ALL, 0.01),
)
Slices = dict[str, tuple[Tensor, Tensor | None]]


def main() -> None:
    measured(__doc__, RESULTS, compared)


def compared(task: Task, seed: int):
    """A row for the whole model, and one for each sparsity and way."""
    layout, rng = task.base.layout, np.random.default_rng(seed)
    whole = tuned_whole(task, rng, seed)
    yield {
        "way": "unpruned",
        "sparsity": 0.0,
        "accuracy": score(task.base, whole, task.test).accuracy,
    }
    scores = tracked_scores(task, whole, TRACKED["blend"], seed)
    order = rng.permutation(len(task.train))
    moments = {
        rows: second_moments(task.base, whole, task.train, order[:rows])
        for rows in (ONE_DEVICE, ALL)
    }
    for sparsity in SPARSITIES:
        structure = shrink(
            layout,
            full(layout),
            (scores.heads, scores.channels),
            sparsity=sparsity,
            target=sparsity,
        )
        pruned = replace(
            whole, structure=structure, adapter=cut_adapter(whole.adapter, layout.sites, structure)
        )
        for way, rows, ridge in WAYS:
            base = (
                task.base
                if way == "none"
                else Compensated(task.base, whole, structure, moments[rows], ridge, way)
            )
            at_once = score(base, pruned, task.test).accuracy
            tuned = tune(replace(all_rows(task, seed), base=base), pruned, AGAIN).model
            recovered = score(base, tuned, task.test).accuracy
            yield {
                "way": way,
                "rows": rows,
                "sparsity": sparsity,
                "at_once": at_once,
                "accuracy": recovered,
            }


class Compensated:
    """A base whose slices of one structure are compensated; everything else is the base's own."""

    def __init__(
        self,
        base: Base,
        whole: Model,
        structure: Structure,
        moments: dict[str, Tensor],
        ridge: float,
        way: str,
    ) -> None:
        self._base = base
        self._slices: Slices = {
            site.path: base.slice(site.path, structure) for site in base.layout.sites
        }
        for site in base.layout.sites:
            if site.column_units:
                weight = base.weights[site.path][0].float()
                weight = (
                    weight
                    + whole.scale
                    * whole.adapter[b_name(site.path)]
                    @ whole.adapter[a_name(site.path)]
                )
                kept = kept_columns(site, structure)
                found = compensation(
                    weight, kept, moments[site.path], ridge if way == "fitted" else None
                )
                self._slices[site.path] = tuple(
                    (old.float() + change).to(old.dtype)
                    for old, change in zip(self._slices[site.path], found, strict=True)
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def fit(self, model: Model, *, merge: bool = False):
        original = self._base._sliced
        self._base._sliced = lambda structure: self._slices
        try:
            return self._base.fit(model, merge=merge)
        finally:
            self._base._sliced = original


def second_moments(
    base: Base, model: Model, data: Examples, rows: np.ndarray
) -> dict[str, Float[Tensor, "n n"]]:
    """Mean of z z^T over tokens, z the inputs of an output projection and a one behind them, by
    path.
    """
    sums: dict[str, Tensor] = {}
    module, counted = base.fit(model), torch.tensor([])

    def record_input(path: str, x: Tensor) -> None:
        tokens = torch.cat([x.flatten(0, 1)[counted].float(), torch.ones(int(counted.sum()), 1)], 1)
        sums[path] = sums.get(path, 0) + tokens.T @ tokens

    hooks = [
        module.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, path=site.path: record_input(path, args[0])
        )
        for site in base.layout.sites
        if site.column_units
    ]
    with torch.no_grad():
        for some in np.array_split(rows, -(-len(rows) // 64)):
            inputs = data.batch(some)
            counted = inputs["attention_mask"].flatten().bool()
            module(**{name: value for name, value in inputs.items() if name != "labels"})
    for hook in hooks:
        hook.remove()
    return {path: total / total[-1, -1] for path, total in sums.items()}


def compensation(
    weight: Float[Tensor, "rows columns"],
    kept: Tensor,
    moments: Float[Tensor, "n n"],
    ridge: float | None,
) -> tuple[Float[Tensor, "rows kept"], Float[Tensor, " rows"]]:
    """What is added to the kept columns and to the bias; without a `ridge` the mean goes into the
    bias alone.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    if ridge is None:
        return torch.zeros(len(weight), len(kept)), weight[:, gone] @ moments[:-1][gone, -1]
    known = torch.cat([kept, torch.tensor([weight.shape[1]])])  # the kept inputs, and the one
    gram = moments[known][:, known]
    damping = ridge * gram.diagonal()[:-1].mean() * torch.ones(len(known))
    damping[-1] = 0.0
    fit = torch.linalg.solve(gram + damping.diag(), moments[:-1][gone][:, known].T)
    change = weight[:, gone] @ fit.T
    return change[:, :-1], change[:, -1]


if __name__ == "__main__":
    main()
