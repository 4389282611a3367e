"""How much the logits of two language models differ, token by token."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fedspine.core.task import IGNORED, Examples
from fedspine.lm.attention import module_inputs

BATCH = 4  # rows at a time, since a large vocabulary has many logits


def differences(
    module: Callable[..., Any], written: Callable[..., Any], examples: Examples
) -> dict[str, float]:
    """`module` is the PyTorch model, and `written` the model exported from it; both map inputs to
    logits as transformers models do.

    Returns `tokens`, `largest_logit` of `module`, `largest_difference`, `relative_difference` (root
    mean square, over that of logits around their mean), `equal_tokens` (share of the likeliest next
    tokens, 0 to 1), `perplexity` of `written` and `perplexity_before` (NaN if no token is
    predicted).
    """
    largest, logit, apart, spread = 0.0, 0.0, 0.0, 0.0
    tokens, equal, predicted, losses = 0, 0, 0, [0.0, 0.0]
    with torch.inference_mode():
        for rows in examples.batches_by_length(BATCH):
            inputs = examples.batch(rows)
            labels, real = inputs.pop("labels"), inputs["attention_mask"].bool()
            ours, theirs = (
                each(**module_inputs(dict(inputs))).logits for each in (module, written)
            )
            a, b = ours[real], theirs[real]
            # unlike max(), this keeps NaN
            largest = float(torch.maximum(torch.tensor(largest), (a - b).abs().max()))
            logit = max(logit, float(a.abs().max()))
            apart += float((a - b).square().sum(dtype=torch.float64))
            spread += float((a - a.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
            tokens += len(a)
            equal += int((a.argmax(-1) == b.argmax(-1)).sum())
            predicted += int((labels[:, 1:] != IGNORED).sum())
            for i, logits in enumerate((theirs, ours)):
                losses[i] += _loss(logits, labels)
    # gives infinity where math.exp would raise
    after, before = torch.tensor(losses, dtype=torch.float64).div(predicted).exp().tolist()
    return {
        "tokens": tokens,
        "largest_logit": logit,
        "largest_difference": largest,
        "relative_difference": sqrt(apart / spread) if spread else float("nan"),
        "equal_tokens": equal / tokens,
        "perplexity": after,
        "perplexity_before": before,
    }


def _loss(logits: Tensor, labels: Tensor) -> float:
    """The sum over the labels, in nats."""
    return float(
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    )
