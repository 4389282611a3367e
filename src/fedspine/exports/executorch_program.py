"""ExecuTorch programs: written from a module for XNNPACK's kernels, and run.

Only this file imports ExecuTorch.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.process import peak_memory_bytes
from fedspine.exports.signature import IDS, MASK, SEGMENTS, Signature

MISSING = "ExecuTorch is not installed; pip install 'fedspine[executorch]'"

MOST_ROWS = 32  # the memory of a program is planned for its largest input
MOST_TOKENS = "get_max_seq_len"  # the constant that ExecuTorch's own language models have


def check_installed() -> None:
    """Raise BadInput if ExecuTorch is missing."""
    if not find_spec("executorch"):
        raise BadInput(MISSING)


def write(module: nn.Module, path: Path, signature: Signature, *, tokens: int) -> None:
    """Write a module as an fp32 program for up to 32 rows of up to `tokens` tokens.

    Raises BadInput if ExecuTorch is missing, and for a module that cannot be exported.
    """
    check_installed()
    try:
        with _quiet():
            path.write_bytes(_lowered(module, signature, tokens))
    except Exception as error:  # the exporter raises many types, with messages of several lines
        reason = reason_of(error)
        raise BadInput(
            f"ExecuTorch cannot export this model ({reason}); use --format hf or --format onnx"
        ) from error


def _lowered(module: nn.Module, signature: Signature, tokens: int) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torch.export import Dim, export

    free = {"rows": Dim("rows", max=MOST_ROWS), "tokens": Dim("tokens", max=tokens)}
    shapes = {
        name: {axis: free[dimension] for axis, dimension in each.items()}
        for name, each in signature.free.items()
    }
    arguments = dict(signature.example)
    program = export(module.eval(), (), arguments, dynamic_shapes=shapes, strict=False)
    lowered = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods={MOST_TOKENS: tokens}
    )
    found: bytes = lowered.to_executorch().buffer
    return found


class _ThreadPool:
    """The runtime's thread pool, of which a process has one. A new number of threads needs a new
    pool, and a method that was loaded before it would crash.
    """

    def __init__(self) -> None:
        self._changes = 0

    def set(self, threads: int | None) -> int:
        """Use this many threads (None: no change); returns how often the pool has changed."""
        from executorch.extension.pybindings import portable_lib

        if threads not in (None, portable_lib._threadpool_get_thread_count()):
            with _quiet():
                portable_lib._unsafe_reset_threadpool(threads)
            self._changes += 1
        return self._changes


_POOL = _ThreadPool()


class Program:
    """A program in ExecuTorch's runtime on the CPU; `threads` None: as many as the process has.

    Raises BadInput for a file that is not a program, and if ExecuTorch is missing.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        check_installed()
        self._path, self._threads = path, threads
        try:
            with _quiet():
                self._pool = _POOL.set(threads)
                self._load()
                (self.most_tokens,) = self._program.load_method(MOST_TOKENS).execute([])
        except Exception as error:  # the runtime raises RuntimeError and others
            reason = reason_of(error)
            raise BadInput(f"{path} cannot be read ({reason}); export the model again") from None
        self.inputs = (IDS, MASK, SEGMENTS)[: self._forward.metadata.num_inputs()]

    def _load(self) -> None:
        from executorch.runtime import Runtime, Verification

        self._program = Runtime.get().load_program(
            self._path, verification=Verification.InternalConsistency
        )
        self._forward = self._program.load_method("forward")

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """fp32 [rows, classes], of inputs by name, int64 [rows, tokens] each.

        Inputs that the program does not read are ignored; missing segments are those of the first
        text. Raises BadInput for more tokens than it reads.
        """
        rows, tokens = inputs[IDS].shape
        if tokens > self.most_tokens:
            raise BadInput(
                f"a row has {tokens} tokens, but this program reads at most {self.most_tokens}; "
                "use fewer tokens"
            )
        if (pool := _POOL.set(self._threads)) != self._pool:
            self._pool = pool
            with _quiet():
                self._load()
        given = [inputs.get(name, np.zeros_like(inputs[IDS])) for name in self.inputs]
        found = []
        for first in range(0, rows, MOST_ROWS):
            part = [torch.tensor(each[first : first + MOST_ROWS]) for each in given]
            (logits,) = self._forward.execute(part)
            found.append(logits.numpy().copy())  # the next call writes to the same memory
        return np.concatenate(found)

    def example(self, rows: int, tokens: int) -> dict[str, np.ndarray]:
        """Inputs of this size."""
        ids = np.ones((rows, tokens), np.int64)
        return {IDS: ids, MASK: ids}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' messages about their own code and the processor, in C++ too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stderr.flush()
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(nowhere)
        logging.disable(before)


def _main(path: str, tokens: str, threads: str, *batches: str) -> None:
    program = Program(Path(path), int(threads))
    for batch in batches:
        program.logits(program.example(int(batch), int(tokens)))
    print(peak_memory_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
