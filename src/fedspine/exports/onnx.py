"""Export to a folder for ONNX Runtime: one graph from token ids to class logits, its tokenizer and
its labels, and a parity report against the PyTorch model.

The readout is part of the graph. It runs without fedspine, as the README.md in the folder shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports import onnx_graph
from fedspine.exports.card import ONNX, Card
from fedspine.exports.classifier_parity import ROWS, ClassifierParity, parity_of
from fedspine.exports.graph_folder import (
    TOKENIZER,
    FromTokens,
    classifier_signature,
    code_for,
    copy_as_graph,
    opened,
    set_up_tokenizer,
)
from fedspine.exports.loaded import Loaded
from fedspine.exports.onnx_graph import Graph
from fedspine.exports.onnx_numbers import Feeds, quantise
from fedspine.exports.parity import write_parity
from fedspine.exports.provenance import front_matter, rows_of
from fedspine.exports.whole_folder import whole_folder

__all__ = ["ROWS", "export", "write_graph"]

BATCH = 32  # rows at a time

# the code for a device; examples/onnx-classify has the same
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

# the same for a bi-encoder: the two texts of each pair are truncated and padded separately
CODE_APART = """\
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), sys.argv[2:]
labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
sides = [tokenizer.encode_batch(texts[side::2]) for side in (0, 1)]
inputs = {
    "input_ids": np.hstack([[row.ids for row in side] for side in sides]),
    "attention_mask": np.hstack([[row.attention_mask for row in side] for side in sides]),
    "token_type_ids": np.hstack([[[i] * len(row) for row in sides[i]] for i in (0, 1)]),
}
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
(logits,) = session.run(["logits"], inputs)
for text, other, label in zip(texts[::2], texts[1::2], logits.argmax(1), strict=True):
    print(labels[str(label)], text, other, sep="\\t")
"""


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
    calibration: Examples | None = None,
) -> ClassifierParity:
    """Write the classifier that `fedspine.exports.hf.export` wrote to `source` as the new `folder`.

    `examples` are the rows to compare both on, and `rows_from` says where they come from;
    `quantize` is a key of `onnx_numbers.QUANTISERS`, and `calibration` the rows that `int8-static`
    needs. The folder appears only when it is complete. Raises BadInput if it exists, for a model of
    more than 2 GB or without a tokenizer.json, and for a graph outside its tolerance: in fp32,
    logits within 1e-4; else 99.5 % of the predictions equal or, with labels, at most 0.5 points of
    accuracy lost.
    """
    source, folder = Path(source), Path(folder)
    loaded, card = opened_for_onnx(source, folder)
    with whole_folder(folder) as partial:
        copy_as_graph(source, partial)
        set_up_tokenizer(partial / TOKENIZER, loaded)
        segments = examples.segments is not None
        write_graph(loaded.module, partial / ONNX, segments=segments, facts=facts_of(card))
        quantise(partial / ONNX, quantize, calibration_feeds(partial / ONNX, calibration))
        parity = parity_of(loaded.module, partial, examples, rows_from, quantize)
        card_text = _readme(card, quantize, write_parity(parity, partial))
        (partial / "README.md").write_text(card_text, encoding="utf-8")
    return parity


def write_graph(
    module: nn.Module, path: Path, *, segments: bool, facts: Mapping[str, str] | None = None
) -> None:
    """Write a stock classifier, or a module with its interface, as an fp32 graph; with `segments`
    the graph reads these, too. Raises BadInput for a module that cannot be exported.
    """
    onnx_graph.write(FromTokens(module), path, classifier_signature(segments=segments), facts)


# --- shared by all graphs of transformers ---


def opened_for_onnx(source: Path, folder: Path) -> tuple[Loaded, Card]:
    """The model in `source`, to be exported to the new `folder`; raises what `export` raises."""
    onnx_graph.check_installed()
    loaded, card = opened(source, folder)
    if 4 * loaded.parameters > onnx_graph.MOST_BYTES:
        raise BadInput(
            f"{loaded.parameters:,} parameters in fp32 exceed the 2 GB of an ONNX file; use "
            "--format hf"
        )
    return loaded, card


def facts_of(card: Card) -> dict[str, str]:
    """The metadata of the graph."""
    facts = {"name": card.name, "task": card.kind, "max_tokens": str(card.max_tokens)}
    return facts | ({"labels": json.dumps(card.labels)} if card.labels else {})


def calibration_feeds(graph: Path, rows: Examples | None) -> Feeds:
    """Every input of the graph for these rows, in batches of rows of similar length."""
    if rows is None or not len(rows):
        return ()
    reader, feeds = Graph(graph), []
    for chosen in rows.batches_by_length(BATCH):
        inputs = {name: tensor.numpy() for name, tensor in rows.batch(chosen).items()}
        feeds.append(reader.given(inputs))
    return feeds


def _readme(card: Card, quantize: str, measured: str) -> str:
    return f"""{front_matter("onnx", card.provenance)}
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as one ONNX graph: token ids in, class logits
out.

| | |
|---|---|
| task | {card.kind}: {", ".join(card.labels)} |
{rows_of(card.provenance)}| numbers | {"fp32" if quantize == "none" else quantize} |
{card.rows}
{measured}`{TOKENIZER}` truncates and pads rows. With `onnxruntime` and `tokenizers` alone:

```python
{code_for(card, CODE, CODE_APART)}```
"""
