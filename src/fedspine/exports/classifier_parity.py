"""Parity of an exported classifier with the model of the run, and its costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports import bench
from fedspine.exports.card import weight_bytes
from fedspine.exports.load import Loaded, load_model
from fedspine.lm.attention import module_inputs

ROWS = 1000  # compared at most
BATCH = 32  # rows at a time
TOKENS = 128  # of the timed rows, or the model's maximum
REPEATS = 3  # of each timing

APART = 1e-4  # of fp32 logits; rounding reached 1e-5 in MiniLM's six blocks
# in lower precision: the least share of equal predictions, or the largest loss of accuracy, since a
# model with many uncertain rows may predict a few of them differently and be right equally often
EQUAL, LOST = 0.995, 0.005


@dataclass(frozen=True)
class MeasuredExport:
    """What every parity report with measured costs says."""

    rows_from: str  # the source of the rows that both were compared on
    rows: int
    largest_difference: float  # of a logit
    quantize: str
    bytes: int  # of the weights
    latency_seconds: dict[int, float]  # of reading rows; median by batch size, on one thread
    tokens: int | None  # of the timed rows; None for nets, whose rows have one shape
    peak_memory_bytes: int  # of a fresh process that runs both batch sizes

    @property
    def costs(self) -> str:
        """Size, latency and memory, in words."""
        small, large = (1e3 * seconds for _, seconds in sorted(self.latency_seconds.items()))
        tokens = "" if self.tokens is None else f", {self.tokens} tokens"
        return (
            f"{self.bytes / 1e6:.2f} MB; {small:.1f} ms at batch 1 and {large:.1f} ms at batch 32"
            f"{tokens}, one thread, {self.peak_memory_bytes / 1e6:.0f} MB of memory at most"
        )


@dataclass(frozen=True)
class ClassifierParity(MeasuredExport):
    """How an exported classifier differs from its PyTorch source, and its costs."""

    equal_predictions: float  # share of the rows, 0 to 1
    accuracy: float | None  # of the export, 0 to 1; None for unlabelled rows
    accuracy_before: float | None  # of the PyTorch model

    @property
    def line(self) -> str:
        """The report in one line."""
        return (
            f"parity on {self.rows} rows ({self.rows_from}): logits within "
            f"{self.largest_difference:.2g}, {self.equal_predictions:.1%} of predictions equal"
            f"{self._accuracies}; {self.costs}"
        )

    @property
    def _accuracies(self) -> str:
        if self.accuracy is None:
            return ""
        return f", accuracy {self.accuracy:.1%} (before: {self.accuracy_before:.1%})"

    def check(self) -> None:
        """Raise BadInput if the export is outside its tolerance."""
        as_right = self.accuracy is not None and self.accuracy_before - self.accuracy <= LOST
        if self.quantize == "none" and not self.largest_difference <= APART:
            raise BadInput(
                f"the export is off by {self.largest_difference:.2g} in a logit, more than the "
                f"{APART:g} allowed, on {self.rows} rows ({self.rows_from}); take another format"
            )
        if self.quantize != "none" and self.equal_predictions < EQUAL and not as_right:
            raise BadInput(
                f"the {self.quantize} model predicts the same for {self.equal_predictions:.1%} of "
                f"{self.rows} rows ({self.rows_from}){self._accuracies}; {EQUAL:.1%}, or at most "
                f"{100 * LOST} points of accuracy lost, is required: use --quantize none, or give "
                "other rows with --rows"
            )


def parity_of(
    module: nn.Module, place: Path, examples: Examples, rows_from: str, quantize: str = "none"
) -> ClassifierParity:
    """Compare the export in `place` with its PyTorch source on these rows."""
    written = load_model(place, threads=1)
    ours, theirs = _logits_of_both(module, written.module, examples)
    return ClassifierParity(
        rows_from=rows_from,
        rows=len(examples),
        **agreement(ours, theirs, examples.labels),
        quantize=quantize,
        **costs_of(place, written, TOKENS),
    )


def costs_of(place: Path, written: Loaded, tokens: int) -> dict[str, Any]:
    """The cost fields of a parity report: the export in `place` on one thread."""
    tokens = min(tokens, written.max_tokens)
    return {
        "bytes": weight_bytes(place),
        "latency_seconds": bench.latency_seconds(written, tokens=tokens, repeats=REPEATS),
        "tokens": tokens,
        "peak_memory_bytes": bench.peak_memory_bytes(place, tokens=tokens),
    }


def _logits_of_both(
    module: nn.Module, written: nn.Module, examples: Examples
) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [rows, classes] each."""
    batches = list(examples.batches_by_length(BATCH))
    order = np.argsort(np.concatenate(batches))
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with torch.inference_mode():
        for rows in batches:
            inputs = examples.batch(rows)
            del inputs["labels"]
            for each, model in zip(found, (module, written), strict=True):
                each.append(model(**module_inputs(dict(inputs))).logits.numpy())
    return np.concatenate(found[0])[order], np.concatenate(found[1])[order]


def agreement(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> dict[str, float | None]:
    """The fields that compare logits, fp32 [rows, classes]; `ours` are those of PyTorch."""
    before, after = ours.argmax(1), theirs.argmax(1)
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),  # NaN if a logit is NaN
        "equal_predictions": float((before == after).mean()),
        "accuracy": None if labels is None else float((after == labels).mean()),
        "accuracy_before": None if labels is None else float((before == labels).mean()),
    }
