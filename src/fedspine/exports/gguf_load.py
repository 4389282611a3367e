"""Load a GGUF file: llama.cpp runs it if it is installed, else its weights are read into PyTorch.

Sizes are read from the file, so files of other tools load, too. In a folder that `fedspine export`
wrote, tokenizer and model card lie beside the file; for a file alone, transformers reads the
tokenizer from it.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.initialization import no_init_weights
from transformers.utils import logging

from fedspine.core.errors import BadInput, reason_of
from fedspine.exports import gguf_file, llama_cpp
from fedspine.exports.card import CONFIG, TOKENIZER, Card, read_card
from fedspine.exports.gguf_file import GgufHeader
from fedspine.exports.loaded import READ_BACK, Loaded
from fedspine.lm.pooling import stock_class
from fedspine.lm.prunable_layout import layout_of

CONFIGS = {"llama": LlamaConfig, "deci": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def load_gguf(path: Path, threads: int | None) -> Loaded:
    """The model in a file.

    Raises BadInput for a file that cannot be read, and for an architecture or a computation that
    `fedspine export` does not support.
    """
    logging.set_verbosity_error()
    header = gguf_file.read_header(path, tuple(CONFIGS))
    card = _card_beside(path)
    config = _config(header)
    if llama_cpp.installed() is None:
        module, runtime = _in_torch(header, config), READ_BACK
    else:
        from fedspine.exports.gguf_module import LlamaModule

        ends = header.fields.get("tokenizer.ggml.eos_token_id")
        module, runtime = LlamaModule(path, config, ends, threads), llama_cpp.runtime()
    return Loaded(
        module=module.eval().requires_grad_(False),
        tokenizer=_tokenizer(header, card),
        kind="causal-lm",
        labels=(),
        max_tokens=config.max_position_embeddings if card is None else card.max_tokens,
        sparsity=math.nan if card is None else card.sparsity,
        parameters=sum(header.tensors.values()),
        block_parameters=header.block_parameters,
        chat="tokenizer.chat_template" in header.fields if card is None else card.chat,
        runtime=runtime,
    )


def _config(header: GgufHeader) -> Any:
    """A configuration with all that layers share; their sizes are those of `GgufHeader.widths`."""
    width, widths = header.of("embedding_length"), header.widths
    head_dim = header.of("attention.key_length", width // widths.heads[0])
    groups = widths.heads[0] // widths.key_heads[0]
    if any(h != groups * k for h, k in zip(widths.heads, widths.key_heads, strict=True)):
        raise BadInput(
            f"in {header.path} the number of heads that share a key differs by layer; run it in "
            "llama.cpp"
        )
    words = header.fields.get("tokenizer.ggml.tokens", ())
    return CONFIGS[header.architecture](
        vocab_size=header.of("vocab_size", len(words)),
        hidden_size=width,
        intermediate_size=max(widths.channels),
        num_hidden_layers=len(widths.heads),
        # the heads that share a key: attention needs no other number of heads
        num_attention_heads=groups,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=header.of("context_length"),
        rms_norm_eps=header.of("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": header.of("rope.freq_base", 1e4)},
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=header.fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=header.fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=header.fields.get("tokenizer.ggml.padding_token_id"),
    )


def _in_torch(header: GgufHeader, config: Any) -> nn.Module:
    """The stock class with linear layers of the file's sizes and the file's weights in fp32."""
    widths = header.widths
    with no_init_weights():
        module = stock_class(None).from_config(config, dtype=torch.float32)
        for site in layout_of(config, module.base_model_prefix).sites:
            kept = widths.channels if "channels" in (site.row_units, site.column_units) else None
            units = widths.key_heads[site.layer] if kept is None else kept[site.layer]
            linear = module.get_submodule(site.path)
            rows = units * site.per_unit if site.row_units else site.rows
            columns = units * site.per_unit if site.column_units else site.columns
            sized = nn.Linear(columns, rows, bias=linear.bias is not None)
            module.set_submodule(site.path, sized)
    module.tie_weights()
    tensors = gguf_file.read_tensors(header.path, module, header.architecture)
    if surplus := len(header.tensors) - len(tensors):
        raise BadInput(
            f"{header.path} has {surplus} tensors that PyTorch's {config.model_type} lacks, such "
            f"as scaled positions; run it in llama.cpp: {llama_cpp.EXTRA}"
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
    return module


def _card_beside(path: Path) -> Card | None:
    """The model card in the folder of an exported file."""
    place = path.parent / TOKENIZER
    return read_card(place) if (place / CONFIG).is_file() else None


def _tokenizer(header: GgufHeader, card: Card | None) -> Any:
    try:
        if card is not None:
            place = header.path.parent / TOKENIZER
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
        with tempfile.TemporaryDirectory() as scratch:
            gguf_file.write_tokenizer(header.path, Path(scratch) / "tokenizer.gguf")
            return AutoTokenizer.from_pretrained(scratch, gguf_file="tokenizer.gguf")
    except Exception as error:  # transformers raises many kinds
        reason = reason_of(error)
        raise BadInput(
            f"the tokenizer of {header.path} cannot be read ({reason}); give the folder that "
            "`fedspine export` wrote"
        ) from None
