"""Export of a classifier of texts to a folder for ExecuTorch: one program from token ids to class
logits, its tokenizer and its labels, and a parity report against the PyTorch model.

The readout is part of the program. A phone runs it with ExecuTorch's own libraries, and any machine
as the README.md in the folder shows.
"""

from pathlib import Path

from fedspine.core.task import Examples
from fedspine.exports import executorch_program
from fedspine.exports.card import EXECUTORCH, Card
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
from fedspine.exports.parity import write_parity
from fedspine.exports.provenance import front_matter, rows_of
from fedspine.exports.whole_folder import whole_folder

__all__ = ["ROWS", "export"]

CODE = """\
import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), sys.argv[2:]
labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
forward = Runtime.get().load_program(folder / "model.pte").load_method("forward")
parts = ("ids", "attention_mask", "type_ids")[: forward.metadata.num_inputs()]
(logits,) = forward.execute([torch.tensor([getattr(r, part) for r in rows]) for part in parts])
for text, label in zip(texts, logits.argmax(1).tolist(), strict=True):
    print(labels[str(label)], text, sep="\\t")
"""

# the same for a bi-encoder: the two texts of each pair are truncated and padded separately
CODE_APART = """\
import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), sys.argv[2:]
labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
sides = [tokenizer.encode_batch(texts[side::2]) for side in (0, 1)]
ids = [torch.tensor([row.ids for row in side]) for side in sides]
masks = [torch.tensor([row.attention_mask for row in side]) for side in sides]
segments = [torch.full_like(ids[side], side) for side in (0, 1)]
forward = Runtime.get().load_program(folder / "model.pte").load_method("forward")
(logits,) = forward.execute([torch.hstack(part) for part in (ids, masks, segments)])
for text, other, label in zip(texts[::2], texts[1::2], logits.argmax(1).tolist(), strict=True):
    print(labels[str(label)], text, other, sep="\\t")
"""


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "none",
) -> ClassifierParity:
    """Write the classifier that `fedspine.exports.hf.export` wrote to `source` as the new `folder`.

    `examples` are the rows to compare both on, and `rows_from` says where they come from;
    `quantize` can only be "none". The folder appears only when it is complete. Raises BadInput if
    it exists, for a model that ExecuTorch cannot export or without a tokenizer.json, and for logits
    that are off by more than 1e-4.
    """
    source, folder = Path(source), Path(folder)
    executorch_program.check_installed()
    loaded, card = opened(source, folder)
    with whole_folder(folder) as partial:
        copy_as_graph(source, partial)
        set_up_tokenizer(partial / TOKENIZER, loaded)
        executorch_program.write(
            FromTokens(loaded.module),
            partial / EXECUTORCH,
            classifier_signature(segments=examples.segments is not None),
            tokens=(2 if loaded.bi_encoder else 1) * loaded.max_tokens,
        )
        parity = parity_of(loaded.module, partial, examples, rows_from, quantize)
        card_text = _readme(card, write_parity(parity, partial))
        (partial / "README.md").write_text(card_text, encoding="utf-8")
    return parity


def _readme(card: Card, measured: str) -> str:
    return f"""{front_matter("executorch", card.provenance)}
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as one ExecuTorch program for XNNPACK: token
ids in, class logits out, up to {executorch_program.MOST_ROWS} rows at a time.

| | |
|---|---|
| task | {card.kind}: {", ".join(card.labels)} |
{rows_of(card.provenance)}| numbers | fp32 |
{card.rows}
{measured}`{TOKENIZER}` truncates and pads rows. With `executorch` and `tokenizers` alone:

```python
{code_for(card, CODE, CODE_APART)}```
"""
