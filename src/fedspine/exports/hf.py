"""Export to a folder in Hugging Face format: the adapter merged into physically smaller weights, no
remote code.

Parameters keep the names of the stock `transformers` class. If a stock configuration can describe
the pruned sizes, it does and `transformers` loads the folder as it is; else only
`fedspine.load_model` does, and `transformers` fails on the shapes. The `fedspine` entry of
`config.json` holds what is in neither the weights nor a stock configuration.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors
from fedspine.core.task import Pooling, TaskKind
from fedspine.exports import hf_int8
from fedspine.exports.card import CONFIG, FORMAT, WEIGHTS, Card
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.parity import ParityCheck, write_parity
from fedspine.exports.predict import ChatAnswer, Continued, Labelled, Prediction, predict
from fedspine.exports.provenance import Provenance, front_matter, rows_of
from fedspine.exports.whole_folder import check_new, whole_folder
from fedspine.lm.base import Base, Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.pooling import CLASSES, HOW, built, stock_class
from fedspine.lm.structure import Structure, StructureKind, is_even, sparsity
from fedspine.lm.vocabulary import VocabularyCut

__all__ = [
    "ChatAnswer",
    "Continued",
    "Labelled",
    "Loaded",
    "Prediction",
    "export",
    "load_model",
    "merged_tensors",
    "predict",
]

# what the README says of a bi-encoder, whose backbone a stock class loads
BI_ENCODER = """\


Each text of a pair is encoded separately. Stock transformers loads the backbone, and the head is
one linear layer:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # this one
backbone, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
weights = load_file(f"{{folder}}/model.safetensors")


@torch.inference_mode()
def mean(texts):
    options = {{"padding": True, "truncation": True, "max_length": {max_tokens}}}
    inputs = tokenizer(texts, return_tensors="pt", **options)
    mask = inputs.attention_mask[..., None]
    return (backbone(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


def logits(texts, others):
    u, v = mean(texts), mean(others)
    read = torch.cat([u, v, (u - v).abs()], 1)
    return read @ weights["classifier.weight"].T + weights["classifier.bias"]
```"""


def export(
    base: Base,
    model: Model,
    tokenizer: Any,
    folder: str | Path,
    *,
    labels: tuple[str, ...],
    kind: TaskKind,
    max_tokens: int,
    name: str,
    merge: bool = True,
    chat: bool = False,
    structure: StructureKind = "free",
    provenance: Provenance | None = None,
    parity_check: ParityCheck | None = None,
    vocabulary: VocabularyCut | None = None,
    quantize: str = "none",
) -> Path:
    """Write `model` as a new folder: config.json, model.safetensors, the tokenizer, README.md.

    The adapter is merged in fp32 as W + scale * B @ A; `merge=False` leaves it out, for use with an
    adapter that `fedspine.exports.peft` writes. `chat` says that it was tuned on dialogues, and
    `structure` which one the run's method asked for; `provenance` is where it comes from, and
    `vocabulary` what is left of the model's (None: all). `parity_check` compares what was written
    with the run's model, and its report goes into parity.json and README.md. With `quantize` "int8"
    the blocks' weights are int8. The folder appears at once and complete. Raises BadInput where it
    exists already, where the base is not fp32, where `labels` are not those that the head was
    trained for, and what `parity_check` and `hf_int8` raise.
    """
    folder = Path(folder)
    _check(base, folder, labels, kind)
    tensors = merged_tensors(base, model, merge=merge)
    config, stock = _config(base, model.structure, tensors, labels, kind)
    card = Card(
        format=FORMAT,
        name=name,
        kind=kind,
        labels=tuple(labels),
        pooling=base.pooling,
        max_tokens=max_tokens,
        heads=tuple(model.structure.heads.sum(1).tolist()),
        channels=tuple(model.structure.channels.sum(1).tolist()),
        sparsity=sparsity(base.layout, model.structure),
        merged=merge,
        stock=stock,
        chat=chat,
        structure=structure,
        provenance=provenance,
        vocabulary=vocabulary,
    )
    if quantize == "int8":
        hf_int8.check(card)
    _write(folder, config, card, tensors, tokenizer, parity_check, quantize)
    return folder


def is_stock(base: Base, model: Model, labels: tuple[str, ...], kind: TaskKind) -> bool:
    """Whether stock transformers could load an export of this model."""
    tensors = merged_tensors(base, model, merge=False)
    return _config(base, model.structure, tensors, labels, kind)[1]


def _check(base: Base, folder: Path, labels: tuple[str, ...], kind: TaskKind) -> None:
    check_new(folder)
    if base.precision is not torch.float32:
        raise BadInput(
            f"export needs the base in fp32, but it is in {base.precision}; load it with "
            "precision fp32"
        )
    expected = 0 if kind == "causal-lm" else base.config.num_labels
    if len(labels) != expected:
        raise BadInput(
            f"got {len(labels)} labels for a head of {expected}; pass the task's label_names"
        )


def merged_tensors(base: Base, model: Model, *, merge: bool = True) -> Tensors:
    """Every parameter of the exported model in fp32 by its stock name; a tied one once, under its
    first name.
    """
    tensors = {
        name: parameter.detach() for name, parameter in base.whole_skeleton().named_parameters()
    }
    for site in base.layout.sites:
        weight, bias = base.slice(site.path, model.structure)
        a, b = model.adapter.get(a_name(site.path)), model.adapter.get(b_name(site.path))
        if merge and a is not None and b is not None:
            weight = torch.addmm(weight, b.detach().float(), a.detach().float(), alpha=model.scale)
        tensors[f"{site.path}.weight"] = weight
        if bias is not None:
            tensors[f"{site.path}.bias"] = bias
    tensors |= {name: tensor.detach() for name, tensor in model.head.items()}
    # a copy of each: safetensors refuses views that share storage
    return {name: tensor.float().clone().contiguous() for name, tensor in sorted(tensors.items())}


def _config(
    base: Base, structure: Structure, tensors: Tensors, labels: tuple[str, ...], kind: TaskKind
) -> tuple[PreTrainedConfig, bool]:
    """The configuration to write, and whether the stock class built from it has the shapes of
    `tensors`.
    """
    original = copy.deepcopy(base.config)
    original.architectures = [type(base.skeleton).__name__]
    original.dtype = "float32"
    original.use_cache = base.layout.decoder
    if labels:
        original.id2label = dict(enumerate(labels))
        original.label2id = {label: index for index, label in enumerate(labels)}
    uniform = _uniform(original, base, structure)
    if uniform is not None and _fits(uniform, tensors, base.pooling):
        return uniform, True
    return original, False


def _uniform(config: PreTrainedConfig, base: Base, structure: Structure) -> PreTrainedConfig | None:
    """The configuration with the kept sizes of every layer; None if layers differ or no
    configuration can describe them.
    """
    if not is_even(structure):
        return None
    kept, channels = int(structure.heads[0].sum()), int(structure.channels[0].sum())
    sizes = {
        "intermediate_size" if "intermediate_size" in config.to_dict() else "hidden_dim": channels
    }
    if kept != base.layout.heads:
        groups = base.layout.query_heads // base.layout.heads
        sizes |= {
            "num_attention_heads": kept * groups,
            "num_key_value_heads": kept,
            "head_dim": base.layout.head_dim,
        }
    try:
        return type(config).from_dict(config.to_dict() | sizes)
    except Exception:  # configuration classes check, for example, that heads divide the width
        return None


def _fits(config: PreTrainedConfig, tensors: Tensors, pooling: Pooling | None) -> bool:
    # building the class is the only check that works for every architecture: BERT, for one, ignores
    # `head_dim`
    try:
        with torch.device("meta"), no_init_weights():
            module = built(stock_class(pooling).from_config(config), pooling)
            module.tie_weights()  # part of the initialisation that is skipped here
    except Exception:  # if the class cannot be built, this is not a stock model
        return False
    return {n: p.shape for n, p in module.named_parameters()} == {
        n: t.shape for n, t in tensors.items()
    }


def _write(
    folder: Path,
    config: PreTrainedConfig,
    card: Card,
    tensors: Tensors,
    tokenizer: Any,
    parity_check: ParityCheck | None,
    quantize: str,
) -> None:
    with whole_folder(folder) as partial:
        settings = config.to_diff_dict() | {"fedspine": asdict(card)}
        settings.pop("_name_or_path", None)  # a path of the machine that exports
        (partial / CONFIG).write_text(
            json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        tokenizer.save_pretrained(partial)
        if quantize == "int8":
            hf_int8.quantise(partial, card)
        measured = "" if parity_check is None else write_parity(parity_check(partial), partial)
        (partial / "README.md").write_text(
            _readme(card, tensors, measured, quantize), encoding="utf-8"
        )


def _readme(card: Card, tensors: Tensors, measured: str, quantize: str) -> str:
    parameters = sum(tensor.numel() for tensor in tensors.values())
    auto = CLASSES[card.pooling]
    how = f" {HOW}" if card.pooling == "mean" else ""
    beside = "" if quantize == "none" else " with torchao and accelerate"
    stock = f"Stock transformers loads it{beside}: `{auto}.from_pretrained(folder)`.{how}"
    if card.pooling == "bi-encoder":
        stock = BI_ENCODER.format(max_tokens=card.max_tokens)
    if not card.stock:
        stock = (
            "No stock configuration can describe the sizes of its layers, so `from_pretrained` "
            "refuses it."
        )
    adapter = (
        "merged into the weights"
        if card.merged
        else "not in the weights; load it beside them with PEFT"
    )
    return f"""{front_matter("transformers", card.provenance)}
# {card.name}

Fine-tuned over many devices and pruned by fedspine; the adapter is {adapter}.

| | |
|---|---|
| task | {card.kind}{": " + ", ".join(card.labels) if card.labels else ""} |
{rows_of(card.provenance)}| parameters | {parameters:,} |
| numbers | {"fp32" if quantize == "none" else f"{quantize} in the blocks, else fp32"} |
{card.rows}
{measured}Load it with `fedspine.load_model(folder)` or run `fedspine predict`. {stock}
"""
