"""Tokenised data on disk: made once for a text, a tokenizer and a length, then memory-mapped by
every run and worker.

One folder for each, named by a digest of all that went in, below `$FEDSPINE_CACHE` or the user's
cache folder. Nothing depends on it: where it cannot be written or read, texts are tokenised again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fedspine.core.task import Examples, TaskKind
from fedspine.data.dataset import Rows
from fedspine.lm.dialogues import template_of
from fedspine.lm.encode import encode

ABOUT = "examples.json"
KEPT = 32  # folders; the ones not used for longest make way
FORMAT = "3"  # changes whenever the same input gives other tokens
_UNUSABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
)  # the last: there is no home
_SETTINGS = (
    "pad_token_id",
    "eos_token_id",
    "padding_side",
    "truncation_side",
    "model_input_names",
)  # beside the tokenizer proper


def tokens(
    tokenizer: Any,
    rows: Rows,
    kind: TaskKind,
    max_tokens: int,
    *,
    scored: bool = False,
    bi_encoder: bool = False,
    folder: Path | None = None,
    kept: int | None = None,
) -> Examples:
    """The result of `encode`, memory-mapped if it could be stored: among `kept` (None: `KEPT`) in a
    cache folder, by default the user's.
    """
    how = {"scored": scored, "bi_encoder": bi_encoder}
    key = _key(tokenizer, rows, kind, max_tokens, **how)
    if key is None:
        return encode(tokenizer, rows, kind, max_tokens, **how)
    with suppress(*_UNUSABLE):
        return _open_stored((folder or home()) / "tokens" / key)
    examples = encode(tokenizer, rows, kind, max_tokens, **how)
    with suppress(*_UNUSABLE):
        _store(examples, (folder or home()) / "tokens" / key, kept or KEPT)
        return _open_stored((folder or home()) / "tokens" / key)
    return examples


def home() -> Path:
    """The cache folder."""
    if named := os.environ.get("FEDSPINE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedspine"


def written(tokenizer: Any) -> list[Any] | None:
    """A tokenizer's complete definition as JSON data; None for one that cannot be serialised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    lasting = json.loads(backend.to_str()) | {
        "truncation": None,
        "padding": None,
    }  # what the last call left behind
    return [[getattr(tokenizer, name, None) for name in _SETTINGS], lasting]


def _key(
    tokenizer: Any, rows: Rows, kind: TaskKind, max_tokens: int, *, scored: bool, bi_encoder: bool
) -> str | None:
    """A digest of all that the tokens depend on; None for a tokenizer that cannot be serialised."""
    settings = written(tokenizer)
    if settings is None:
        return None
    digest = hashlib.sha256()
    # rows with labels are the same whatever they are for
    use = "scored" if scored and kind == "causal-lm" else "trained on"
    parts = [FORMAT, json.dumps(settings), kind, str(max_tokens), use]
    if bi_encoder:
        parts.append("bi-encoder")
    if rows.dialogues is not None:
        parts.append(json.dumps(template_of(tokenizer)))
    for part in (*parts, *_texts(rows)):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(
        b"" if rows.labels is None else np.ascontiguousarray(rows.labels, np.int64).tobytes()
    )
    return digest.hexdigest()[:32]


def _texts(rows: Rows) -> Iterator[str]:
    yield from rows.texts
    if rows.pairs is not None:
        yield "pairs"
        yield from rows.pairs
    if rows.dialogues is not None:
        yield "dialogues"
        yield from (json.dumps(dialogue.messages) for dialogue in rows.dialogues)


def _store(examples: Examples, folder: Path, kept: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        arrays = dict(_arrays(examples))
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        about = {
            "padding": examples.padding,
            "arrays": {name: _digest(array) for name, array in arrays.items()},
        }
        (partial / ABOUT).write_text(json.dumps(about))
        if (
            folder.exists()
        ):  # damaged, or just stored by another process; nobody may see it half removed
            os.rename(folder, partial / "before")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder / "before", ignore_errors=True)
    there = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for old in there[:-kept]:
        shutil.rmtree(old, ignore_errors=True)


def _open_stored(folder: Path) -> Examples:
    """Raises one of _UNUSABLE for a folder that is not there, not whole or not what was stored."""
    about = json.loads((folder / ABOUT).read_text())
    arrays = {}
    for name, digest in about["arrays"].items():
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
        if _digest(arrays[name]) != digest:
            raise ValueError(f"{folder / name} is damaged")
    with suppress(OSError):  # of others, which we may only read
        os.utime(folder)
    return Examples(**{"labels": None, "segments": None, "padding": about["padding"]} | arrays)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _arrays(examples: Examples) -> Iterator[tuple[str, np.ndarray]]:
    for field in fields(examples):
        value = getattr(examples, field.name)
        if isinstance(value, np.ndarray):
            yield field.name, value
