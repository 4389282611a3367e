"""Models in `.gguf` files, those of llama.cpp: dequantised once, into an ordinary model folder.

The folder lies in the cache, under the digest of the file, and appears there only when all of it is
written. Its weights are what the file's quantised numbers stand for, in fp32; what the authors
trained is another thing. The only file that reads models with the `gguf` package;
`exports/gguf_file.py` writes them.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedspine.core.errors import BadInput, listed, reason_of
from fedspine.lm.prunable_layout import UNIT_MAPS
from fedspine.lm.tokens import home

SUFFIX = ".gguf"
FORMAT = "1"  # changes whenever the same file becomes another folder
EXTRA = "pip install 'fedspine[gguf]'"
WEIGHTS = "model.safetensors"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of such a file.

    >>> is_gguf("models/SmolLM2.Q4_1.GGUF"), is_gguf("gguf")
    (True, False)
    """
    return name.lower().endswith(SUFFIX)


def model_folder(file: Path) -> Path:
    """The folder with the dequantised model of `file`, made where the cache has none.

    Raises BadInput for a file that is missing, damaged or of an architecture that has no unit map,
    where the package `gguf` is not installed, and where the cache cannot be written.
    """
    _check_there(file)
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    try:
        folder = home() / "gguf" / f"{digest[:32]}-{FORMAT}"
    except RuntimeError as error:  # there is no home
        raise _unwritable(error) from None
    if not (folder / WEIGHTS).is_file():
        check_architecture(file)
        _make(file, folder)
    return folder


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise BadInput(f"expected a model in {file}, found no file there; check the path")


def check_architecture(file: Path) -> None:
    """Raise BadInput for a file that is missing or damaged, or whose header names an architecture
    without a unit map; no weight is read.
    """
    _check_there(file)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput(f"{file.name} is read with the package gguf; {EXTRA}") from None
    try:
        found = GGUFReader(file).get_field("general.architecture").contents()
    except Exception as error:  # the package checks little of what it reads
        raise _unreadable(file, error) from None
    # llama.cpp calls Mistral's architecture "llama", as it is
    known = [name for name, units in UNIT_MAPS.items() if units.decoder]
    if found not in known:
        raise BadInput(
            f"{file.name} holds a model of architecture {found!r}, whose heads and channels are "
            f"not known, so it cannot be pruned; take one of: {listed(known)}"
        )


def _make(file: Path, folder: Path) -> None:
    """Write the folder beside its place, then give it its name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(error) from None
    try:
        _write(file, partial)
        with suppress(FileExistsError, NotADirectoryError):
            os.replace(partial, folder)
    except OSError as error:
        if not (folder / WEIGHTS).is_file():  # which another process may have made meanwhile
            raise _unwritable(error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(file: Path, folder: Path) -> None:
    tokenizer, module = read_model(file)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_made_up(folder / "tokenizer.json", module.config.vocab_size)


def read_model(file: Path) -> tuple[Any, Any]:
    """The tokenizer and the dequantised module of a file, as transformers reads them.

    Raises BadInput for a file that it cannot read, OSError where the disk fails.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    named = {"gguf_file": file.name}
    try:
        with redirect_stderr(io.StringIO()):  # a bar that no setting of the library hides
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
            module = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
    except OSError:
        raise
    except Exception as error:  # whatever the library meets in it
        raise _unreadable(file, error) from None
    _forget_quantisation(module)
    return tokenizer, module


def _forget_quantisation(module: Any) -> None:
    """Make a dequantised module an ordinary one, which its library refuses to save otherwise."""
    del module.config.quantization_config
    module.is_quantized = False
    module.hf_quantizer = None


def _forget_made_up(path: Path, rows: int) -> None:
    """Drop special tokens that the library adds to each tokenizer of a kind, beyond the embedding's
    `rows`, and that the file does not have.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    tokenizer["added_tokens"] = [token for token in added if token["id"] < rows]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _unreadable(file: Path, error: Exception) -> BadInput:
    reason = reason_of(error)
    return BadInput(
        f"{file.name} cannot be read as GGUF ({type(error).__name__}: {reason}); copy the file "
        "again, or take another one"
    )


def _unwritable(error: Exception) -> BadInput:
    reason = getattr(error, "strerror", None) or error
    return BadInput(
        f"the cache cannot hold the dequantised model ({reason}); name a folder with room in "
        "FEDSPINE_CACHE"
    )
