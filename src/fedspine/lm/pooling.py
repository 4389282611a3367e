"""The readout of a text classifier: the mean of the tokens through one linear layer, the
architecture's own head, or of a pair the two means of two passes.

"mean" is `transformers`' stock token classifier whose logits are averaged over the tokens of a row.
The mean of token logits is the linear layer of the mean token, so a stock class loads what is
exported. "cls" is the stock sequence classifier: BERT's pooler over the first token, RoBERTa's two
layers, a decoder's last token.

"bi-encoder" is what sentence-embedding models are made for: one linear layer on [u, v, |u - v|] of
the means u and v of the tokens of the two texts of a pair, each read for itself (Sentence-BERT,
Reimers and Gurevych 2019, arXiv:1908.10084, "Classification Objective Function"). The two passes
are one: both texts lie in one row, neither sees the other, and each has positions of its own.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Pooling, TaskKind
from fedspine.lm.prunable_layout import unit_map

HOW = (
    "The logits of a text are the mean of its tokens' logits: "
    "`mask = inputs.attention_mask[..., None]; (logits * mask).sum(1) / mask.sum(1)`."
)
# the stock class of each; None: a language model, which has no task head
CLASSES: dict[Pooling | None, str] = {
    "mean": "AutoModelForTokenClassification",
    "cls": "AutoModelForSequenceClassification",
    "bi-encoder": "AutoModelForTokenClassification",  # whose head is replaced: `built`
    None: "AutoModelForCausalLM",
}
READOUTS: dict[Pooling, str] = {
    "mean": "the mean of the tokens through one linear layer",
    "cls": "the model's own classification head",
    "bi-encoder": "each text of a pair for itself, [u, v, |u - v|] of their means through one "
    "linear layer",
}
HEAD = "classifier"  # the linear layer behind the backbone of an encoder's token classifier
PARTS = 3  # of what the head reads: u, v and their distance
SENTENCE_POOLING = "1_Pooling/config.json"  # of sentence-transformers


def stock_class(pooling: Pooling | None) -> Any:
    """The class of transformers for a pooling."""
    import transformers  # takes seconds, which a list of methods need not wait for

    return getattr(transformers, CLASSES[pooling])


def _output(logits: Tensor) -> Any:
    """What a stock sequence classifier returns."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits)


def built(module: nn.Module, pooling: Pooling | None) -> nn.Module:
    """A module of the pooling's stock class with the head that the pooling needs."""
    return with_wide_head(module) if pooling == "bi-encoder" else module


def reading(module: nn.Module, pooling: Pooling | None) -> nn.Module:
    """The module that computes the logits of rows, around one that is `built` for the pooling."""
    match pooling:
        case "mean":
            return MeanPooled(module)
        case "bi-encoder":
            return BiEncoder(module)
    return module


class MeanPooled(nn.Module):
    """A token classifier whose logits are averaged over the tokens of each row."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def forward(
        self, attention_mask: Int[Tensor, "rows tokens"] | None = None, **inputs: Any
    ) -> Any:
        """`logits` fp32 [rows, classes]; a row of no token has zeros. Without a mask all tokens
        count.
        """
        logits = self.module(attention_mask=attention_mask, **inputs).logits.float()
        if attention_mask is None:
            return _output(logits.mean(1))
        return _output(mean_of_tokens(logits, attention_mask))


class BiEncoder(nn.Module):
    """A stock token classifier with a wide head, read as a bi-encoder.

    `token_type_ids` is 0 for the tokens of a row's first text and 1 for those of its second; the
    backbone itself sees texts of type 0.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, module.config
        embeddings = _backbone(module).get_submodule(unit_map(module.config.model_type).embeddings)
        padding = embeddings.position_embeddings.padding_idx
        # RoBERTa counts positions from the one after its padding id on
        self._first = 0 if padding is None else padding + 1

    def forward(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows tokens"] | None = None,
        token_type_ids: Int[Tensor, "rows tokens"] | None = None,
    ) -> Any:
        """`logits` fp32 [rows, classes]; the mean of a text of no token is zero. Without a mask all
        tokens count, and without types all are of the first text.
        """
        inputs = self.backbone_inputs(input_ids, attention_mask, token_type_ids)
        hidden = _backbone(self.module)(**inputs).last_hidden_state.float()
        first, second = _text_masks(input_ids, attention_mask, token_type_ids)
        u, v = mean_of_tokens(hidden, first), mean_of_tokens(hidden, second)
        head = self.module.get_submodule(HEAD)
        return _output(head(torch.cat([u, v, (u - v).abs()], -1)).float())

    def backbone_inputs(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows tokens"] | None = None,
        token_type_ids: Int[Tensor, "rows tokens"] | None = None,
    ) -> dict[str, Any]:
        """What the backbone is called with: an additive mask fp32 [rows, 1, tokens, tokens] that
        separates the texts, and positions that begin anew with the second.
        """
        first, second = _text_masks(input_ids, attention_mask, token_type_ids)
        places = torch.where(second > 0, second.cumsum(1), first.cumsum(1))
        of_text = first + 2 * second  # 0: padding, which sees itself alone
        apart = of_text[:, None, :, None] != of_text[:, None, None, :]
        mask = apart * torch.finfo(torch.float32).min
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": self._first + (places - 1).clamp_min(0),
        }


def _text_masks(ids: Tensor, mask: Tensor | None, types: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 for the tokens of the first text, and for those of the second; int64 [rows, tokens]."""
    mask = torch.ones_like(ids) if mask is None else mask
    second = torch.zeros_like(ids) if types is None else types * mask
    return mask - second, second


def with_wide_head(module: nn.Module) -> nn.Module:
    """A stock token classifier whose head reads u, v and |u - v|; the head is new."""
    narrow = module.get_submodule(HEAD)
    wide = nn.Linear(
        PARTS * narrow.in_features,
        narrow.out_features,
        device=narrow.weight.device,
        dtype=narrow.weight.dtype,
    )
    module.set_submodule(HEAD, wide)
    return module


def _backbone(module: nn.Module) -> nn.Module:
    return module.get_submodule(module.base_model_prefix)


def mean_of_tokens(
    values: Float[Tensor, "rows tokens width"], mask: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows width"]:
    """The mean over the tokens that `mask` marks with 1."""
    weights = mask.to(values.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    return (weights[:, None, :] @ values).squeeze(1)


def readout_of(
    pooling: Pooling | Literal["auto"], source: str, config: Any, kind: TaskKind
) -> Pooling | None:
    """The readout of a model for this kind of task, None for language modelling.

    Raises BadInput where the task or the model cannot be read so.
    """
    if kind == "causal-lm":
        return None
    readout = (
        pooling_of(source, config, bi_encoder=kind == "pair") if pooling == "auto" else pooling
    )
    if readout == "bi-encoder" and kind != "pair":
        raise BadInput(
            f'task.pooling is "bi-encoder", which reads pairs, but task.kind is "{kind}"; set it '
            'to "mean", or name the column of the second text as task.pair'
        )
    if readout == "bi-encoder" and unit_map(config.model_type).decoder:
        raise BadInput(
            f'task.pooling is "bi-encoder", which needs an encoder, but the model is a decoder '
            f'({config.model_type}); set it to "mean" or "cls"'
        )
    return readout


def pooling_of(source: str, config: Any, *, bi_encoder: bool = False) -> Pooling:
    """The readout for which the model in folder or Hub id `source` was trained.

    sentence-transformers states its pooling in `1_Pooling`; an encoder that was trained on means of
    single texts reads pairs, as a `bi_encoder` where the caller can have one. A checkpoint that
    was saved as a sequence classifier keeps its head, and a decoder reads its last token. Every
    other encoder takes the mean.
    """
    decoder = unit_map(config.model_type).decoder
    if stated := _stated_pooling(source):
        return "bi-encoder" if bi_encoder and stated == "mean" and not decoder else stated
    saved_as = (config.architectures or [""])[0]
    own_head = saved_as.endswith("ForSequenceClassification")
    return "cls" if own_head or decoder else "mean"


def _stated_pooling(source: str) -> Pooling | None:
    if Path(source).is_dir():
        path = Path(source) / SENTENCE_POOLING
    else:
        from transformers.utils.hub import cached_file

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
