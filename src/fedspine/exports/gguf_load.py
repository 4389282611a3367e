"""Load a GGUF file: llama.cpp runs it where it is installed, else its numbers are read back into
PyTorch.

Sizes are what the file says, so files of others load, too. The tokenizer and the model card lie
beside the file in a folder that `fedspine export` wrote; of a file alone the tokenizer is read out
of it by transformers.
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

from fedspine.core.errors import BadInput
from fedspine.exports import gguf_file, llama_cpp
from fedspine.exports.card import CONFIG, WORDS, Card, read_card
from fedspine.exports.gguf_file import Stored
from fedspine.exports.loaded import READ_BACK, Loaded
from fedspine.lm.pooling import CLASSES
from fedspine.lm.prunable_layout import layout_of

CONFIGS = {"llama": LlamaConfig, "deci": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def load_gguf(path: Path, threads: int | None) -> Loaded:
    """The model in a file.

    Raises BadInput for a file that cannot be read, and for an architecture or a computation that
    `fedspine export` does not write.
    """
    logging.set_verbosity_error()
    stored = gguf_file.stored_in(path, tuple(CONFIGS))
    card = _card_beside(path)
    config = _config(stored)
    if llama_cpp.installed() is None:
        module, runtime = _in_torch(stored, config), READ_BACK
    else:
        from fedspine.exports.gguf_module import LlamaModule

        ends = stored.fields.get("tokenizer.ggml.eos_token_id")
        module, runtime = LlamaModule(path, config, ends, threads), llama_cpp.runtime()
    return Loaded(
        module=module.eval().requires_grad_(False),
        tokenizer=_tokenizer(stored, card),
        kind="causal-lm",
        labels=(),
        max_tokens=config.max_position_embeddings if card is None else card.max_tokens,
        sparsity=math.nan if card is None else card.sparsity,
        parameters=sum(stored.tensors.values()),
        block_parameters=stored.block_parameters,
        chat="tokenizer.chat_template" in stored.fields if card is None else card.chat,
        runtime=runtime,
    )


def _config(stored: Stored) -> Any:
    """A configuration with all that layers share; their sizes are those of `Stored.widths`."""
    width, widths = stored.of("embedding_length"), stored.widths
    head_dim = stored.of("attention.key_length", width // widths.heads[0])
    groups = widths.heads[0] // widths.key_heads[0]
    if any(h != groups * k for h, k in zip(widths.heads, widths.key_heads, strict=True)):
        raise BadInput(f"{stored.path} shares keys by unequally many heads; run it in llama.cpp")
    words = stored.fields.get("tokenizer.ggml.tokens", ())
    return CONFIGS[stored.architecture](
        vocab_size=stored.of("vocab_size", len(words)),
        hidden_size=width,
        intermediate_size=max(widths.channels),
        num_hidden_layers=len(widths.heads),
        # so many heads as share a key, which is all that attention reads of their number
        num_attention_heads=groups,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=stored.of("context_length"),
        rms_norm_eps=stored.of("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": stored.of("rope.freq_base", 1e4)},
        tie_word_embeddings="output.weight" not in stored.tensors,
        bos_token_id=stored.fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=stored.fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=stored.fields.get("tokenizer.ggml.padding_token_id"),
    )


def _in_torch(stored: Stored, config: Any) -> nn.Module:
    """The stock class with linear layers of the file's sizes and the file's numbers in fp32."""
    widths = stored.widths
    with no_init_weights():
        module = CLASSES[None].from_config(config, dtype=torch.float32)
        for site in layout_of(config, module.base_model_prefix).sites:
            kept = widths.channels if "channels" in (site.row_units, site.column_units) else None
            units = widths.key_heads[site.layer] if kept is None else kept[site.layer]
            linear = module.get_submodule(site.path)
            rows = units * site.per_unit if site.row_units else site.rows
            columns = units * site.per_unit if site.column_units else site.columns
            sized = nn.Linear(columns, rows, bias=linear.bias is not None)
            module.set_submodule(site.path, sized)
    module.tie_weights()
    tensors = gguf_file.read_tensors(stored.path, module, stored.architecture)
    if surplus := len(stored.tensors) - len(tensors):
        raise BadInput(
            f"{stored.path} has {surplus} tensors that PyTorch's {config.model_type} has no place "
            f"for, such as scaled positions; run it in llama.cpp: {llama_cpp.EXTRA}"
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
    return module


def _card_beside(path: Path) -> Card | None:
    """The model card of the folder that the file was exported in."""
    place = path.parent / WORDS
    return read_card(place) if (place / CONFIG).is_file() else None


def _tokenizer(stored: Stored, card: Card | None) -> Any:
    try:
        if card is not None:
            place = stored.path.parent / WORDS
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
        with tempfile.TemporaryDirectory() as scratch:
            gguf_file.write_words(stored.path, Path(scratch) / "words.gguf")
            return AutoTokenizer.from_pretrained(scratch, gguf_file="words.gguf")
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"the tokenizer of {stored.path} cannot be read ({reason}); give the folder that "
            "`fedspine export` wrote"
        ) from None
