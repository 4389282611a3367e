"""Tokenised data on disk: made once for a text, a tokenizer and a length, then memory-mapped by every run and worker.

One folder for each, named by a digest of all that went in, below `$FEDSPINE_CACHE` or the user's cache folder. Nothing
depends on it: where it cannot be written or read, texts are tokenised again.
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

from fedspine.data.tasks import Rows
from fedspine.lm.encode import encode
from fedspine.task import Examples, Kind

FORMAT = "1"  # changes whenever the same input gives other tokens
KEPT = 32  # folders; the ones not used for longest make way


def tokens(tokenizer: Any, rows: Rows, kind: Kind, max_tokens: int) -> Examples:
    """What `encode` gives, memory-mapped where it could be stored."""
    key = _key(tokenizer, rows, kind, max_tokens)
    if key is None:
        return encode(tokenizer, rows, kind, max_tokens)
    folder = home() / "tokens" / key
    try:
        return _opened(folder)
    except (OSError, ValueError, KeyError):
        examples = encode(tokenizer, rows, kind, max_tokens)
    with suppress(OSError, ValueError, KeyError):
        _store(examples, folder)
        return _opened(folder)
    return examples


def home() -> Path:
    """The folder for what can be made again."""
    if named := os.environ.get("FEDSPINE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedspine"


def _key(tokenizer: Any, rows: Rows, kind: Kind, max_tokens: int) -> str | None:
    """A digest of all that the tokens depend on; None for a tokenizer that cannot be written down."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    written = json.loads(backend.to_str())
    written |= {"truncation": None, "padding": None}  # what the last call left behind
    digest = hashlib.sha256()
    for part in (FORMAT, type(tokenizer).__name__, json.dumps(written), kind, str(max_tokens), *_texts(rows)):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(b"" if rows.labels is None else np.ascontiguousarray(rows.labels, np.int64).tobytes())
    return digest.hexdigest()[:32]


def _texts(rows: Rows) -> Iterator[str]:
    yield from rows.texts
    if rows.pairs is not None:
        yield "pairs"
        yield from rows.pairs


def _store(examples: Examples, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, array in _arrays(examples):
            np.save(partial / f"{name}.npy", array)
        (partial / "examples.json").write_text(json.dumps({"padding": examples.padding}))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    there = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for old in there[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _opened(folder: Path) -> Examples:
    padding = json.loads((folder / "examples.json").read_text())["padding"]
    names = [field.name for field in fields(Examples) if field.name != "padding"]
    arrays = {name: _mapped(folder / f"{name}.npy") for name in names}
    if arrays["ids"] is None or arrays["offsets"] is None or len(arrays["ids"]) != int(arrays["offsets"][-1]):
        raise ValueError(f"{folder} is damaged")
    os.utime(folder)
    return Examples(padding=padding, **arrays)


def _mapped(path: Path) -> np.ndarray | None:
    return np.load(path, mmap_mode="r").view(np.ndarray) if path.exists() else None


def _arrays(examples: Examples) -> Iterator[tuple[str, np.ndarray]]:
    for field in fields(examples):
        value = getattr(examples, field.name)
        if isinstance(value, np.ndarray):
            yield field.name, value
