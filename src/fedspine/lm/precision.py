"""The precision of the frozen base: bf16 where this machine multiplies it faster, else fp32.

A processor without AVX512_BF16, AMX or Arm's BF16 takes a bf16 product apart and is five times
slower than in fp32. What a processor says it offers is not what a library uses, so the decision is
measured, which takes a fraction of a second. GPUs multiply bf16 in their tensor cores from compute
capability 8.0 on.
"""

from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]

SHAPE = (256, 384, 1536)  # rows, inputs and outputs of the product: a feed-forward layer of MiniLM
TIMES = 3  # repetitions, of which the fastest counts
FIRST_GPU = (8, 0)  # compute capability


@dataclass(frozen=True)
class Choice:
    """The precision to use, and one line that says why."""

    precision: Precision
    line: str


def choose(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Choice | None:
    """The choice for "auto"; for an explicit precision None, or a warning if it is slow here."""
    if wanted == "fp32":
        return None
    if device.type == "cuda":
        fast, why = torch.cuda.get_device_capability(device) >= FIRST_GPU, "by the GPU's generation"
    else:
        ratio = bf16_speed()
        fast, why = ratio > 1, f"measured: bf16 products take {1 / ratio:.2g} times as long as fp32"
    if wanted == "auto":
        precision: Precision = "bf16" if fast else "fp32"
        return Choice(precision, f"precision {precision} ({why})")
    if fast:
        return None
    return Choice(
        "bf16",
        f"warning: run.precision is bf16, which is slow here ({why}); fp32 or auto is faster",
    )


@cache
def bf16_speed() -> float:
    """How many times faster this processor multiplies in bf16 than in fp32, on one thread."""
    rows, inputs, outputs = SHAPE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
        return _seconds(x, weight.T) / _seconds(x.bfloat16(), weight.bfloat16().T)
    finally:
        torch.set_num_threads(threads)


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    x @ weight  # the first call prepares the kernel
    best = float("inf")
    for _ in range(TIMES):
        begun = perf_counter()
        x @ weight
        best = min(best, perf_counter() - begun)
    return best
