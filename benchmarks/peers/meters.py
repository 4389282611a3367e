"""What is measured beside time: memory of a family of processes, the matrix-product ceiling,
executed operations.
"""

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedspine.core.device import Device
from fedspine.lm.base import Model
from fedspine.lm.cost import Extent, training_flops
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.runs.assemble import assemble
from peers.loop import learner
from peers.work import Padding, Way, Work

SIDE = 2048  # of the square matrices whose product is the ceiling
CEILING_SECONDS = 2.0
COUNTED_DEVICES = 1
PR_SET_CHILD_SUBREAPER = 36
# which torch's counter leaves out
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# --- memory ---


def adopt_orphans() -> None:
    """Stay the ancestor of every process that comes of this one, so that `memory_bytes` finds them
    all.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def memory_bytes(ancestor: int) -> int:
    """Memory of a process and all that came of it: proportional set sizes, so that shared pages
    count once.
    """
    total = 0
    for pid in _family(ancestor):
        with suppress(OSError, StopIteration):  # it ended meanwhile
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


def end(ancestor: int) -> None:
    """Kill a process and all that came of it."""
    for pid in _family(ancestor):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _family(ancestor: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                stat = Path(entry.path, "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    family = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


# --- the ceiling ---


def ceiling() -> dict[str, float]:
    """Operations per second of a large matrix product, by precision, on as many one-threaded
    processes as cores.
    """
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    processes = [context.Process(target=_multiply, args=(barrier, results)) for _ in range(cores)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {precision: sum(one[precision] for one in found) for precision in ("fp32", "bf16")}


def _multiply(barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, precision in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(SIDE, SIDE).to(precision) for _ in range(2))
        left @ right
        barrier.wait()
        products, started = 0, perf_counter()
        while (seconds := perf_counter() - started) < CEILING_SECONDS:
            left @ right
            products += 1
        found[name] = products * 2 * SIDE**3 / seconds
    results.put(found)


# --- operations ---


def operations(work: Work, ways: list[Way]) -> dict[str, float]:
    """Executed operations of training per sample: of each of `ways`, of "fedspine", and by shapes
    alone of "formula".

    Counted on a few devices of the first round, and scaled by padded tokens to the whole plan. Keys
    of ways as `key`.
    """
    torch.set_num_threads(1)
    asks = [(device, asked, 0) for device, asked in work.plan[0][:COUNTED_DEVICES]]
    counted: dict[str, tuple[float, Padding]] = {}
    for way in ways:
        mine, counter = learner(work.folder, way), _counter()
        with counter:
            for ask in asks:
                mine.tune(work.initial(), *ask)
        counted[key(way)] = counter.get_total_flops(), way.padding
    ours, formula = _our_operations(work, asks)
    counted |= {"fedspine": (ours, "bucketed"), "formula": (formula, "bucketed")}
    whole = [(*who, number) for number, chosen in enumerate(work.plan) for who in chosen]
    samples = work.settings.rounds * work.settings.samples_per_round
    return {
        name: total * _tokens(work, whole, padding) / _tokens(work, asks, padding) / samples
        for name, (total, padding) in counted.items()
    }


def key(way: Way) -> str:
    """What tells the operations of one way of training from another's."""
    return f"{way.padding} {way.attention}"


def _our_operations(work: Work, asks: list[tuple[int, int, int]]) -> tuple[float, float]:
    base = assemble(work.recipe(precision="bf16")).task.base
    names = work.initial()
    head = {name: tensor for name, tensor in names.items() if ".lora_" not in name}
    adapter = {name: tensor for name, tensor in names.items() if ".lora_" in name}
    model = Model(
        structure=full(base.layout), adapter=adapter, head=head, scale=work.settings.scale
    )
    counter, formula = _counter(), 0.0
    for index, asked, number in asks:
        data = work.train.take(work.shares[index])
        rng = np.random.default_rng((work.settings.seed, index, asked))
        device = Device(id=str(index), data=data, base=base, memory={}, rng=rng)
        with counter:
            tune(device, model, work.tuning(number))
        shapes = [
            inputs["input_ids"].shape for inputs in work.inputs(index, asked, number, "bucketed")
        ]
        extent = Extent(
            sum(rows * tokens for rows, tokens in shapes), sum(rows * n**2 for rows, n in shapes)
        )
        formula += training_flops(base.layout, model.structure, work.settings.rank, extent)
    return counter.get_total_flops(), formula


def _tokens(work: Work, asks: list[tuple[int, int, int]], padding: Padding) -> int:
    """Tokens of all batches of these asks, padding included."""
    return sum(inputs["input_ids"].numel() for ask in asks for inputs in work.inputs(*ask, padding))


def _counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False, custom_mapping={FLASH: _flash, FLASH_BACKWARD: _flash_backward}
    )


def _flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _flash_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
