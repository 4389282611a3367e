"""llama.cpp through the packages llama-cpp-python and cyllama: runs GGUF files and quantises them.

Only this file imports either. PyTorch is not imported, so that the peak memory of a process that
runs a file (`python -m fedspine.exports.llama_cpp`) is the runtime's own.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.core.process import peak_memory_bytes

PACKAGES = {"llama_cpp": "llama-cpp-python", "cyllama": "cyllama"}  # by module, preferred first
EXTRA = "pip install 'fedspine[llama]', which compiles, or pip install cyllama, a wheel"
QUANTISERS = {"q4_k_m": 15}  # llama_ftype of llama.h: LLAMA_FTYPE_MOSTLY_Q4_K_M
STEP = 256  # llama.cpp rounds the length of a context up to a multiple of it


class Context(Protocol):
    """A batch of rows of one model in llama.cpp, each with its own cache."""

    def decode(self, rows: Sequence[Sequence[int]], start: int = 0) -> None:
        """Read these next tokens of each row, whose positions begin at `start`."""

    def logits(self, places: Sequence[int]) -> np.ndarray:
        """fp32 [places, vocabulary] of the last `decode`; places count over all rows in order."""

    def clear(self) -> None:
        """Forget all tokens."""


def installed() -> str | None:
    """The installed package with llama.cpp, None without one."""
    return next((package for name, package in PACKAGES.items() if find_spec(name)), None)


def runtime() -> str:
    """llama.cpp with the name and version of its package, in words.

    Raises BadInput if none is installed.
    """
    package = installed()
    if package is None:
        raise BadInput(f"llama.cpp is not installed; {EXTRA}")
    return f"llama.cpp ({package} {version(package)})"


class File:
    """A GGUF file in llama.cpp.

    Raises BadInput if no package is installed, and for a file that llama.cpp cannot read.
    """

    def __init__(self, path: Path, threads: int) -> None:
        runtime()
        self._path, self._threads = path, threads
        self._library = _Compiled if find_spec("llama_cpp") else _Wheel
        self._model = self._library.model(path)

    def context(self, rows: int, tokens: int) -> Context:
        """A context with room for `rows` rows of `tokens` tokens each."""
        made: Context = self._library(self._model, rows, -(-tokens // STEP) * STEP, self._threads)
        return made


def quantise(source: Path, target: Path, how: str) -> None:
    """Write the F16 file `source` as `target`, quantised by `how`, a key of `QUANTISERS`.

    Raises BadInput if llama.cpp is not installed or refuses.
    """
    runtime()
    library = _Compiled if find_spec("llama_cpp") else _Wheel
    if library.quantise(source, target, QUANTISERS[how]) or not target.is_file():
        raise BadInput(f"llama.cpp cannot write {how}; use --quantize f16 or q8_0")


class _Wheel:
    """The context of cyllama."""

    @staticmethod
    def model(path: Path) -> Any:
        from cyllama.llama import llama_cpp as library

        library.disable_logging()

        class WithVocabulary(library.LlamaModel):  # type: ignore[misc, name-defined]
            @property
            def n_vocab(self) -> int:  # a context of 0.2.18 expects it here
                return int(self.get_vocab().n_vocab)

        try:
            return WithVocabulary(str(path), library.LlamaModelParams())
        except Exception as error:  # it raises many types
            raise _unreadable(path) from error

    def __init__(self, model: Any, rows: int, tokens: int, threads: int) -> None:
        from cyllama.llama import llama_cpp as library

        self._library, self._rows, self._most = library, rows, rows * tokens
        settings = library.LlamaContextParams()
        settings.n_ctx = settings.n_batch = self._most
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.LlamaContext(model, settings)

    def decode(self, rows: Sequence[Sequence[int]], start: int = 0) -> None:
        batch = self._library.LlamaBatch(n_tokens=self._most, embd=0, n_seq_max=self._rows)
        for row, tokens in enumerate(rows):
            for place, token in enumerate(tokens):
                batch.add(int(token), start + place, [row], True)
        if self._context.decode(batch):
            raise _refused()

    def logits(self, places: Sequence[int]) -> np.ndarray:
        return np.array([self._context.get_logits_ith(place) for place in places], np.float32)

    def clear(self) -> None:
        self._context.kv_cache_clear()

    @staticmethod
    def quantise(source: Path, target: Path, how: int) -> bool:
        from cyllama.llama import llama_cpp as library

        library.disable_logging()
        settings = library.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = how, 1
        return bool(library.model_quantize(str(source), str(target), settings))


class _Compiled:
    """The context of llama-cpp-python, whose functions are those of llama.h."""

    @staticmethod
    def model(path: Path) -> Any:
        import llama_cpp as library

        _silence(library)
        library.llama_backend_init()
        model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        if not model:
            raise _unreadable(path)
        return model

    def __init__(self, model: Any, rows: int, tokens: int, threads: int) -> None:
        import llama_cpp as library

        self._library, self._most = library, rows * tokens
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self._most
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, settings)
        if not self._context:
            raise _refused()
        words = library.llama_model_get_vocab(model)
        self._vocabulary = library.llama_vocab_n_tokens(words)
        self._batch = library.llama_batch_init(self._most, 0, rows)
        finalize(self, library.llama_free, self._context)
        finalize(self, library.llama_batch_free, self._batch)

    def decode(self, rows: Sequence[Sequence[int]], start: int = 0) -> None:
        batch, count = self._batch, 0
        for row, tokens in enumerate(rows):
            for place, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = int(token), start + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = True
                count += 1
        batch.n_tokens = count
        if self._library.llama_decode(self._context, batch):
            raise _refused()

    def logits(self, places: Sequence[int]) -> np.ndarray:
        # the logits of all rows in one block, in the order of the batch
        first = self._library.llama_get_logits(self._context)
        shape = (self._batch.n_tokens, self._vocabulary)
        return np.ctypeslib.as_array(first, shape=shape)[list(places)]

    def clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    @staticmethod
    def quantise(source: Path, target: Path, how: int) -> bool:
        import llama_cpp as library

        _silence(library)
        settings = library.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = how, 1
        names = (str(source).encode(), str(target).encode())
        return bool(library.llama_model_quantize(*names, ctypes.byref(settings)))


def _silence(library: Any) -> None:
    library.llama_log_set(_silent(library), ctypes.c_void_p(0))


@cache
def _silent(library: Any) -> Any:
    """A callback that discards log lines, kept since C holds no reference to it."""
    return library.llama_log_callback(lambda level, text, data: None)


def _unreadable(path: Path) -> BadInput:
    return BadInput(f"llama.cpp cannot read {path}; export the model again, or use another file")


def _refused() -> BadInput:
    return BadInput("llama.cpp has no room for so many tokens; use fewer tokens or rows")


def _main(path: str, tokens: str, threads: str, *batches: str) -> None:
    file = File(Path(path), int(threads))
    for rows in map(int, batches):
        # token id 1, since the vocabulary may be tiny
        file.context(rows, int(tokens)).decode([[1] * int(tokens)] * rows)
    print(peak_memory_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
