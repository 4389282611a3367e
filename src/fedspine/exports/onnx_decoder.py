"""Export of a language model to a folder for ONNX Runtime: one graph with its key/value cache, so
that each new token is one step, the tokenizer with its chat template, and a parity report against
the PyTorch model.

Inputs and outputs have the names that optimum, transformers.js and onnxruntime-genai use. The graph
derives positions from the mask. It runs without fedspine.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fedspine.core.task import Examples
from fedspine.exports import onnx_graph
from fedspine.exports.card import ONNX, Card
from fedspine.exports.decoder_parity import ROWS, DecoderParity, ends_in, parity_of
from fedspine.exports.graph_folder import copy_as_graph
from fedspine.exports.onnx import calibration_feeds, facts_of, opened_for_onnx
from fedspine.exports.onnx_graph import FREE, PAST, PRESENT
from fedspine.exports.onnx_numbers import quantise
from fedspine.exports.parity import write_parity
from fedspine.exports.provenance import front_matter, rows_of
from fedspine.exports.signature import IDS, LOGITS, MASK, Signature
from fedspine.exports.whole_folder import whole_folder

__all__ = ["ROWS", "export"]

GENERATION = "generation_config.json"

# the code for a device; examples/onnx-chat answers dialogues
CODE = """\
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, text = Path(sys.argv[1]), sys.argv[2]
ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
outputs = [o.name.replace("present", "past_key_values") for o in session.get_outputs()]
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
caches = [i for i in session.get_inputs() if i.name.startswith("past")]
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type]) for i in caches}
ids = tokenizer.encode(text).ids
new = ids
for _ in range(40):
    mask = np.ones((1, len(ids)), np.int64)
    found = session.run(None, {"input_ids": np.array([new]), "attention_mask": mask} | past)
    logits, *caches = found
    past = dict(zip(outputs[1:], caches, strict=True))
    new = [int(logits[0, -1].argmax())]
    if new[0] in ends:
        break
    ids += new
print(tokenizer.decode(ids))
"""


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
    calibration: Examples | None = None,
) -> DecoderParity:
    """Write the language model that `fedspine.exports.hf.export` wrote to `source` as the new
    `folder`.

    Takes the arguments of `fedspine.exports.onnx.export` and raises what it raises. The tolerance
    in fp32 is logits within 1e-4, or 1e-5 of the largest if that is more, and 99.5 % of the greedy
    tokens equal; otherwise 99.5 % of the greedy tokens equal, or a perplexity at most 5 % higher.
    """
    source, folder = Path(source), Path(folder)
    loaded, card = opened_for_onnx(source, folder)
    ends = ends_in(loaded)
    with whole_folder(folder) as partial:
        copy_as_graph(source, partial)
        _write_json(partial / GENERATION, {"eos_token_id": ends})
        traced = _Cached(loaded.module)
        onnx_graph.write(traced, partial / ONNX, _signature(loaded.module, card), facts_of(card))
        quantise(partial / ONNX, quantize, calibration_feeds(partial / ONNX, calibration))
        parity = parity_of(loaded.module, partial, examples, rows_from, quantize, ends)
        card_text = _readme(card, quantize, write_parity(parity, partial))
        (partial / "README.md").write_text(card_text, encoding="utf-8")
    return parity


class _Cached(nn.Module):
    """The module that is traced: from token ids, mask and caches to logits and longer caches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        # it keeps every token; a sliding window is applied by the mask
        cache = DynamicCache()
        for i, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, i)
        places = (attention_mask.cumsum(1) - 1).clamp_min(0)
        found = self.module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=places[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, [(one.keys, one.values) for one in found.past_key_values.layers]


def _signature(module: nn.Module, card: Card) -> Signature:
    rows, tokens, past = 2, 3, 5  # distinct and above 1, so that all stay dynamic
    width = module.model.layers[0].self_attn.head_dim
    names = [f"{i}.{part}" for i in range(len(card.heads)) for part in ("key", "value")]
    cache = [tuple(torch.zeros(2, rows, heads, past, width)) for heads in card.heads]
    return Signature(
        inputs=(IDS, MASK, *(f"{PAST}.{name}" for name in names)),
        outputs=(LOGITS, *(f"{PRESENT}.{name}" for name in names)),
        example={
            IDS: torch.ones(rows, tokens, dtype=torch.int64),
            MASK: torch.ones(rows, past + tokens, dtype=torch.int64),
            PAST: cache,
        },
        free={
            IDS: {0: "rows", 1: "tokens"},
            MASK: {0: "rows", 1: f"{FREE} + tokens"},
            PAST: [({0: "rows", 2: FREE},) * 2] * len(card.heads),
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _readme(card: Card, quantize: str, measured: str) -> str:
    return f"""{front_matter("onnx", card.provenance)}
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as one ONNX graph with a key/value cache.

| | |
|---|---|
| task | {card.kind} |
{rows_of(card.provenance)}| numbers | {"fp32" if quantize == "none" else quantize} |
{card.rows}
{measured}`{IDS}` [rows, tokens] are new tokens, `{MASK}` [rows, past and new tokens] is 1 where a
token counts, and `{PAST}.N.key` and `.value` [rows, heads, past tokens, width] are what
`{PRESENT}.N.key` and `.value` were in the step before; at first they have no token. `{GENERATION}`
lists the tokens that end a text. With `onnxruntime` and `tokenizers` alone:

```python
{CODE}```
"""
