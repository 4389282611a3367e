"""Export to a folder for llama.cpp: one GGUF file with weights, tokenizer and chat template, and a
parity report against the PyTorch model.

It runs without fedspine.
"""

import copy
import tempfile
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples
from fedspine.exports import gguf_file, llama_cpp
from fedspine.exports.card import GGUF, TOKENIZER, Card, copy_beside, read_card
from fedspine.exports.gguf_file import Widths
from fedspine.exports.gguf_tokenizer import vocabulary
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.parity import write_parity
from fedspine.exports.provenance import front_matter, rows_of
from fedspine.exports.token_differences import differences
from fedspine.exports.whole_folder import check_new, whole_folder
from fedspine.lm.gguf_files import read_model

ROWS = 32  # to compare on; each has many tokens
# rounding error of a stored weight, relative to the size of the weights around it. F16: half a unit
# in the last of 11 bits. Q8_0: half of a step; a step is 1/127 of the largest of 32 weights, which
# is about twice their root mean square if they are normally distributed
ROUNDING = {"f16": 2.0**-11, "q8_0": 1 / 127}
EQUAL = 0.995  # share of equal greedy tokens that suffices if the logits differ more
STORED = {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
WORSE = 1.05  # largest ratio of perplexities if llama.cpp has chosen the types


@dataclass(frozen=True)
class GgufParity:
    """How the weights in a GGUF file differ from those of the PyTorch model it was made from."""

    rows_from: str  # where the rows come from that both were compared on
    rows: int
    tokens: int  # of these rows, each with its logits
    largest_logit: float  # of the PyTorch model, in magnitude
    largest_difference: float  # of a logit
    relative_difference: float  # root mean square, over that of logits around their mean
    allowed_difference: float | None  # of the relative one; None: the perplexity decides
    equal_tokens: float  # share of the likeliest next tokens, 0 to 1
    perplexity: float  # with the file's weights; NaN if no token is predicted
    perplexity_before: float  # of the PyTorch model
    architecture: str  # the id that the file names
    quantize: str
    stored_f16: tuple[str, ...]  # matrices whose rows do not fit the blocks of `quantize`
    types: dict[str, int]  # number of matrices of each type
    bytes: int  # of the file

    @property
    def line(self) -> str:
        """The report in one line."""
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items())
        unfit = f" ({types})" if len(self.types) > 1 else ""
        return (
            f"parity on {self.tokens:,} tokens of {self.rows} rows ({self.rows_from}): logits "
            f"within {self.largest_difference:.2g} ({self.relative_difference:.2g} of their "
            f"spread), {self.equal_tokens:.1%} of greedy tokens equal, perplexity "
            f"{self.perplexity:.4g} (before: {self.perplexity_before:.4g}); {self.bytes / 1e6:.2f} "
            f"MB, {STORED[self.quantize]}{unfit}, architecture {self.architecture}"
        )

    def check(self) -> None:
        """Raise BadInput if the file is outside its tolerance."""
        if self.allowed_difference is None:
            near = self.perplexity <= WORSE * self.perplexity_before
            allowed = f"perplexity {self.perplexity:.4g}, before: {self.perplexity_before:.4g}"
        else:
            near = self.relative_difference <= self.allowed_difference
            allowed = f"allowed: {self.allowed_difference:.2g}"
        if isfinite(self.relative_difference) and (near or self.equal_tokens >= EQUAL):
            return
        raise BadInput(
            f"the logits of the {STORED[self.quantize]} file are off by "
            f"{self.relative_difference:.2g} of their spread ({allowed}), and "
            f"{self.equal_tokens:.1%} of the greedy tokens are equal (needed: {EQUAL:.1%}), on "
            f"{self.rows} rows ({self.rows_from}); use --format hf"
        )


def export(
    source: str | Path,
    folder: str | Path,
    *,
    examples: Examples,
    rows_from: str,
    quantize: str = "f16",
) -> GgufParity:
    """Write the decoder that `fedspine.exports.hf.export` wrote to `source` as the new `folder`.

    `examples` are the rows to compare both on, and `rows_from` says where they come from;
    `quantize` is a key of `STORED`; for Q4_K_M llama.cpp itself quantises the F16 file. The folder
    appears only when it is complete. Raises BadInput if it exists, for a model or a tokenizer that
    llama.cpp does not support, and for a file outside its tolerance: logits that differ as much as
    rounding explains (Q4_K_M: 5 % of the perplexity), or 99.5 % of the greedy tokens equal.
    """
    source, folder = Path(source), Path(folder)
    check_new(folder)
    loaded, card = load_model(source), read_card(source)
    config, widths = loaded.module.config, _widths(loaded, card)
    architecture = gguf_file.id_of(config, widths)
    words = vocabulary(source, loaded.tokenizer, config.vocab_size, chat=card.chat)
    with whole_folder(folder) as partial:
        copy_beside(source, partial / TOKENIZER)  # at the top, transformers would read these
        unfit = _write(partial / GGUF, loaded.module, widths, words, name=card.name, how=quantize)
        written = _read_back(partial / GGUF, loaded.module, architecture, stock=card.stock)
        parity = GgufParity(
            **differences(loaded.module, written, examples),
            rows_from=rows_from,
            rows=len(examples),
            allowed_difference=_allowed(quantize, len(widths.heads)),
            architecture=architecture,
            quantize=quantize,
            stored_f16=unfit,
            types=gguf_file.types_of(partial / GGUF),
            bytes=(partial / GGUF).stat().st_size,
        )
        measured = write_parity(parity, partial)
        (partial / "README.md").write_text(_readme(card, parity, measured), encoding="utf-8")
    return parity


def _write(file: Path, *model: Any, name: str, how: str) -> tuple[str, ...]:
    if how not in llama_cpp.QUANTISERS:
        return gguf_file.write(file, *model, name=name, how=how)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / GGUF
        gguf_file.write(whole, *model, name=name, how="f16")
        llama_cpp.quantise(whole, file, how)
    return ()


def _widths(loaded: Loaded, card: Card) -> Widths:
    layers = loaded.module.model.layers
    head_dim = layers[0].self_attn.head_dim
    return Widths(
        heads=tuple(layer.self_attn.q_proj.out_features // head_dim for layer in layers),
        key_heads=card.heads,
        channels=card.channels,
    )


# --- parity ---


def _read_back(file: Path, module: nn.Module, architecture: str, *, stock: bool) -> nn.Module:
    """The weights in the file as a module: as transformers reads the file, if it supports its
    sizes, else a copy of the module with the file's tensors.
    """
    if architecture == "llama" and stock:
        return read_model(file)[1].eval()
    written = copy.deepcopy(module)
    tensors = gguf_file.read_tensors(file, module, architecture)
    with torch.no_grad():
        for name, parameter in written.named_parameters():
            parameter.copy_(tensors[name])
    return written


def _allowed(quantize: str, layers: int) -> float | None:
    """Rounding errors are independent, so their squares add up over the products that a token
    passes through: six in sequence per block, the embedding and the head.
    """
    rounding = ROUNDING.get(quantize)
    return None if rounding is None else rounding * sqrt(6 * layers + 2)


def _readme(card: Card, parity: GgufParity, measured: str) -> str:
    unfit = ""
    if parity.quantize in llama_cpp.QUANTISERS:
        types = ", ".join(f"{count} in {name}" for name, count in parity.types.items())
        unfit = f"\nllama.cpp chose the types of the matrices by their widths: {types}.\n"
    if parity.stored_f16:
        unfit = (
            f"\nThe rows of {len(parity.stored_f16)} matrices do not fit Q8_0's blocks of 32 "
            "weights, so these are F16 (`stored_f16`).\n"
        )
    chat = " -cnv" if card.chat else ' -no-cnv -p "A text to continue"'
    return f"""{front_matter("gguf", card.provenance)}
# {card.name}

Fine-tuned over many devices and pruned by fedspine, as a file for llama.cpp.

| | |
|---|---|
| task | {card.kind} |
{rows_of(card.provenance)}| numbers | {STORED[parity.quantize]} |
| architecture that the file names | {parity.architecture} |
{card.rows}
{measured}The comparison read the file's numbers back into PyTorch.
{unfit}
```
llama-cli -m {GGUF}{chat}
```
"""
