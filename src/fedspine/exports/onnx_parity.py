"""How near an ONNX graph of a classifier is to the PyTorch model it was made of, and its costs."""

from dataclasses import dataclass

import numpy as np

from fedspine.core.errors import BadInput

APART = 1e-4  # of fp32 logits; rounding came to 1e-5 in MiniLM's six blocks
# where the numbers are smaller, so many predictions must be equal, or so little accuracy be lost:
# a model that is often unsure answers otherwise in a few rows and is right as often
EQUAL, LOST = 0.995, 0.005


@dataclass(frozen=True)
class Parity:
    """How an exported graph differs from the PyTorch model that it was made of, and its costs."""

    rows_from: str  # what the rows are that both were compared on
    rows: int
    largest_difference: float  # of a logit
    equal_predictions: float  # share of the rows, 0 to 1
    accuracy: float | None  # of the graph, 0 to 1; None for rows without labels
    accuracy_before: float | None  # of the PyTorch model
    quantize: str
    bytes: int  # of the graph, with its weights
    latency_seconds: dict[int, float]  # median by batch size, on one thread
    tokens: int | None  # of the rows that were timed; None for nets, whose rows have one shape
    peak_memory_bytes: int  # of a fresh process that runs both batch sizes

    @property
    def line(self) -> str:
        """The report in one line."""
        return (
            f"parity on {self.rows} rows ({self.rows_from}): logits within "
            f"{self.largest_difference:.2g}, {self.equal_predictions:.1%} of predictions equal"
            f"{self._accuracies}; {costs(self)}"
        )

    @property
    def _accuracies(self) -> str:
        if self.accuracy is None:
            return ""
        return f", accuracy {self.accuracy:.1%} (before: {self.accuracy_before:.1%})"

    def check(self) -> None:
        """Raise BadInput where the graph is outside its tolerance."""
        as_right = self.accuracy is not None and self.accuracy_before - self.accuracy <= LOST
        if self.quantize == "none" and not self.largest_difference <= APART:
            raise BadInput(
                f"the ONNX graph is {self.largest_difference:.2g} off in a logit, more than the "
                f"{APART:g} allowed, on {self.rows} rows ({self.rows_from}); use --format hf"
            )
        if self.quantize != "none" and self.equal_predictions < EQUAL and not as_right:
            raise BadInput(
                f"the {self.quantize} graph predicts the same for {self.equal_predictions:.1%} of "
                f"{self.rows} rows ({self.rows_from}){self._accuracies}; {EQUAL:.1%}, or at most "
                f"{100 * LOST} points of accuracy lost, is required: take --quantize none, or name "
                "other rows with --rows"
            )


def costs(parity: object) -> str:
    """Size, latency and memory of a parity report, in words."""
    small, large = (1e3 * seconds for _, seconds in sorted(parity.latency_seconds.items()))
    tokens = "" if parity.tokens is None else f", {parity.tokens} tokens"
    return (
        f"{parity.bytes / 1e6:.2f} MB; {small:.1f} ms at batch 1 and {large:.1f} ms at batch 32"
        f"{tokens}, one thread, {parity.peak_memory_bytes / 1e6:.0f} MB of memory at most"
    )


def agreement(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> dict[str, float | None]:
    """The fields of a `Parity` that compare logits, fp32 [rows, classes]; `ours` are PyTorch's."""
    before, after = ours.argmax(1), theirs.argmax(1)
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),  # NaN if there is one
        "equal_predictions": float((before == after).mean()),
        "accuracy": None if labels is None else float((after == labels).mean()),
        "accuracy_before": None if labels is None else float((before == labels).mean()),
    }
