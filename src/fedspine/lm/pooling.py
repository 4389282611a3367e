"""The readout of a text classifier: the mean of the tokens through one linear layer, or the
architecture's own head.

"mean" is `transformers`' stock token classifier whose logits are averaged over the tokens of a row.
The mean of token logits is the linear layer of the mean token, so a stock class loads what is
exported. "cls" is the stock sequence classifier: BERT's pooler over the first token, RoBERTa's two
layers, a decoder's last token.
"""

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.hub import cached_file

from fedspine.lm.prunable_layout import unit_map

Pooling: TypeAlias = Literal["mean", "cls"]

HOW = (
    "The logits of a text are the mean of its tokens' logits: "
    "`mask = inputs.attention_mask[..., None]; (logits * mask).sum(1) / mask.sum(1)`."
)
# the stock class of each; None: a language model, which has no task head
CLASSES: dict[Pooling | None, Any] = {
    "mean": AutoModelForTokenClassification,
    "cls": AutoModelForSequenceClassification,
    None: AutoModelForCausalLM,
}
READOUTS: dict[Pooling, str] = {
    "mean": "the mean of the tokens through one linear layer",
    "cls": "the model's own classification head",
}
SENTENCE_POOLING = "1_Pooling/config.json"  # of sentence-transformers


def reading(module: nn.Module, pooling: Pooling | None) -> nn.Module:
    """The module that computes the logits of rows, around one of the pooling's stock class."""
    return MeanPooled(module) if pooling == "mean" else module


class MeanPooled(nn.Module):
    """A token classifier whose logits are averaged over the tokens of each row."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def forward(
        self, attention_mask: Int[Tensor, "rows tokens"] | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """`logits` fp32 [rows, classes]; a row of no token has zeros. Without a mask all tokens
        count.
        """
        logits = self.module(attention_mask=attention_mask, **inputs).logits.float()
        if attention_mask is None:
            return SequenceClassifierOutput(logits=logits.mean(1))
        return SequenceClassifierOutput(logits=mean_of_tokens(logits, attention_mask))


def mean_of_tokens(
    values: Float[Tensor, "rows tokens width"], mask: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows width"]:
    """The mean over the tokens that `mask` marks with 1."""
    weights = mask.to(values.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    return (weights[:, None, :] @ values).squeeze(1)


def pooling_of(source: str, config: Any) -> Pooling:
    """The readout for which the model in folder or Hub id `source` was trained.

    sentence-transformers states its pooling in `1_Pooling`. A checkpoint that was saved as a
    sequence classifier keeps its head, and a decoder reads its last token. Every other encoder
    takes the mean.
    """
    if stated := _stated(source):
        return stated
    saved_as = (config.architectures or [""])[0]
    own_head = saved_as.endswith("ForSequenceClassification")
    return "cls" if own_head or unit_map(config.model_type).decoder else "mean"


def _stated(source: str) -> Pooling | None:
    if Path(source).is_dir():
        path = Path(source) / SENTENCE_POOLING
    else:
        found = cached_file(
            source,
            SENTENCE_POOLING,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = Path(found or "")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if said.get("pooling_mode_mean_tokens"):
        return "mean"
    return "cls" if said.get("pooling_mode_cls_token") else None
