"""Scores nets on given rows."""

from collections.abc import Sequence

import torch
from torch import nn

from fedspine.core.task import Arrays
from fedspine.core.tensors import moved
from fedspine.lm.score import Score
from fedspine.nets.net import Net, NetModel

BATCH = 256  # rows at a time


def score_nets(net: Net, models: Sequence[NetModel], data: Arrays) -> list[Score]:
    """Each model on all rows of `data`, one after another."""
    return [_score(net, model.to(net.device), data) for model in models]


def _score(net: Net, model: NetModel, data: Arrays) -> Score:
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for rows in data.batches_by_length(BATCH):
            batch = moved(data.batch(rows), net.device)
            logits = net.logits(model.weights, batch["inputs"])
            loss += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            correct += int((logits.argmax(-1) == batch["labels"]).sum())
    return Score(loss=loss, correct=correct, count=len(data))
