"""Adapters as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors`.

An adapter of an unpruned model fits the stock base model. One of a pruned model is cut to its
structure and fits the module of an export without the adapter (`export(..., merge=False)`);
`fedspine_structure.safetensors`, which PEFT ignores, lists the units that this structure keeps.
"""

import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.message import NotAMessage, Tensors, pack, unpack
from fedspine.lm.base import Base, HeadLayer, Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.prunable_layout import PrunableSite
from fedspine.lm.structure import Structure, full, is_full, kept_columns, kept_rows

try:
    from peft import LoraConfig, PeftModel
except ModuleNotFoundError:
    raise BadInput("PEFT adapters need the package peft; pip install 'fedspine[peft]'") from None

CONFIG, WEIGHTS, STRUCTURE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "fedspine_structure.safetensors",
)
PREFIX = "base_model.model."
TASK_TYPES = {"mean": "TOKEN_CLS", "cls": "SEQ_CLS", None: "CAUSAL_LM"}  # by readout


def check_readout(base: Base) -> None:
    """Raise BadInput for a bi-encoder."""
    if base.pooling == "bi-encoder":
        raise BadInput(
            "PEFT has no class for the readout of a bi-encoder (task.pooling); use --format hf"
        )


def write_adapter(folder: str | Path, model: Model, base: Base, base_name: str) -> Path:
    """Write the adapter and the task head of `model`; `base_name` is the folder or Hub id that PEFT
    loads it onto.

    Modules of different rank are written with PEFT's rank and alpha patterns. Raises BadInput for a
    model without an adapter, and for a bi-encoder.
    """
    check_readout(base)
    ranks = {
        path: len(model.adapter[a_name(path)])
        for path in _paths(base)
        if a_name(path) in model.adapter
    }
    if not ranks:
        raise BadInput("this model has no adapter to write; export it with `--format hf` instead")
    tensors = {}
    for path in ranks:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = model.adapter[a_name(path)]
        tensors[f"{PREFIX}{path}.lora_B.weight"] = model.adapter[b_name(path)]
    tensors |= {PREFIX + name: tensor for name, tensor in model.head.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a copy of each: safetensors refuses views that share storage
    tensors = {
        name: tensor.detach().float().clone().contiguous()
        for name, tensor in sorted(tensors.items())
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = _lora_config(model, base, base_name, ranks).to_dict()
    # PEFT keeps names in sets, whose order differs from process to process
    settings = {
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
    }
    (folder / CONFIG).write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if is_full(model.structure):
        (folder / STRUCTURE).unlink(missing_ok=True)
    else:
        (folder / STRUCTURE).write_bytes(pack(model.structure).payload)
    return folder


def _lora_config(model: Model, base: Base, base_name: str, ranks: dict[str, int]) -> LoraConfig:
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    unusual = {path: rank for path, rank in ranks.items() if rank != usual}
    return LoraConfig(
        task_type=TASK_TYPES[base.pooling],
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=usual,
        # PEFT divides by r, so alpha need not be an integer
        lora_alpha=model.scale * usual,  # type: ignore[arg-type]
        target_modules=sorted(ranks),
        modules_to_save=sorted({_saved_module(layer, base) for layer in base.head}) or None,
        rank_pattern=unusual,
        alpha_pattern={path: model.scale * rank for path, rank in unusual.items()},
        lora_dropout=0.0,
        bias="none",
    )


def _saved_module(layer: HeadLayer, base: Base) -> str:
    # PEFT saves the whole `classifier` of every text classifier, so its inner layers must not be
    # listed as well
    inside = layer.path.startswith(base.skeleton.base_model_prefix + ".")
    return layer.path if inside else layer.path.split(".")[0]


def read_adapter(folder: str | Path, base: Base) -> Model:
    """The model that an adapter folder describes on top of `base`; its structure is full unless the
    folder has one.

    Parts of the task head that the folder lacks come from the checkpoint. Raises BadInput for a
    folder or a type of adapter that cannot be read, modules that `base` does not have, tensors of
    another shape, and a head that neither has.
    """
    folder = Path(folder)
    settings = _settings(folder)
    try:
        # copies, since overwriting a memory-mapped file would crash the process
        tensors = {
            name.removeprefix(PREFIX): t.float().clone()
            for name, t in load_file(folder / WEIGHTS).items()
        }
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{folder / WEIGHTS} cannot be read ({error}); save the adapter again, as safetensors"
        ) from None
    structure = _structure(folder, base)
    head = _head(folder, base, tensors)
    scale = _scale(settings, settings.r, settings.lora_alpha) or 1.0
    adapter: Tensors = {}
    for site in base.layout.sites:
        a, b = (tensors.pop(f"{site.path}.lora_{factor}.weight", None) for factor in "AB")
        if a is None or b is None:
            continue
        _check_shapes(folder, site, structure, a, b)
        alpha = _pattern(settings.alpha_pattern, site.path, settings.lora_alpha)
        # one scale for the whole model: a module's own scale, relative to it, goes into its B
        own = _scale(settings, a.shape[0], alpha)
        adapter[a_name(site.path)], adapter[b_name(site.path)] = a, b * (own / scale)
    if tensors:
        raise BadInput(
            f"{folder} adapts {min(tensors)}, which is not an attention or feed-forward layer of "
            "this model's blocks; use the base model and the task that the adapter was made for"
        )
    return Model(structure=structure, adapter=adapter, head=head, scale=scale)


def merged_into(module: nn.Module, folder: str | Path) -> nn.Module:
    """A stock module with the adapter in `folder` merged into its weights, as PEFT does it.

    Raises BadInput for an adapter that cannot be read or does not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how PEFT handles transformers' settings
            return PeftModel.from_pretrained(module, str(folder)).merge_and_unload()
    except Exception as error:  # PEFT raises many types
        reason = reason_of(error)
        what = f"the adapter in {folder} cannot be read ({reason}); export it again"
        raise BadInput(what) from None


def _settings(folder: Path) -> LoraConfig:
    try:
        entries = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = entries.get("peft_type")
        settings = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{folder / CONFIG} cannot be read ({error}); give a folder that PEFT saved"
        ) from None
    if settings is None:
        raise BadInput(f"{folder} holds an adapter of type {kind!r}, but only LORA can be read")
    if settings.use_dora or settings.bias != "none":
        what = "DoRA" if settings.use_dora else f"trained biases (bias={settings.bias!r})"
        raise BadInput(f"{folder} uses {what}, which is not supported; save a plain LoRA adapter")
    return settings


def _structure(folder: Path, base: Base) -> Structure:
    path = folder / STRUCTURE
    if not path.exists():
        return full(base.layout)
    try:
        structure = unpack(path.read_bytes())
    except (OSError, NotAMessage) as error:
        raise BadInput(f"{path} cannot be read ({error}); save the adapter again") from None
    whole = full(base.layout)
    if not isinstance(structure, Structure) or (
        structure.heads.shape,
        structure.channels.shape,
    ) != (
        whole.heads.shape,
        whole.channels.shape,
    ):
        raise BadInput(
            f"{path} is for another base model; use the one that the adapter was made for"
        )
    return structure


def _head(folder: Path, base: Base, tensors: Tensors) -> Tensors:
    """The task head, taken out of `tensors`, completed from the checkpoint."""
    head: Tensors = {}
    for layer in base.head:
        for part, own in (("weight", layer.weight), ("bias", layer.bias)):
            name = f"{layer.path}.{part}"
            found = tensors.pop(name, None)
            if own is None:
                continue
            if found is None and layer.fresh:
                raise BadInput(
                    f"neither {folder} nor the base model has {name}; save the adapter with its "
                    "task head"
                )
            if found is not None and found.shape != own.shape:
                raise BadInput(
                    f"{folder} has {name} in shape {tuple(found.shape)}, but the task needs "
                    f"{tuple(own.shape)}"
                )
            head[name] = own.clone() if found is None else found
    return head


def _check_shapes(
    folder: Path, site: PrunableSite, structure: Structure, a: torch.Tensor, b: torch.Tensor
) -> None:
    rows, columns = kept_rows(site, structure), kept_columns(site, structure)
    expected = (
        site.rows if rows is None else len(rows),
        site.columns if columns is None else len(columns),
    )
    if (b.shape[0], a.shape[1]) != expected or a.shape[0] != b.shape[1]:
        raise BadInput(
            f"{folder} adapts {site.path} as a layer of {b.shape[0]} x {a.shape[1]}, but the base "
            f"has {expected[0]} x {expected[1]}; use the base model that the adapter was made for"
        )


def _scale(settings: LoraConfig, rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _pattern(pattern: dict[str, float] | None, path: str, default: float) -> float:
    """The value of the first entry whose key, a regular expression, matches the end of the path."""
    return next(
        (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)),
        default,
    )


def _paths(base: Base) -> list[str]:
    return [site.path for site in base.layout.sites]
