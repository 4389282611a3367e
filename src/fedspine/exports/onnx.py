"""Export to a folder for ONNX Runtime: one graph from token ids to class logits, its tokenizer and
its labels, and a report of how near it is to the PyTorch model.

The readout is part of the graph. Nothing of fedspine is needed to run it, as the README.md in the
folder shows.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports import onnx_graph
from fedspine.exports.bench import latency_seconds
from fedspine.exports.card import CONFIG, ONNX, PARITY, WEIGHTS, Card, read_card
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.whole_folder import check_new, whole_folder

TOKENIZER = "tokenizer.json"
APART = 1e-4  # of fp32 logits; rounding came to 1e-5 in MiniLM's six blocks
# where the numbers are smaller, so many predictions must be equal, or so little accuracy be lost:
# a model that is often unsure answers otherwise in a few rows and is right as often
EQUAL, LOST = 0.995, 0.005
ROWS = 1000  # to compare on at most
BATCH = 32  # rows at a time
TOKENS = 128  # of the rows that are timed, or as many as the model was trained to read
REPEATS = 3  # of each timing

# what a device runs; examples/onnx-classify has the same
CODE = """\
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), sys.argv[2:]
labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {i.name: np.array([getattr(r, parts[i.name]) for r in rows]) for i in session.get_inputs()}
(logits,) = session.run(["logits"], inputs)
for text, label in zip(texts, logits.argmax(1), strict=True):
    print(labels[str(label)], text, sep="\\t")
"""


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
    tokens: int  # of the rows that were timed

    @property
    def line(self) -> str:
        """The report in one line."""
        small, large = (1e3 * seconds for _, seconds in sorted(self.latency_seconds.items()))
        return (
            f"parity on {self.rows} rows ({self.rows_from}): logits within "
            f"{self.largest_difference:.2g}, {self.equal_predictions:.1%} of predictions equal"
            f"{self._accuracies}; {self.bytes / 1e6:.2f} MB; {small:.1f} ms at batch 1 and "
            f"{large:.1f} ms at batch 32, {self.tokens} tokens, one thread"
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


class _Logits(nn.Module):
    """The module that is traced: from `onnx_graph.INPUTS` to a tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.module(input_ids=input_ids, attention_mask=attention_mask, **segments).logits


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
) -> Parity:
    """Write the classifier that `fedspine.exports.hf.export` wrote to `source` as the new `folder`.

    `examples` are the rows to compare both on, and `rows_from` says what they are; `quantize` is a
    key of `onnx_graph.QUANTISERS`. The folder appears at once and complete. Raises BadInput where
    it exists, for a model of more than 2 GB or without a tokenizer.json, and for a graph that is
    outside its tolerance: fp32 logits within 1e-4; else 99.5 % of the predictions equal, or of
    rows with labels at most 0.5 points of accuracy lost.
    """
    onnx_graph.check_installed()
    source, folder = Path(source), Path(folder)
    check_new(folder)
    loaded, card = load_model(source), read_card(source)
    if 4 * loaded.parameters > onnx_graph.MOST_BYTES:
        raise BadInput(
            f"{loaded.parameters:,} parameters in fp32 do not fit into one ONNX file of 2 GB; use "
            "--format hf"
        )
    with whole_folder(folder) as partial:
        _copy(source, partial)
        _settle_tokenizer(partial / TOKENIZER, loaded)
        segments = examples.segments is not None
        onnx_graph.write(_Logits(loaded.module), partial / ONNX, segments=segments)
        onnx_graph.quantise(partial / ONNX, quantize)
        parity = _parity(loaded, partial, examples, rows_from, quantize)
        parity.check()
        (partial / PARITY).write_text(json.dumps(asdict(parity), indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_readme(card, parity), encoding="utf-8")
    return parity


def _copy(source: Path, partial: Path) -> None:
    for file in source.iterdir():
        if file.name not in (WEIGHTS, "README.md"):
            shutil.copyfile(file, partial / file.name)
    config = partial / CONFIG
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["fedspine"]["stock"] = False
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settle_tokenizer(path: Path, loaded: Loaded) -> None:
    """Let the stored tokenizer cut and fill rows by itself, as the model needs it."""
    if not path.is_file():
        raise BadInput(
            f"the tokenizer of this model has no {TOKENIZER}, which a device needs; use --format hf"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(loaded.max_tokens)
    tokenizer.enable_padding(
        pad_id=loaded.tokenizer.pad_token_id, pad_token=loaded.tokenizer.pad_token
    )
    tokenizer.save(str(path))


# --- parity ---


def _parity(
    loaded: Loaded, folder: Path, examples: Examples, rows_from: str, quantize: str
) -> Parity:
    written = load_model(folder, threads=1)
    ours, theirs = _logits_of_both(loaded.module, written.module, examples)
    before, after, labels = ours.argmax(1), theirs.argmax(1), examples.labels
    tokens = min(TOKENS, loaded.max_tokens)
    return Parity(
        rows_from=rows_from,
        rows=len(examples),
        largest_difference=float(np.abs(ours - theirs).max()),  # NaN if there is one
        equal_predictions=float((before == after).mean()),
        accuracy=None if labels is None else float((after == labels).mean()),
        accuracy_before=None if labels is None else float((before == labels).mean()),
        quantize=quantize,
        bytes=(folder / ONNX).stat().st_size,
        latency_seconds=latency_seconds(written, tokens=tokens, threads=1, repeats=REPEATS),
        tokens=tokens,
    )


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
                each.append(model(**inputs).logits.numpy())
    return np.concatenate(found[0])[order], np.concatenate(found[1])[order]


def _readme(card: Card, parity: Parity) -> str:
    code = CODE
    if card.kind == "pair":
        code = CODE.replace("sys.argv[2:]", "list(zip(sys.argv[2::2], sys.argv[3::2]))")
    return f"""---
library_name: onnx
tags: [fedspine, federated-learning, structured-pruning]
---
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as one ONNX graph: token ids in, class logits
out.

| | |
|---|---|
| task | {card.kind}: {", ".join(card.labels)} |
| numbers | {"fp32" if parity.quantize == "none" else parity.quantize} |
| share of the blocks' weights pruned | {card.sparsity:.1%} |
| heads kept, by layer | {", ".join(map(str, card.heads))} |
| channels kept, by layer | {", ".join(map(str, card.channels))} |
| longest input, in tokens | {card.max_tokens} |

Measured when it was written (`{PARITY}`): {parity.line}.

`{TOKENIZER}` cuts and fills rows by itself. With `onnxruntime` and `tokenizers` alone:

```python
{code}```
"""
