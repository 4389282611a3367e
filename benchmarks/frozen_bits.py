"""What `run.frozen_bits` saves and costs a decoder: `python benchmarks/frozen_bits.py MODEL DATA`.

For unquantised, 8-bit and 4-bit weights, a fresh process each loads the model, is measured, scores
the first windows of DATA's test rows without any tuning, and trains an adapter of rank 8 on a few
rows. The table has the resident memory of the process, the bytes of its frozen weights, and what
the simulator charges. It is printed to the standard output.
"""

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from fedspine.core.process import limit_onednn_cache, peak_memory_bytes

RANK, BATCH, STEPS = 8, 4, 2
BITS = (None, 8, 4)


def measured(model: str, data: str, bits: int | None, rows: int, tokens: int) -> dict[str, float]:
    """The table's entries for these bits, measured in this process."""
    import numpy as np
    import torch

    from fedspine.core.device import Device
    from fedspine.lm.base import Model
    from fedspine.lm.lora import fresh
    from fedspine.lm.score import score_module
    from fedspine.lm.structure import full
    from fedspine.lm.tune import tune
    from fedspine.lm.tuning import Tuning
    from fedspine.runs.assemble import assemble
    from fedspine.runs.config import Recipe

    torch.set_num_threads(1)
    recipe = Recipe(
        method="fedlora",
        model=model,
        data=data,
        kind="causal-lm",
        max_tokens=tokens,
        devices=1,
        partition="iid",
        precision="fp32",
        frozen_bits=bits,
    )
    task = assemble(recipe).task
    base, rng = task.base, np.random.default_rng(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # counts the peak anew
    loaded = peak_memory_bytes()
    model_of = Model(
        structure=full(base.layout),
        adapter=fresh(base.layout.sites, RANK, rng),
        head=base.initial_head(rng),
        scale=2.0,
    )
    device = Device(id="d", data=task.train, base=base, memory={}, rng=rng)
    begun = time.perf_counter()
    tune(device, model_of, Tuning(steps=STEPS, batch=BATCH, learning_rate=1e-3))
    step = (time.perf_counter() - begun) / STEPS
    peak = peak_memory_bytes()
    untuned = Model(structure=full(base.layout), adapter={}, head=base.initial_head(rng), scale=1.0)
    test = task.test.take(np.arange(min(rows, len(task.test))))
    loss = score_module(base.fit(untuned), test).mean_loss
    weights = [weight for weight, _ in base.weights.values()]
    held = sum(getattr(weight, "bytes", getattr(weight, "nbytes", 0)) for weight in weights)
    return {
        "held": held,
        "loaded": loaded,
        "peak": peak,
        "charged": device.peak_memory_bytes,
        "step": step,
        "loss": loss,
        "windows": len(test),
    }


def main(given: argparse.Namespace) -> None:
    print(
        "| frozen weights | weights of the blocks, MB | process, loaded, MB | its peak in training,"
        " MB | charged, MB | a step, s | loss | perplexity |\n" + "|---" * 8 + "|"
    )
    for bits in BITS:
        words = [sys.executable, __file__, given.model, given.data, "--bits", str(bits or 0)]
        words += ["--rows", str(given.rows), "--tokens", str(given.tokens)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [
            "fp32" if bits is None else f"{bits} bits",
            *(f"{found[name] / 1e6:.1f}" for name in ("held", "loaded", "peak", "charged")),
            f"{found['step']:.2f}",
            f"{found['loss']:.4f}",
            f"{math.exp(found['loss']):.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{found['windows']:.0f} windows of {given.tokens} tokens; batches of {BATCH} rows.")


if __name__ == "__main__":
    limit_onednn_cache()
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("model")
    words.add_argument("data")
    words.add_argument("--rows", type=int, default=100, help="windows that are scored")
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.bits is None:
        main(asked)
    else:
        sizes = asked.rows, asked.tokens
        print(json.dumps(measured(asked.model, asked.data, asked.bits or None, *sizes)))
