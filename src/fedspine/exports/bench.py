"""The measured costs of an exported model on this machine: latency, file size, peak memory,
parameters.

Latency is that of one forward pass over random token ids without padding, after a warm-up, on the
CPU, in the precision and with the runtime of the folder's format. Models are timed in turns, call
by call, so that other load on the machine affects all of them alike.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspine.core.errors import BadInput
from fedspine.core.process import peak_memory_bytes as own_peak_bytes
from fedspine.exports import llama_cpp
from fedspine.exports.agreement import Agreement, agreements, comparable
from fedspine.exports.card import format_of, weight_bytes, weights_of
from fedspine.exports.load import load_model
from fedspine.exports.loaded import Loaded
from fedspine.lm.fits import positions

CALLS: Mapping[int, int] = {1: 8, 32: 1}  # batch size: calls per repeat, more if they are short
WARM_UP = 2  # calls before the first measured one


@dataclass(frozen=True)
class Bench:
    """The costs of one model; `latency_seconds` by batch size, at `tokens` per row on `threads`
    threads.
    """

    latency_seconds: dict[int, float]  # median over repeats
    file_bytes: int  # of the weights
    peak_memory_bytes: int  # of a fresh process that runs only this model, libraries included
    parameters: int
    block_parameters: int  # of the blocks' linear weights, which sparsity refers to
    tokens: int
    threads: int
    format: str = "hf"
    runtime: str = "PyTorch"  # that ran it


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
    def block_ratio(self) -> float:
        """Linear weights in the blocks."""
        return self.model.block_parameters / self.against.block_parameters

    @property
    def file_ratio(self) -> float:
        return self.model.file_bytes / self.against.file_bytes

    @property
    def memory_ratio(self) -> float:
        """Peak memory; the libraries' own memory is in both and pulls the ratio towards 1."""
        return self.model.peak_memory_bytes / self.against.peak_memory_bytes


def bench(folder: str | Path, *, tokens: int = 128, threads: int = 1, repeats: int = 7) -> Bench:
    """Measure the exported model in `folder`.

    One thread is the default because small devices have few cores, and because other processes on a
    shared machine disturb it least. Raises BadInput for a folder that cannot be loaded and for more
    tokens than the model has positions.
    """
    model = load_model(folder, threads=threads)
    seconds = latency_seconds(model, tokens=tokens, threads=threads, repeats=repeats)
    return _bench(folder, model, seconds, tokens, threads)


def bench_all(
    folders: Sequence[str | Path],
    *,
    tokens: int = 128,
    threads: int = 1,
    repeats: int = 7,
    rows: str | None = None,
) -> list[tuple[Bench, Agreement | None]]:
    """Measure exported models of any formats side by side, call by call, and compare what they
    predict on `rows`, or on random words (None for models of different tasks).

    Raises what `bench` raises, and with `rows` BadInput for models of different tasks.
    """
    models = [load_model(path, threads=threads) for path in folders]
    found: list[Agreement | None] = [None] * len(models)
    if rows is not None or comparable(models):
        found = [*agreements(models, rows)]
    seconds = _seconds(models, tokens=tokens, threads=threads, repeats=repeats)
    measured = [
        _bench(path, model, {b: median(calls[i]) for b, calls in seconds.items()}, tokens, threads)
        for i, (path, model) in enumerate(zip(folders, models, strict=True))
    ]
    return list(zip(measured, found, strict=True))


def latency_seconds(
    model: Loaded,
    *,
    tokens: int,
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
    tokens: int = 128,
    threads: int = 1,
    repeats: int = 7,
) -> BenchComparison:
    """Measure two exported models side by side in one process; raises what `bench` raises."""
    models = [load_model(path, threads=threads) for path in (folder, against)]
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
    folder: str | Path, model: Loaded, seconds: dict[int, float], tokens: int, threads: int
) -> Bench:
    return Bench(
        latency_seconds=seconds,
        file_bytes=weight_bytes(Path(folder)),
        peak_memory_bytes=peak_memory_bytes(folder, tokens=tokens, threads=threads),
        parameters=model.parameters,
        block_parameters=model.block_parameters,
        tokens=tokens,
        threads=threads,
        format=format_of(Path(folder)),
        runtime=model.runtime,
    )


def _seconds(
    models: Sequence[Loaded],
    *,
    tokens: int,
    threads: int,
    repeats: int,
    calls: Mapping[int, int] = CALLS,
) -> dict[int, list[list[float]]]:
    """Seconds of every call, by batch size and model; the models take turns."""
    seconds: dict[int, list[list[float]]] = {batch: [[] for _ in models] for batch in calls}
    inputs = {batch: [random_ids(model, batch, tokens) for model in models] for batch in calls}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()  # a collection in the middle of one call would be charged to that model
    try:
        for batch in calls:
            for index, model in enumerate(models):
                for _ in range(WARM_UP):
                    _call(model, inputs[batch][index])
        # one batch size after the other: a large batch would evict the small one's caches
        for batch, each in calls.items():
            for _ in range(repeats * each):
                for index, model in enumerate(models):
                    seconds[batch][index].append(_call(model, inputs[batch][index]))
    finally:
        gc.enable()
        torch.set_num_threads(threads_before)
    return seconds


def _call(model: Loaded, ids: Tensor) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        model.module(input_ids=ids)
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
    folder: str | Path, *, tokens: int = 128, threads: int = 1, batches: Iterable[int] = CALLS
) -> int:
    """Peak resident memory of a fresh process that loads this model and runs every batch size."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    format, weights = format_of(Path(folder)), weights_of(Path(folder))
    if format == "onnx":  # without PyTorch, which a device does not need for it
        arguments = ["fedspine.exports.onnx_graph", weights, tokens, threads, *batches]
    elif format == "gguf" and llama_cpp.installed():
        arguments = ["fedspine.exports.llama_cpp", weights, tokens, threads, *batches]
    else:
        arguments = ["fedspine.exports.bench", folder, tokens, threads, *batches]
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def _main(folder: str, tokens: str, threads: str, *batches: str) -> None:
    torch.set_num_threads(int(threads))
    model = load_model(folder)
    for batch in map(int, batches):
        _call(model, random_ids(model, batch, int(tokens)))
    print(own_peak_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
