"""A model's tokenizer in llama.cpp's terms: the tokenizer model, tokens with their types, merges or
scores, special tokens, and the chat template.

A GGUF file only names its pre-tokenizer; the rules are in llama.cpp. So a tokenizer whose rules
have no name there cannot be written.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.lm.dialogues import end_of_answers

TOKENIZER = "tokenizer.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# pre-tokenizers of byte-level BPE, by llama.cpp's names: Split patterns, and whether each digit is
# a token of its own
RULES = {
    "gpt-2": ((), False),
    "smollm": ((), True),
    "llama-bpe": ((_LLAMA_3,), False),
    "qwen2": ((_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"),), False),
}


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as a GGUF file holds it; the fields are those of `tokenizer.ggml.*`."""

    model: str  # "gpt2": byte-level BPE, "llama": SentencePiece's BPE
    pre: str  # the name of its pre-tokenizer
    tokens: tuple[str, ...]  # one per row of the embedding
    types: tuple[int, ...]
    merges: tuple[str, ...]  # of byte-level BPE
    scores: tuple[float, ...]  # of SentencePiece's
    space_prefix: bool
    special: dict[str, int]  # ids of bos, eos, unk, pad and eot, as far as they exist
    adds_bos: bool
    adds_eos: bool
    template: str | None


def vocabulary(folder: Path, tokenizer: Any, rows: int, *, chat: bool) -> GgufVocabulary:
    """The vocabulary of the tokenizer in `folder`, loaded as `tokenizer`, for an embedding with
    `rows` rows; `chat` says that the model was tuned on dialogues.

    Raises BadInput for a tokenizer that llama.cpp does not support.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise BadInput(f"the tokenizer of this model has no {TOKENIZER}; use --format hf")
    spec = json.loads(path.read_text(encoding="utf-8"))
    merges = [
        tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each)
        for each in spec["model"].get("merges", ())
    ]
    model, pre = _kind(spec)
    tokens, types = _tokens(spec, rows, model)
    scored = model == "llama"
    return GgufVocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=() if scored else tuple(f"{left} {right}" for left, right in merges),
        scores=_scores(tokens, merges) if scored else (),
        space_prefix=scored and _space_prefix(spec),
        special=_special(tokenizer, rows, chat),
        template=tokenizer.chat_template,
        **_added(tokenizer),
    )


def _kind(spec: dict[str, Any]) -> tuple[str, str]:
    """llama.cpp's names of its tokenizer model and its pre-tokenizer."""
    kind, steps = spec["model"]["type"], _steps(spec.get("pre_tokenizer"), "pretokenizers")
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        splits = tuple(s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split")
        digits = any(s["type"] == "Digits" and s["individual_digits"] for s in steps)
        others = {step["type"] for step in steps} - {"ByteLevel", "Split", "Digits"}
        for name, rules in RULES.items():
            if rules == (splits, digits) and not others:
                return "gpt2", name
        raise BadInput(
            "this model's pre-tokenizer is not among the supported ones of llama.cpp "
            f"({', '.join(RULES)}), which would read other tokens; use --format hf"
        )
    if kind == "BPE" and spec["model"].get("byte_fallback"):
        return "llama", "default"
    raise BadInput(
        f"this model's tokenizer is of kind {kind}, and llama.cpp reads Llama-type models with "
        "byte-level BPE or SentencePiece's BPE; use --format hf"
    )


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _tokens(spec: dict[str, Any], rows: int, model: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id, one per row of the embedding."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, index in spec["model"]["vocab"].items():
        if index < rows:
            is_byte = model == "llama" and len(token) == 6 and token.startswith("<0x")
            tokens[index], types[index] = token, BYTE if is_byte else NORMAL
    for added in spec.get("added_tokens", ()):
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = spec["model"].get("unk_token")
    if model == "llama" and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return tuple(tokens), tuple(types)


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, ...]]) -> tuple[float, ...]:
    """Scores in the order of the merges: SentencePiece merges the highest score first."""
    order: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        order.setdefault(left + right, -float(rank))
    return tuple(order.get(token, -float(len(merges))) for token in tokens)


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    prepends = any(
        step["type"] == "Prepend" for step in _steps(spec.get("normalizer"), "normalizers")
    )
    schemes = [
        step.get("prepend_scheme", "always")
        for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")
        if step["type"] == "Metaspace"
    ]
    return prepends or any(scheme != "never" for scheme in schemes)


def _special(tokenizer: Any, rows: int, chat: bool) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if chat:
        found["eot"] = end_of_answers(tokenizer)
    return {name: index for name, index in found.items() if index is not None and index < rows}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether it begins and ends a text with a special token."""
    ids = tokenizer("a")["input_ids"]
    return {
        "adds_bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "adds_eos": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }
