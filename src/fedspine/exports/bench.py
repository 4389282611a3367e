"""The measured costs of an exported model on this machine: latency, file size, peak memory,
parameters.

Latency is that of one forward pass over random token ids without padding, or of a net over rows of
random numbers, after a warm-up, on the CPU, in the precision and with the runtime of the folder's
format. Models are timed in turns, call by call, so that other load on the machine affects all of
them alike.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspine.core.errors import BadInput
from fedspine.core.process import peak_memory_bytes as own_peak_bytes
from fedspine.exports import llama_cpp
from fedspine.exports.agreement import Agreement, agreements, check_one_task
from fedspine.exports.card import format_of, quantize_of, weight_bytes, weights_of
from fedspine.exports.given_rows import random_rows
from fedspine.exports.load import load_model
from fedspine.exports.loaded import AnyLoaded, Loaded, LoadedNet
from fedspine.lm.fits import positions

CALLS: Mapping[int, int] = {1: 8, 32: 1}  # batch size: calls per repeat, more if they are short
WARM_UP = 2  # calls before the first measured one
TOKENS = 128  # per row


@dataclass(frozen=True)
class Bench:
    """The costs of one model; `latency_seconds` by batch size, at `tokens` per row (None: a net's
    rows) on `threads` threads.
    """

    latency_seconds: dict[int, float]  # median over repeats
    file_bytes: int  # of the weights
    peak_memory_bytes: int  # of a fresh process that runs only this model, libraries included
    parameters: int
    # of the blocks' linear weights, which sparsity refers to; None for nets
    block_parameters: int | None
    tokens: int | None
    threads: int
    format: str = "hf"
    runtime: str = "PyTorch"  # that ran it
    quantize: str | None = None  # its numbers; None if they are not stated


@dataclass(frozen=True)
class BenchComparison:
    """Two models timed in turns; every ratio is `model` over `against`, so below 1 is a gain."""

    model: Bench
    against: Bench
    latency_ratio: dict[int, float]  # median of the ratios of neighbouring calls, by batch size

    def table(self) -> dict[str, Any]:
        """Both models and the ratios, as plain data."""
        ratio = {
            "latency": self.latency_ratio,
            "block_parameters": self.block_ratio,
            "parameters": self.model.parameters / self.against.parameters,
            "file_bytes": self.file_ratio,
            "peak_memory_bytes": self.memory_ratio,
        }
        return {"model": asdict(self.model), "against": asdict(self.against), "ratio": ratio}

    @property
    def block_ratio(self) -> float | None:
        """Linear weights in the blocks; None for nets."""
        if not (self.model.block_parameters and self.against.block_parameters):
            return None
        return self.model.block_parameters / self.against.block_parameters

    @property
    def file_ratio(self) -> float:
        return self.model.file_bytes / self.against.file_bytes

    @property
    def memory_ratio(self) -> float:
        """Peak memory; the libraries' own memory is in both and pulls the ratio towards 1."""
        return self.model.peak_memory_bytes / self.against.peak_memory_bytes


def bench(
    folder: str | Path, *, tokens: int | None = None, threads: int = 1, repeats: int = 7
) -> Bench:
    """Measure the exported model in `folder`, with 128 tokens per row where `tokens` is None.

    One thread is the default because small devices have few cores, and because other processes on a
    shared machine disturb it least. Raises BadInput for a folder that cannot be loaded, for more
    tokens than the model has positions, and for tokens of a net.
    """
    model = load_model(folder, threads=threads)
    tokens = _tokens([model], tokens)
    seconds = latency_seconds(model, tokens=tokens, threads=threads, repeats=repeats)
    return _bench(folder, model, seconds, tokens, threads)


def bench_all(
    folders: Sequence[str | Path],
    *,
    tokens: int | None = None,
    threads: int = 1,
    repeats: int = 7,
    rows: str | None = None,
) -> list[tuple[Bench, Agreement]]:
    """Measure exported models of any formats side by side, call by call, and compare what they
    predict on `rows`, as `agreements` does.

    Raises what `bench` raises, and BadInput for models of different tasks.
    """
    models = [load_model(path, threads=threads) for path in folders]
    tokens = _tokens(models, tokens)
    found = agreements(models, rows)
    seconds = _seconds(models, tokens=tokens, threads=threads, repeats=repeats)
    measured = [
        _bench(path, model, {b: median(calls[i]) for b, calls in seconds.items()}, tokens, threads)
        for i, (path, model) in enumerate(zip(folders, models, strict=True))
    ]
    return list(zip(measured, found, strict=True))


def _tokens(models: Sequence[AnyLoaded], tokens: int | None) -> int | None:
    """Tokens per row: None for nets, whose rows have one shape."""
    nets = [model.net for model in models if isinstance(model, LoadedNet)]
    if nets and tokens is not None:
        raise BadInput(
            f"{nets[0]} is a net on arrays, whose rows have one shape; leave --tokens out"
        )
    return None if nets else tokens or TOKENS


def latency_seconds(
    model: AnyLoaded,
    *,
    tokens: int | None,
    threads: int = 1,
    repeats: int = 7,
    calls: Mapping[int, int] = CALLS,
) -> dict[int, float]:
    """Median seconds of a forward pass by batch size; `threads` is PyTorch's, other runtimes have
    the number of threads that the model was loaded with.
    """
    seconds = _seconds([model], tokens=tokens, threads=threads, repeats=repeats, calls=calls)
    return {batch: median(calls[0]) for batch, calls in seconds.items()}


def compare(
    folder: str | Path,
    against: str | Path,
    *,
    tokens: int | None = None,
    threads: int = 1,
    repeats: int = 7,
) -> BenchComparison:
    """Measure two exported models side by side in one process; raises what `bench_all` raises."""
    models = [load_model(path, threads=threads) for path in (folder, against)]
    check_one_task(models)
    tokens = _tokens(models, tokens)
    seconds = _seconds(models, tokens=tokens, threads=threads, repeats=repeats)
    first, second = (
        _bench(
            path,
            model,
            {batch: median(calls[index]) for batch, calls in seconds.items()},
            tokens,
            threads,
        )
        for index, (path, model) in enumerate(zip((folder, against), models, strict=True))
    )
    ratios = {
        batch: median(mine / other for mine, other in zip(*calls, strict=True))
        for batch, calls in seconds.items()
    }
    return BenchComparison(model=first, against=second, latency_ratio=ratios)


def _bench(
    folder: str | Path,
    model: AnyLoaded,
    seconds: dict[int, float],
    tokens: int | None,
    threads: int,
) -> Bench:
    return Bench(
        latency_seconds=seconds,
        file_bytes=weight_bytes(Path(folder)),
        peak_memory_bytes=peak_memory_bytes(folder, tokens=tokens, threads=threads),
        parameters=model.parameters,
        block_parameters=None if isinstance(model, LoadedNet) else model.block_parameters,
        tokens=tokens,
        threads=threads,
        format=format_of(Path(folder)),
        runtime=model.runtime,
        quantize=quantize_of(Path(folder)),
    )


def _seconds(
    models: Sequence[AnyLoaded],
    *,
    tokens: int | None,
    threads: int,
    repeats: int,
    calls: Mapping[int, int] = CALLS,
) -> dict[int, list[list[float]]]:
    """Seconds of every call, by batch size and model; the models take turns."""
    seconds: dict[int, list[list[float]]] = {batch: [[] for _ in models] for batch in calls}
    ready = {batch: [_ready(model, batch, tokens) for model in models] for batch in calls}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()  # a collection in the middle of one call would be charged to that model
    try:
        for batch in calls:
            for call in ready[batch]:
                for _ in range(WARM_UP):
                    _timed(call)
        # one batch size after the other: a large batch would evict the small one's caches
        for batch, each in calls.items():
            for _ in range(repeats * each):
                for index, call in enumerate(ready[batch]):
                    seconds[batch][index].append(_timed(call))
    finally:
        gc.enable()
        torch.set_num_threads(threads_before)
    return seconds


def _ready(model: AnyLoaded, batch: int, tokens: int | None) -> Callable[[], Any]:
    """A call of the model on random input."""
    if isinstance(model, LoadedNet):
        return partial(model.logits, random_rows(model.reads, batch).x)
    return partial(model.module, input_ids=random_ids(model, batch, tokens or TOKENS))


def _timed(call: Callable[[], Any]) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def random_ids(model: Loaded, batch: int, tokens: int) -> Tensor:
    """Token ids int64 [batch, tokens], the same at every call, without special tokens, so that none
    counts as padding.

    Raises BadInput for more tokens than the model has positions.
    """
    config = model.module.config
    room = positions(config)
    if tokens > room:
        raise BadInput(
            f"{tokens} tokens are more than the {room} positions of this model; use fewer tokens"
        )
    usual = np.setdiff1d(np.arange(config.vocab_size), model.tokenizer.all_special_ids)
    return torch.from_numpy(np.random.default_rng(0).choice(usual, (batch, tokens)))


def peak_memory_bytes(
    folder: str | Path,
    *,
    tokens: int | None = None,
    threads: int = 1,
    batches: Iterable[int] = CALLS,
) -> int:
    """Peak resident memory of a fresh process that loads this model and runs every batch size."""
    tokens = tokens or TOKENS  # which a net ignores
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    format, weights = format_of(Path(folder)), weights_of(Path(folder))
    if format == "onnx":  # without PyTorch, which a device does not need for it
        arguments = ["fedspine.exports.onnx_graph", weights, tokens, threads, *batches]
    elif format == "executorch":
        arguments = ["fedspine.exports.executorch_program", weights, tokens, threads, *batches]
    elif format == "gguf" and llama_cpp.installed():
        arguments = ["fedspine.exports.llama_cpp", weights, tokens, threads, *batches]
    else:
        arguments = ["fedspine.exports.bench", folder, tokens, threads, *batches]
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, check=False
    )
    if done.returncode < 0:  # such as by the kernel, for want of memory
        raise BadInput(
            f"the process that measures the memory of {folder} was ended by signal "
            f"{-done.returncode}; free memory, or use fewer tokens or rows"
        )
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def _main(folder: str, tokens: str, threads: str, *batches: str) -> None:
    torch.set_num_threads(int(threads))
    model = load_model(folder)
    for batch in map(int, batches):
        _timed(_ready(model, batch, int(tokens)))
    print(own_peak_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
