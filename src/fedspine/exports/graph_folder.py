"""What the folders of all graphs of transformers share: the model that is traced, and the
tokenizer, configuration and model card beside the graph.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.exports.card import CONFIG, Card, copy_beside, read_card
from fedspine.exports.load import load_model
from fedspine.exports.loaded import Loaded
from fedspine.exports.signature import IDS, LOGITS, MASK, SEGMENTS, Signature
from fedspine.exports.whole_folder import check_new

TOKENIZER = "tokenizer.json"


class FromTokens(nn.Module):
    """The classifier that is traced: from token ids, mask and, for pairs, segments to logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.module(input_ids=input_ids, attention_mask=attention_mask, **segments).logits


def classifier_signature(*, segments: bool) -> Signature:
    """The signature of `FromTokens`, with `segments` as an input if the graph is to read them."""
    names = (IDS, MASK, SEGMENTS) if segments else (IDS, MASK)
    return Signature(
        inputs=names,
        outputs=(LOGITS,),
        example={name: torch.ones(2, 8, dtype=torch.int64) for name in names},
        free={name: {0: "rows", 1: "tokens"} for name in names},
    )


def opened(source: Path, folder: Path) -> tuple[Loaded, Card]:
    """The model in `source`, to be exported to the new `folder`.

    Raises BadInput if the folder exists, and for a model without a tokenizer.json.
    """
    check_new(folder)
    loaded, card = load_model(source), read_card(source)
    if not (source / TOKENIZER).is_file():
        raise BadInput(
            f"the tokenizer of this model has no {TOKENIZER}, which a device needs; use --format hf"
        )
    return loaded, card


def copy_as_graph(source: Path, partial: Path) -> None:
    """Copy everything but the weights, and mark the configuration as unusable by stock tools."""
    copy_beside(source, partial)
    config = partial / CONFIG
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["fedspine"]["stock"] = False
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def set_up_tokenizer(path: Path, loaded: Loaded) -> None:
    """Make the stored tokenizer truncate and pad rows as the model needs it."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(loaded.max_tokens)
    tokenizer.enable_padding(
        pad_id=loaded.tokenizer.pad_token_id, pad_token=loaded.tokenizer.pad_token
    )
    tokenizer.save(str(path))


def code_for(card: Card, code: str, apart: str) -> str:
    """The lines of a README that run this classifier: `code` reads a text per argument, which is
    changed to a pair per two arguments for pairs; `apart` is for a bi-encoder.
    """
    if card.pooling == "bi-encoder":
        return apart
    if card.kind == "pair":
        return code.replace("sys.argv[2:]", "list(zip(sys.argv[2::2], sys.argv[3::2]))")
    return code
