"""GGUF files of llama.cpp: written from a Llama-type module, and read back as its tensors.

Only this file writes with the `gguf` package; `lm/gguf_files.py` reads whole models with it. A file
whose layers have equal widths has the plain id of its architecture. With unequal ones the id is
`deci`, for which llama.cpp reads heads, key/value heads and feed-forward widths as lists with one
number per layer; the computation is Llama's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedspine.core.errors import BadInput, listed, reason_of
from fedspine.core.message import Tensors
from fedspine.exports.gguf_tokenizer import GgufVocabulary
from fedspine.lm.gguf_files import EXTRA

try:
    import gguf
except ModuleNotFoundError:
    raise BadInput(f"GGUF files are written with the package gguf; {EXTRA}") from None

PRUNABLE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
UNEQUAL = "deci"
IDS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by model_type
WHOLE = {  # what llama.cpp supports of these; Llama may have any widths
    "qwen2": "all its heads and equally many channels in every layer",
    "qwen3": "equally many heads and channels in every layer",
}
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # by position
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
BLOCK = gguf.GGML_QUANT_SIZES[Q8_0][0]  # consecutive weights of a row that share a scale


@dataclass(frozen=True)
class Widths:
    """What each layer keeps."""

    heads: tuple[int, ...]  # query heads
    key_heads: tuple[int, ...]  # key/value heads
    channels: tuple[int, ...]

    @property
    def equal(self) -> bool:
        return all(len(set(each)) == 1 for each in (self.heads, self.key_heads, self.channels))


def id_of(config: Any, widths: Widths) -> str:
    """The architecture id for a file of this model.

    Raises BadInput for a model that llama.cpp would compute differently.
    """
    known = IDS.get(config.model_type)
    if known is None:
        raise BadInput(f"GGUF supports {', '.join(IDS)}, not {config.model_type}; use --format hf")
    rope = config.rope_parameters.get("rope_type", "default")
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if rope != "default" or biased or config.hidden_act != "silu":
        what = f"scaled positions ({rope})" if rope != "default" else "biases or another activation"
        raise BadInput(
            f"this {config.model_type} has {what}, which the GGUF export does not support; use "
            "--format hf"
        )
    queries = widths.heads[0] * _head_dim(config)
    if widths.equal and not (known == "qwen2" and queries != config.hidden_size):
        return known
    if known != "llama":
        raise BadInput(
            f"llama.cpp reads {config.model_type} only with {WHOLE[known]}, and this model is "
            "pruned differently; use --format hf, or --device dense for the unpruned model"
        )
    return UNEQUAL


def write(
    path: Path,
    module: nn.Module,
    widths: Widths,
    vocabulary: GgufVocabulary,
    *,
    name: str,
    how: str,
) -> tuple[str, ...]:
    """Write the module, a stock one with linear layers of these widths, as one file.

    `how` is a key of `FILE_TYPES`. Vectors stay fp32, as llama.cpp needs them. Returns the names of
    the matrices that are F16 because their rows do not fit the blocks of `how`.
    """
    config: Any = module.config
    architecture = id_of(config, widths)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[how])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config, widths)
    _add_vocabulary(writer, vocabulary)
    unfit = []
    for ours, theirs, tensor in _named(module, architecture):
        if architecture in (UNEQUAL, "llama") and ours.endswith(ROTATED):
            tensor = paired(tensor, _head_dim(config))
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
        elif how == "q8_0" and values.shape[-1] % BLOCK == 0:
            writer.add_tensor(theirs, gguf.quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            with np.errstate(over="ignore"):  # the parity check finds infinities
                writer.add_tensor(theirs, values.astype(np.float16))
            unfit.append(theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tuple(unfit) if how == "q8_0" else ()


def types_of(path: Path) -> dict[str, int]:
    """The number of matrices in a file, by weight type."""
    tensors = gguf.GGUFReader(path).tensors
    return dict(Counter(t.tensor_type.name for t in tensors if len(t.shape) > 1))


def read_tensors(path: Path, module: nn.Module, architecture: str) -> Tensors:
    """The tensors of a file in fp32, by their parameter names in `module`.

    Raises BadInput for a missing tensor.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for ours, theirs, tensor in _named(module, architecture):
        if theirs not in stored:
            raise BadInput(f"{path.name} lacks {theirs}; export the model again")
        one = stored[theirs]
        values = torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).astype(np.float32))
        if architecture in (UNEQUAL, "llama") and ours.endswith(ROTATED):
            values = halved(values, _head_dim(module.config))
        found[ours] = values.reshape(tensor.shape)
    return found


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a file and the sizes of its tensors."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, int]  # weights in each
    architecture: str

    def of(self, name: str, *default: Any) -> Any:
        """A field of the architecture; raises BadInput if it is missing and has no default."""
        key = f"{self.architecture}.{name}"
        if key not in self.fields and not default:
            raise BadInput(f"{self.path} lacks {key}, so it cannot be read; use another file")
        return self.fields.get(key, *default)

    @property
    def widths(self) -> Widths:
        """The widths of each layer."""
        layers = self.of("block_count")
        heads = _each(self.of("attention.head_count"), layers)
        key_heads = _each(self.of("attention.head_count_kv", heads), layers)
        return Widths(heads, key_heads, _each(self.of("feed_forward_length"), layers))

    @property
    def block_parameters(self) -> int:
        weights = {f"{name}.weight" for name in PRUNABLE}
        return sum(n for name, n in self.tensors.items() if name.split(".", 2)[-1] in weights)


def read_header(path: Path, known: tuple[str, ...]) -> GgufHeader:
    """The header of a file; raises BadInput for damage and for an architecture not in `known`."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except Exception as error:  # the package checks little of what it reads
        reason = reason_of(error)
        raise BadInput(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {reason}); copy the file "
            "again, or use another one"
        ) from None
    architecture = fields.get("general.architecture")
    if architecture not in known:
        raise BadInput(
            f"{path} holds a model of architecture {architecture!r}, which is not supported; use "
            f"one of: {listed(known)}"
        )
    return GgufHeader(path, fields, tensors, architecture)


def _each(value: Any, layers: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * layers


def write_tokenizer(path: Path, target: Path) -> None:
    """Write a file with the tokenizer alone under the id `llama`, since transformers does not know
    all ids of llama.cpp.
    """
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer.") or name == "general.name":
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=of[-1] if of else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a rotary projection in llama.cpp's order, with the two rows of a rotated pair next to
    each other; in transformers they are half a head apart.

    >>> paired(torch.arange(8), head_dim=4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def halved(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `paired`."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _named(module: Any, architecture: str) -> Iterator[tuple[str, str, Tensor]]:
    """Each parameter with its names in the module and in GGUF; tied ones once, by first name."""
    of_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(of_name[architecture], module.config.num_hidden_layers)
    for ours, parameter in module.named_parameters():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise BadInput(f"GGUF has no name for {ours} of {architecture}; use --format hf")
        yield ours, theirs, parameter


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_sizes(writer: "gguf.GGUFWriter", config: Any, widths: Widths) -> None:
    # llama.cpp's Llama has no sliding window, which makes no difference within one
    positions = min(
        config.max_position_embeddings,
        getattr(config, "sliding_window", None) or config.max_position_embeddings,
    )
    writer.add_context_length(positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    for add, each in (
        (writer.add_head_count, widths.heads),
        (writer.add_head_count_kv, widths.key_heads),
        (writer.add_feed_forward_length, widths.channels),
    ):
        add(each[0] if widths.equal else list(each))
    head_dim = _head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer: "gguf.GGUFWriter", vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)  # none are left out
    writer.add_token_scores(vocabulary.scores)
    if vocabulary.scores:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    named = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "eot": writer.add_eot_token_id,
    }
    for name, index in vocabulary.special.items():
        named[name](index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
