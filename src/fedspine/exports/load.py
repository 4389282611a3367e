"""Load an exported folder of any format: the stock class with linear layers of the stored sizes, an
ONNX graph, an ExecuTorch program, or a GGUF file. No remote code, no pickle.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import logging

from fedspine.core.errors import BadInput, reason_of
from fedspine.exports import hf_int8
from fedspine.exports.card import (
    BASE,
    CONFIG,
    EXECUTORCH,
    WEIGHTS,
    Card,
    format_of,
    gguf_in,
    is_net,
    read_card,
    weights_of,
)
from fedspine.exports.graph_module import GraphModule
from fedspine.exports.loaded import Loaded, LoadedNet
from fedspine.lm.gguf_files import EXTRA
from fedspine.lm.pooling import built, reading, stock_class
from fedspine.lm.prunable_layout import PrunableSite, layout_of

__all__ = ["Loaded", "LoadedNet", "load_model"]

# what computes a graph, by format
RUNTIMES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}


def load_model(folder: str | Path, *, threads: int | None = None) -> Any:
    """The model that `fedspine.export` wrote to `folder`, in any format: a `Loaded`, or of a run on
    arrays a `LoadedNet`. For GGUF, the file itself also works.

    A PEFT adapter needs its base in the folder (`with_base`), into which it is merged. `threads`
    is for ONNX Runtime, ExecuTorch and llama.cpp (None: their default); PyTorch uses the process's
    setting.
    Raises BadInput for a missing folder, one that is not an export, weights that are damaged or
    incomplete, and a format whose package is missing.
    """
    folder = Path(folder)
    logging.set_verbosity_error()
    if (file := gguf_in(folder)) is not None:
        return _of_gguf(file, threads)
    if is_net(folder):
        from fedspine.exports.onnx_net_load import load_net  # needs fedspine[onnx]

        return load_net(folder, threads)
    adapter = folder if format_of(folder) == "peft" else None
    if adapter is not None:
        folder = _base_of(adapter)
    card = read_card(folder)
    config = _read(folder, AutoConfig)
    tokenizer = _read(folder, AutoTokenizer)
    format = format_of(folder)
    graph = format in RUNTIMES
    int8 = format == "hf" and hf_int8.ENTRY in config.to_dict()
    # for a graph, only the sizes of the module that it was made from are needed
    with torch.device("meta") if graph else nullcontext():
        module = hf_int8.load(folder, card) if int8 else _module(folder, card, config)
    if graph:
        running = _of_graph(weights_of(folder), config, threads, decoder=card.pooling is None)
    else:
        if not int8:
            _fill(module, folder / WEIGHTS)
        if adapter is not None:
            from fedspine.exports.peft import merged_into  # needs fedspine[peft]

            module = merged_into(module, adapter)
        running = reading(module, card.pooling)
    layout = layout_of(config, module.base_model_prefix)
    return Loaded(
        module=running.eval().requires_grad_(False),
        tokenizer=tokenizer,
        kind=card.kind,
        labels=card.labels,
        max_tokens=card.max_tokens,
        sparsity=card.sparsity,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        block_parameters=sum(
            module.get_submodule(site.path).weight.numel() for site in layout.sites
        ),
        chat=card.chat,
        bi_encoder=card.pooling == "bi-encoder",
        runtime=RUNTIMES.get(format, "PyTorch"),
    )


def _of_graph(file: Path, config: Any, threads: int | None, *, decoder: bool) -> nn.Module:
    """The module that another runtime computes from this file."""
    if file.name == EXECUTORCH:
        from fedspine.exports.executorch_program import Program  # needs fedspine[executorch]

        return GraphModule(Program(file, threads), config)
    from fedspine.exports.onnx_graph import Graph  # needs fedspine[onnx]

    if decoder:
        from fedspine.exports.onnx_module import OnnxDecoder

        return OnnxDecoder(file, config, threads)
    return GraphModule(Graph(file, threads), config)


def _of_gguf(file: Path, threads: int | None) -> Loaded:
    if not file.is_file():
        raise BadInput(
            f"{file} is not a file; give a folder or a file that `fedspine export` wrote"
        )
    if not find_spec("gguf"):
        raise BadInput(f"{file.name} is read with the package gguf; {EXTRA}")
    from fedspine.exports.gguf_load import load_gguf

    return load_gguf(file, threads)


def _base_of(adapter: Path) -> Path:
    if not (adapter / BASE / CONFIG).is_file():
        raise BadInput(
            f"{adapter} is an adapter without its base model; run it with PEFT as its "
            "README.md says, or export it with --with-base, or with --format hf"
        )
    return adapter / BASE


def _read(folder: Path, auto: Any) -> Any:
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types
        what = "configuration" if auto is AutoConfig else "tokenizer"
        reason = reason_of(error)
        raise BadInput(
            f"the {what} of {folder} cannot be read ({reason}); export the model again"
        ) from None


def _module(folder: Path, card: Card, config: PreTrainedConfig) -> nn.Module:
    """The stock class with empty parameters of the exported sizes."""
    # without initialisation, loading touches only the memory of the weights that are kept
    with no_init_weights():
        module = stock_class(card.pooling).from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        module = built(module, card.pooling)
        layout = layout_of(config, module.base_model_prefix)
        if not len(card.heads) == len(card.channels) == layout.layers:
            listed = len(card.heads)
            raise BadInput(
                f"{folder} lists the sizes of {listed} of {layout.layers} layers; export the model "
                "again"
            )
        for site in layout.sites:
            columns, rows = _sizes(site, card)
            linear = module.get_submodule(site.path)
            if linear.weight.shape != (rows, columns):
                module.set_submodule(
                    site.path, nn.Linear(columns, rows, bias=linear.bias is not None)
                )
    module.tie_weights()
    return module


def _sizes(site: PrunableSite, card: Card) -> tuple[int, int]:
    """Columns and rows of one linear layer after pruning."""

    def kept(units: str | None, whole: int) -> int:
        match units:
            case "heads":
                return card.heads[site.layer] * site.per_unit
            case "channels":
                return card.channels[site.layer] * site.per_unit
        return whole

    return kept(site.column_units, site.columns), kept(site.row_units, site.rows)


def _fill(module: nn.Module, path: Path) -> None:
    """Copy the stored tensors into the module's parameters, which must all be there in their exact
    shapes.
    """
    # a tied parameter counts once, under its first name
    parameters = dict(module.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        for problem in _problems({name: tuple(p.shape) for name, p in parameters.items()}, stored):
            raise BadInput(f"{path} {problem}; export the model again")
        for name, parameter in parameters.items():
            # opened for each tensor: a single mapping would keep the whole file in memory besides
            # the copies
            with safe_open(path, framework="pt") as file, torch.no_grad():
                parameter.copy_(file.get_tensor(name))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; export the model again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged ({error}); export the model again") from None


def _problems(
    expected: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    if missing := sorted(expected.keys() - stored.keys()):
        yield f"lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}"
    if surplus := sorted(stored.keys() - expected.keys()):
        yield (f"holds {len(surplus)} tensors that the model does not have, such as {surplus[0]}")
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            yield f"holds {name} in shape {stored[name]}, but {expected[name]} was expected"
