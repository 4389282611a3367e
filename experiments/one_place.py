"""What a model learns where all rows lie in one place: the ceiling of a federated run.

Whole fine-tuning, LoRA on all projections and a linear head on the frozen base, by stock
transformers and PEFT under the readout of the federated runs, with as many training rows as
`where_lost.toml` gives its devices together (24 rounds of 5 devices, each 10 steps of 16 rows).
Prints a row for each and appends it to `results/one_place.jsonl`.

    python experiments/one_place.py --data DATA --sets pydoc-topics sst2 trec6 mrpc --seeds 0 1 2
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from importance import measured
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fedspine.core.task import Examples, Task
from fedspine.lm.load import locate
from fedspine.lm.pooling import built, reading, stock_class

RESULTS = Path(__file__).parent / "results" / "one_place.jsonl"
STEPS, BATCH, LAYERS = 1200, 16, 3
HEAD = 3.0  # the head's rate as a multiple of the model's, as in the federated runs
RATES = {"whole": (5e-5, 1e-4, 2e-4), "lora": (1e-3, 3e-3), "head": (3e-3, 1e-2)}
LARGEST = 1500  # test rows


def compared(task: Task, seed: int) -> Iterable[dict[str, Any]]:
    for how, rates in RATES.items():
        for rate in rates:
            torch.manual_seed(seed)
            model = trained(task, how, rate, np.random.default_rng(seed))
            yield {"how": how, "learning_rate": rate, "accuracy": accuracy(model, task)}


def trained(task: Task, how: str, rate: float, rng: np.random.Generator) -> nn.Module:
    pooling = task.base.pooling  # read as in the federated runs, pairs as two texts
    module = built(
        stock_class(pooling).from_pretrained(
            locate("minilm"), num_hidden_layers=LAYERS, num_labels=len(task.label_names)
        ),
        pooling,
    )
    backbone, head = module.base_model, module.classifier
    backbone.requires_grad_(how == "whole")
    if how == "lora":
        inject_adapter_in_model(
            LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), backbone
        )
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    model = reading(module, pooling).train(how == "whole")
    body = [p for p in backbone.parameters() if p.requires_grad]
    groups = [{"params": head.parameters(), "lr": HEAD * rate}]
    if body:
        groups.append({"params": body, "lr": rate})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.1 if how == "lora" else 0.01)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / STEPS)
    for rows in batches(task.train, rng):
        inputs = task.train.batch(rows)
        labels = inputs.pop("labels")
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        falling.step()
    return model.eval()


def batches(data: Examples, rng: np.random.Generator) -> Iterable[np.ndarray]:
    """Rows of each step: whole passes over shuffled rows, one after another."""
    waiting = np.empty(0, np.int64)
    for _ in range(STEPS):
        while len(waiting) < BATCH:
            waiting = np.concatenate([waiting, rng.permutation(len(data))])
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    data, right = task.test, 0
    count = min(len(data), LARGEST)
    for begin in range(0, count, 100):
        inputs = data.batch(np.arange(begin, min(begin + 100, count)))
        labels = inputs.pop("labels")
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / count


if __name__ == "__main__":
    measured(__doc__, RESULTS, compared)
