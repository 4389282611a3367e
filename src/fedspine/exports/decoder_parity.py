"""Parity of an exported language model with the model of the run, and its costs."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports.classifier_parity import APART, EQUAL, MeasuredExport, costs_of
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.token_differences import differences
from fedspine.lm.decoding import Decoding, ends_of, written
from fedspine.lm.dialogues import end_of_answers

ROWS = 32  # compared at most; each has many tokens
# logits up to which APART applies; rounding grows with them, and those of real models reach 30
LARGE = 10.0
WORSE = 0.05  # share by which perplexity may be higher where fewer tokens are equal
CONTINUED, NEW = 4, 16  # prompts that both models continue, and the tokens of each continuation
TOKENS = 32  # of the timed rows; each token has logits of the whole vocabulary
STEPS = 8  # timed after such a row


@dataclass(frozen=True)
class DecoderParity(MeasuredExport):
    """How an exported language model differs from its source, and its costs.

    Each row is read in two steps, the second with the cache of the first.
    """

    tokens_compared: int  # of these rows, each with its logits
    largest_logit: float  # of the PyTorch model, in magnitude
    relative_difference: float  # root mean square, over that of logits around their mean
    equal_tokens: float  # share of equal greedy next tokens, 0 to 1
    equal_continuations: float  # share of equal greedy continuations of a few prompts, 0 to 1
    perplexity: float  # of the export; NaN if no token is predicted
    perplexity_before: float  # of the PyTorch model
    step_seconds: float  # of one more token after such a row, batch 1

    @property
    def line(self) -> str:
        """The report in one line."""
        return (
            f"parity on {self.tokens_compared:,} tokens of {self.rows} rows ({self.rows_from}): "
            f"logits within {self.largest_difference:.2g}, {self.equal_tokens:.1%} of greedy "
            f"tokens and {self.equal_continuations:.0%} of continuations equal, perplexity "
            f"{self.perplexity:.4g} (before: {self.perplexity_before:.4g}); {self.costs}, "
            f"{1e3 * self.step_seconds:.1f} ms for a new token"
        )

    def check(self) -> None:
        """Raise BadInput if the export is outside its tolerance."""
        enough = self.equal_tokens >= EQUAL
        allowed = APART * max(1.0, self.largest_logit / LARGE)
        if self.quantize == "none" and not (self.largest_difference <= allowed and enough):
            raise BadInput(
                f"the export is off by {self.largest_difference:.2g} in a logit (allowed: "
                f"{allowed:.2g}), and {self.equal_tokens:.1%} of the greedy tokens are equal "
                f"(needed: {EQUAL:.1%}), on {self.rows} rows ({self.rows_from}); take another "
                "format"
            )
        near = enough or self.perplexity <= (1 + WORSE) * self.perplexity_before
        if self.quantize != "none" and not (isfinite(self.relative_difference) and near):
            raise BadInput(
                f"the {self.quantize} model has {self.equal_tokens:.1%} of the greedy tokens equal "
                f"and perplexity {self.perplexity:.4g} (before: {self.perplexity_before:.4g}) on "
                f"{self.rows} rows ({self.rows_from}); {EQUAL:.1%}, or a perplexity at most "
                f"{WORSE:.0%} higher, is required: use --quantize none, or give other rows with "
                "--rows"
            )


def parity_of(
    module: nn.Module,
    place: Path,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
    ends: list[int] | None = None,
) -> DecoderParity:
    """Compare the export in `place` with its PyTorch source on these rows; `ends` are the tokens
    that end a text, None: those of the export.
    """
    exported = load_model(place, threads=1)
    if ends is None:
        ends = ends_in(exported)
    found = differences(module, _in_two_steps(exported.module), examples)
    return DecoderParity(
        rows_from=rows_from,
        rows=len(examples),
        tokens_compared=found.pop("tokens"),
        **found,
        equal_continuations=_equal_continuations(module, exported, examples, ends),
        quantize=quantize,
        **costs_of(place, exported, TOKENS),
        step_seconds=_step_seconds(exported),
    )


def ends_in(exported: Loaded) -> list[int]:
    """The tokens that end a text, of an exported model that PyTorch runs."""
    tokenizer, settings = exported.tokenizer, exported.module.generation_config
    return ends_of(tokenizer, settings, end_of_answers(tokenizer) if exported.chat else None)


def _in_two_steps(module: nn.Module) -> Any:
    """A function that reads the second half of each row with the cache of the first."""

    def read(input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutputWithPast:
        half = input_ids.shape[1] // 2
        if half == 0:
            return module(input_ids=input_ids, attention_mask=attention_mask)
        first = module(input_ids=input_ids[:, :half], attention_mask=attention_mask[:, :half])
        second = module(
            input_ids=input_ids[:, half:],
            attention_mask=attention_mask,
            past_key_values=first.past_key_values,
        )
        return CausalLMOutputWithPast(logits=torch.cat([first.logits, second.logits], 1))

    return read


def _equal_continuations(
    module: nn.Module, exported: Loaded, examples: Examples, ends: list[int]
) -> float:
    """The share of the prompts of a few rows that both models continue alike."""
    rows = np.flatnonzero(examples.lengths)[:CONTINUED]
    prompts = [examples.prompt(row).tolist() for row in rows]
    continued = [
        written(one, prompts, Decoding(NEW), ends=ends, padding=exported.tokenizer.pad_token_id)
        for one in (module, exported.module)
    ]
    return float(np.mean([ours == theirs for ours, theirs in zip(*continued, strict=True)]))


def _step_seconds(exported: Loaded) -> float:
    ids = torch.ones(1, min(TOKENS, exported.max_tokens), dtype=torch.int64)
    cache, seconds = exported.module(input_ids=ids).past_key_values, []
    for _ in range(STEPS):
        start = perf_counter()
        exported.module(input_ids=ids[:, :1], past_key_values=cache)
        seconds.append(perf_counter() - start)
    return median(seconds)
