"""Export of a language model to a folder for ONNX Runtime: one graph with its key/value cache, so
that each new token is one step, the tokenizer with its chat template, and a report of how near it
is to the PyTorch model.

Inputs and outputs have the names that optimum, transformers.js and onnxruntime-genai use. Positions
follow from the mask inside the graph. Nothing of fedspine is needed to run it.
"""

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports import onnx_graph
from fedspine.exports.card import ONNX, PARITY, Card
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.onnx import calibrating, copy_as_graph, costs_of, facts_of, opened
from fedspine.exports.onnx_graph import FREE, IDS, LOGITS, MASK, PAST, PRESENT, Signature
from fedspine.exports.onnx_numbers import quantise
from fedspine.exports.onnx_parity import APART, EQUAL, costs
from fedspine.exports.token_differences import differences
from fedspine.exports.whole_folder import whole_folder
from fedspine.lm.decoding import Decoding, ends_of, written
from fedspine.lm.dialogues import end_of_answers

ROWS = 32  # to compare on at most; each has many tokens
# logits up to which APART holds; rounding grows with them, and those of real models reach 30
LARGE = 10.0
WORSE = 0.05  # of the perplexity, which does where fewer tokens are equal
CONTINUED, NEW = 4, 16  # prompts that both continue, by so many tokens
TOKENS = 32  # of the rows that are timed; each has logits of the whole vocabulary
STEPS = 8  # that are timed after such a row
GENERATION = "generation_config.json"

# what a device runs; examples/onnx-chat answers dialogues
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


@dataclass(frozen=True)
class Parity:
    """How an exported graph differs from the PyTorch model that it was made of, and its costs.

    Each row is read in two steps, the second with the cache of the first.
    """

    rows_from: str  # what the rows are that both were compared on
    rows: int
    tokens_compared: int  # of these rows, each with its logits
    largest_logit: float  # of the PyTorch model, by size
    largest_difference: float  # of a logit
    relative_difference: float  # root mean square, over that of logits around their mean
    equal_tokens: float  # share of the likeliest next tokens, 0 to 1
    equal_continuations: float  # share of greedy continuations of a few prompts, 0 to 1
    perplexity: float  # of the graph; NaN where no token is predicted
    perplexity_before: float  # of the PyTorch model
    quantize: str
    bytes: int  # of the graph, with its weights
    latency_seconds: dict[int, float]  # of reading rows; median by batch size, on one thread
    tokens: int  # of the rows that were timed
    step_seconds: float  # of one more token after such a row, batch 1
    peak_memory_bytes: int  # of a fresh process that runs both batch sizes

    @property
    def line(self) -> str:
        """The report in one line."""
        return (
            f"parity on {self.tokens_compared:,} tokens of {self.rows} rows ({self.rows_from}): "
            f"logits within {self.largest_difference:.2g}, {self.equal_tokens:.1%} of greedy "
            f"tokens and {self.equal_continuations:.0%} of continuations equal, perplexity "
            f"{self.perplexity:.4g} (before: {self.perplexity_before:.4g}); {costs(self)}, "
            f"{1e3 * self.step_seconds:.1f} ms for a new token"
        )

    def check(self) -> None:
        """Raise BadInput where the graph is outside its tolerance."""
        enough = self.equal_tokens >= EQUAL
        allowed = APART * max(1.0, self.largest_logit / LARGE)
        if self.quantize == "none" and not (self.largest_difference <= allowed and enough):
            raise BadInput(
                f"the ONNX graph is {self.largest_difference:.2g} off in a logit (allowed: "
                f"{allowed:.2g}), and {self.equal_tokens:.1%} of the greedy tokens are equal "
                f"(needed: {EQUAL:.1%}), on {self.rows} rows ({self.rows_from}); use --format hf"
            )
        near = enough or self.perplexity <= (1 + WORSE) * self.perplexity_before
        if self.quantize != "none" and not (isfinite(self.relative_difference) and near):
            raise BadInput(
                f"the {self.quantize} graph has {self.equal_tokens:.1%} of the greedy tokens equal "
                f"and perplexity {self.perplexity:.4g} (before: {self.perplexity_before:.4g}) on "
                f"{self.rows} rows ({self.rows_from}); {EQUAL:.1%}, or a perplexity at most "
                f"{WORSE:.0%} higher, is required: take --quantize none, or name other rows with "
                "--rows"
            )


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
    calibration: Examples | None = None,
) -> Parity:
    """Write the language model that `fedspine.exports.hf.export` wrote to `source` as the new
    `folder`.

    Takes the arguments of `fedspine.exports.onnx.export` and raises what it raises; the tolerances
    are: fp32 logits within 1e-4, or 1e-5 of the largest where that is more, and 99.5 % of the
    greedy tokens equal; else 99.5 % of the greedy tokens equal, or a perplexity that is at most 5 %
    higher.
    """
    source, folder = Path(source), Path(folder)
    loaded, card = opened(source, folder)
    ends = ends_of(
        loaded.tokenizer,
        loaded.module.generation_config,
        end_of_answers(loaded.tokenizer) if card.chat else None,
    )
    with whole_folder(folder) as partial:
        copy_as_graph(source, partial)
        _write_json(partial / GENERATION, {"eos_token_id": ends})
        traced = _Cached(loaded.module)
        onnx_graph.write(traced, partial / ONNX, _signature(loaded.module, card), facts_of(card))
        quantise(partial / ONNX, quantize, calibrating(partial / ONNX, calibration))
        parity = _parity(loaded, partial, examples, ends, rows_from=rows_from, quantize=quantize)
        parity.check()
        _write_json(partial / PARITY, asdict(parity))
        (partial / "README.md").write_text(_readme(card, parity), encoding="utf-8")
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
        # which keeps all of it: a window is the mask's business
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
    rows, tokens, past = 2, 3, 5  # unequal and above 1, so that all stay free
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


# --- parity ---


def _parity(
    loaded: Loaded,
    folder: Path,
    examples: Examples,
    ends: list[int],
    *,
    rows_from: str,
    quantize: str,
) -> Parity:
    graph = load_model(folder, threads=1)
    found = differences(loaded.module, _in_two_steps(graph.module), examples)
    return Parity(
        rows_from=rows_from,
        rows=len(examples),
        tokens_compared=found.pop("tokens"),
        **found,
        equal_continuations=_equal_continuations(loaded, graph.module, examples, ends),
        quantize=quantize,
        **costs_of(folder, graph, TOKENS),
        step_seconds=_step_seconds(graph),
    )


def _in_two_steps(module: nn.Module) -> Any:
    """A function that reads the second half of each row with the cache of the first."""

    def read(input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutputWithPast:
        half = input_ids.shape[1] // 2
        if half == 0:
            return module(input_ids, attention_mask)
        first = module(input_ids[:, :half], attention_mask[:, :half])
        second = module(input_ids[:, half:], attention_mask, first.past_key_values)
        return CausalLMOutputWithPast(logits=torch.cat([first.logits, second.logits], 1))

    return read


def _equal_continuations(
    loaded: Loaded, module: nn.Module, examples: Examples, ends: list[int]
) -> float:
    """The share of prompts, the first halves of a few rows, that both continue the same."""
    rows = np.flatnonzero(examples.lengths)[:CONTINUED]
    prompts = [
        examples.ids[examples.offsets[row] :][: max(1, examples.lengths[row] // 2)].tolist()
        for row in rows
    ]
    continued = [
        written(one, prompts, Decoding(NEW), ends=ends, padding=loaded.tokenizer.pad_token_id)
        for one in (loaded.module, module)
    ]
    return float(np.mean([ours == theirs for ours, theirs in zip(*continued, strict=True)]))


def _step_seconds(graph: Loaded) -> float:
    ids = torch.ones(1, min(TOKENS, graph.max_tokens), dtype=torch.int64)
    cache, seconds = graph.module(ids).past_key_values, []
    for _ in range(STEPS):
        start = perf_counter()
        graph.module(ids[:, :1], past_key_values=cache)
        seconds.append(perf_counter() - start)
    return median(seconds)


def _readme(card: Card, parity: Parity) -> str:
    return f"""---
library_name: onnx
tags: [fedspine, federated-learning, structured-pruning]
---
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as one ONNX graph with a key/value cache.

| | |
|---|---|
| task | {card.kind} |
| numbers | {"fp32" if parity.quantize == "none" else parity.quantize} |
| share of the blocks' weights pruned | {card.sparsity:.1%} |
| key/value heads kept, by layer | {", ".join(map(str, card.heads))} |
| channels kept, by layer | {", ".join(map(str, card.channels))} |
| longest input in training, in tokens | {card.max_tokens} |

Measured when it was written (`{PARITY}`): {parity.line}.

`{IDS}` [rows, tokens] are new tokens, `{MASK}` [rows, past and new tokens] is 1 where a token
counts, and `{PAST}.N.key` and `.value` [rows, heads, past tokens, width] are what `{PRESENT}.N.key`
and `.value` were in the step before; at first they have no token. `{GENERATION}` lists the tokens
that end a text. With `onnxruntime` and `tokenizers` alone:

```python
{CODE}```
"""
