"""A PEFT adapter as a folder that stock tools load: adapter, tokenizer, README.md and, optionally,
the base that it fits.

An adapter of an unpruned model fits the base that the run started from. One of a pruned model fits
only that base cut to the same structure, which `with_base` writes to `base/` inside the folder.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.task import Pooling, TaskKind
from fedspine.exports import hf
from fedspine.exports.card import BASE, read_card
from fedspine.exports.parity import ParityCheck, write_parity
from fedspine.exports.peft import check_readout, write_adapter
from fedspine.exports.provenance import HUB, Provenance, rows_of
from fedspine.exports.whole_folder import check_new, whole_folder
from fedspine.lm.base import Base, Model
from fedspine.lm.gguf_files import is_gguf
from fedspine.lm.pooling import HOW
from fedspine.lm.structure import is_full, sparsity
from fedspine.lm.vocabulary import VocabularyCut

# how the classes of transformers and PEFT for each readout end
AUTO: dict[Pooling | None, str] = {
    "mean": "ForTokenClassification",
    "cls": "ForSequenceClassification",
    None: "ForCausalLM",
}


@dataclass(frozen=True)
class Origin:
    """The base that a run started from: its folder, file or Hub id, and whether the run kept only
    its first blocks, or only some of its tokens, or its weights in fewer bits.
    """

    name: str
    cut: bool
    fewer_tokens: bool = False  # whether it kept a part of its vocabulary
    bits: int | None = None  # of the blocks' weights, where the run held them quantised

    @property
    def dequantised(self) -> bool:
        """Whether its weights come from a quantised file, which PEFT cannot use as a base."""
        return self.name == "smollm2" or is_gguf(self.name)

    @property
    def on_hub(self) -> bool:
        """Whether stock tools find it by its name on every machine."""
        path = Path(self.name).expanduser()
        local = is_gguf(self.name) or path.is_absolute() or path.exists()
        return self.name in HUB or not local

    @property
    def stock_name(self) -> str:
        """The name under which stock tools know it; of a folder its last part, as a path that is no
        Hub id and reveals nothing about the machine.
        """
        return HUB.get(self.name, self.name) if self.on_hub else f"./{Path(self.name).name}"


def export_adapter(
    base: Base,
    model: Model,
    tokenizer: Any,
    folder: str | Path,
    *,
    origin: Origin,
    with_base: bool,
    labels: tuple[str, ...],
    kind: TaskKind,
    max_tokens: int,
    name: str,
    provenance: Provenance | None = None,
    parity_check: ParityCheck | None = None,
    vocabulary: VocabularyCut | None = None,
) -> Path:
    """Write the adapter and the task head of `model` to the new `folder`, which appears only when
    it is complete.

    `provenance` and `parity_check` are as `fedspine.exports.hf.export` takes them. Raises BadInput
    where the folder exists, for an adapter that fits no model that stock tools could load, and what
    `parity_check` raises.
    """
    folder = Path(folder)
    check_readout(base)
    _check(folder, base, model, origin, with_base, labels, kind)
    card_facts: dict[str, Any] = {"labels": labels, "kind": kind, "max_tokens": max_tokens}
    card_facts |= {"name": name, "vocabulary": vocabulary}
    with whole_folder(folder) as partial:
        if with_base:
            _write_base(base, model, tokenizer, partial / BASE, **card_facts)
        # PEFT reads a path from the current folder, wherever the adapter is
        write_adapter(partial, model, base, f"./{BASE}" if with_base else origin.stock_name)
        tokenizer.save_pretrained(partial)
        code = _code(base, origin, labels, with_base=with_base)
        pruned = sparsity(base.layout, model.structure)
        measured = ""
        if parity_check is not None:
            with _with_base_beside(partial, base, model, tokenizer, **card_facts) as whole:
                measured = write_parity(parity_check(whole), partial)
        came = rows_of(provenance), measured
        fits = f"the base in `{BASE}/`" if with_base else f"`{origin.stock_name}`"
        card = _readme(origin, fits, code, pruned, *came, **card_facts)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _check(
    folder: Path,
    base: Base,
    model: Model,
    origin: Origin,
    with_base: bool,
    labels: tuple[str, ...],
    kind: TaskKind,
) -> None:
    check_new(folder)
    if with_base:
        return
    if not is_full(model.structure):
        able = hf.is_stock(base, model, labels, kind)
        whole = "add --with-base to write the pruned base, too, or " if able else ""
        raise BadInput(
            f"this model is pruned, so its adapter does not fit {origin.name}; {whole}use --device "
            "dense for the adapter of the unpruned model, or --format hf for the merged one"
        )
    if origin.dequantised:
        raise BadInput(
            f"{origin.name} is a quantised file, onto which PEFT cannot load an adapter; add "
            "--with-base to write the dequantised base, too, or use --format hf for the merged "
            "model"
        )
    if origin.bits is not None:
        raise BadInput(
            f"this run held the weights of {origin.name} in {origin.bits} bits (run.frozen_bits), "
            "so its adapter belongs to what these expand to; add --with-base to write that base, "
            "too, or take --format hf for the merged model"
        )
    if origin.fewer_tokens:
        raise BadInput(
            f"this run kept a part of the vocabulary of {origin.name} (task.vocabulary), so its "
            "tokens are not those of the whole; add --with-base to write the base with these "
            "tokens, too, or take --format hf for the merged model"
        )
    if origin.cut:
        raise BadInput(
            f"this run kept only the first blocks of {origin.name} (task.layers), so its adapter "
            "does not fit the full model; add --with-base to write the base with these blocks, "
            "too, or use --format hf for the merged model"
        )


def _write_base(base: Base, model: Model, tokenizer: Any, place: Path, **card_facts: Any) -> None:
    hf.export(base, model, tokenizer, place, merge=False, **card_facts)
    if not read_card(place).stock:
        raise BadInput(
            "a stock configuration cannot describe the heads and channels that this model keeps, "
            "so PEFT could not load such a base; use --device dense for the adapter of the "
            "unpruned model, or --format hf for the merged one, which fedspine predict runs"
        )


@contextmanager
def _with_base_beside(
    folder: Path, base: Base, model: Model, tokenizer: Any, **card_facts: Any
) -> Iterator[Path]:
    """The folder itself if it holds the base, else a copy that does, so that it can be loaded."""
    if (folder / BASE).is_dir():
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "adapter"
        shutil.copytree(folder, whole)
        hf.export(base, model, tokenizer, whole / BASE, merge=False, **card_facts)
        yield whole


def _needed(base: Base, labels: tuple[str, ...]) -> dict[str, Any]:
    """The options that a user must pass to load the adapter onto the base, since the base's own
    configuration lacks them.
    """
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": base.config.pad_token_id,
        "ignore_mismatched_sizes": True,  # the base may come with a head for another task
    }


def _code(base: Base, origin: Origin, labels: tuple[str, ...], *, with_base: bool) -> str:
    """The part of the README that loads the adapter onto its base."""
    ends = AUTO[base.pooling]
    needed = {} if with_base else _needed(base, labels)
    options = "".join(f",\n    {key}={value!r}" for key, value in needed.items())
    how = f"\n{HOW}\n" if base.pooling == "mean" else ""
    if origin.on_hub and not with_base:
        return f"""```python
from peft import AutoPeftModel{ends}
from transformers import AutoTokenizer

folder = "."  # this one
model = AutoPeftModel{ends}.from_pretrained(
    folder,
    dtype="float32"{options},
).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
```
{how}"""
    place = f"./{BASE}" if with_base else origin.stock_name
    named = f'folder + "/{BASE}"' if with_base else f"{json.dumps(place)}  # wherever it is here"
    return f"""```python
from peft import PeftModel
from transformers import AutoModel{ends}, AutoTokenizer

folder = "."  # this one
base = {named}
model = AutoModel{ends}.from_pretrained(
    base,
    dtype="float32"{options},
)
model = PeftModel.from_pretrained(model, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
```
{how}
`adapter_config.json` names the base as `{place}`, which PEFT's own `AutoPeftModel{ends}` looks for
in the current folder.
"""


def _readme(
    origin: Origin,
    fits: str,
    code: str,
    pruned: float,
    came: str,
    measured: str,
    *,
    labels: tuple[str, ...],
    kind: TaskKind,
    max_tokens: int,
    name: str,
    vocabulary: VocabularyCut | None,
) -> str:
    known = f"\nbase_model: {json.dumps(origin.stock_name)}" if origin.on_hub else ""
    return f"""---
library_name: peft{known}
tags: [fedspine, federated-learning, lora]
---
# {name}

A LoRA adapter{" with its task head" if labels else ""}, fine-tuned over many devices by fedspine.
It fits {fits}.

| | |
|---|---|
| task | {kind}{": " + ", ".join(labels) if labels else ""} |
{came}| share of the blocks' weights pruned | {pruned:.1%} |
| vocabulary | {"all tokens" if vocabulary is None else vocabulary.line} |
| longest input, in tokens | {max_tokens} |

{measured}{code}"""
