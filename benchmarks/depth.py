"""What LoRA depth saves a device: `python benchmarks/depth.py` writes results/depth.md.

Six-layer MiniLM with adapters of rank 8 on all six blocks and on the last two. On two blocks it
trains in two ways: each step computes the four frozen blocks, or the input of the lowest trained
block is kept on disk, as `lm.tune` does for a device whose rows are used again. All variants take
turns on one thread, a few steps each, so that other load on the machine affects them alike; a ratio
is the median over neighbouring turns. Storing the prefix is timed separately, since it is done
once.

Peak memory is that of a fresh process for each variant, which trains a few steps, after storing the
prefix if it keeps one: the whole process, and what training adds to the loaded model. The
simulator's charges are given for comparison. LCD is the choice of depths for 1,000 devices from
their measured times.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedspine.core.process import keep_freed_memory, limit_onednn_cache, peak_memory_bytes

HERE = Path(__file__).parent
DEPTH, RANK, BATCH, CLASSES = 2, 8, 16, 6
LENGTHS = (32, 128)  # tokens of every row
STEPS = 4  # optimiser steps of one training
ROWS = STEPS * BATCH  # of the device; one training uses each of them once
DEVICES, PLANS = 1000, 30  # of LCD


@dataclass(frozen=True)
class Kind:
    """A way to train: adapters on so many upper blocks, and whether the prefix is kept."""

    name: str
    depth: int
    kept: bool = False


FULL = Kind("depth 6", 6)
BARE = Kind(f"depth {DEPTH}, prefix computed in each step", DEPTH)
KEPT = Kind(f"depth {DEPTH}, prefix kept", DEPTH, kept=True)
KINDS = (FULL, BARE, KEPT)


class Scene:
    """The base and a device with rows of random tokens, all of one length."""

    def __init__(self, tokens: int, precision: str, folder: Path) -> None:
        import numpy as np

        from fedspine.core.task import Examples
        from fedspine.lm.load import load

        rng = np.random.default_rng(0)
        self.base, _ = load(
            "minilm", kind="classification", classes=CLASSES, precision=precision, layers=FULL.depth
        )
        self.data = Examples(
            ids=rng.integers(1000, 30000, ROWS * tokens).astype(np.int32),
            offsets=np.arange(ROWS + 1, dtype=np.int64) * tokens,
            labels=rng.integers(0, CLASSES, ROWS),
            segments=None,
            padding=0,
        )
        self.folder = folder

    def train(self, kind: Kind) -> Any:
        """A device that has trained `STEPS` steps; its prefix is kept from the first one on."""
        import numpy as np

        from fedspine.core.device import Device
        from fedspine.lm.base import Model
        from fedspine.lm.lora import fresh
        from fedspine.lm.prefix import Prefixes
        from fedspine.lm.structure import full
        from fedspine.lm.tune import tune
        from fedspine.lm.tuning import Tuning

        rng, layout = np.random.default_rng(0), self.base.layout
        sites = [site for site in layout.sites if site.layer >= layout.layers - kind.depth]
        model = Model(
            structure=full(layout),
            adapter=fresh(sites, RANK, rng),
            head=self.base.initial_head(rng),
            scale=2.0,
        )
        device = Device(
            id="d",
            data=self.data,
            base=self.base,
            memory={},
            rng=rng,
            prefixes=Prefixes(self.folder) if kind.kept else None,
        )
        # a device that trains twice or more in its run keeps what it would otherwise recompute
        turns = 2.0 if kind.kept else 0.0
        tune(device, model, Tuning(steps=STEPS, batch=BATCH, learning_rate=1e-3, turns=turns))
        return device


def timed(scene: Scene, turns: int) -> tuple[dict[Kind, list[float]], float]:
    """Seconds of a step of each kind, turn by turn, and seconds of keeping the prefix."""
    for kind in (FULL, BARE):  # loads kernels
        scene.train(kind)
    first = _seconds(lambda: scene.train(KEPT))
    found: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(turns):
        for kind in KINDS:
            found[kind].append(_seconds(lambda kind=kind: scene.train(kind)) / STEPS)
    return found, first - STEPS * median(found[KEPT])


def peaks(kind: Kind, tokens: int, precision: str) -> dict[str, float]:
    """Peak memory of a fresh process, and what the simulator charges for the same training."""
    words = [sys.executable, __file__, "--peaks", kind.name, "--tokens", str(tokens)]
    done = subprocess.run(
        [*words, "--precision", precision], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def own_peaks(name: str, tokens: int, precision: str) -> None:
    """Print what `peaks` reads, of this process."""
    (kind,) = (kind for kind in KINDS if kind.name == name)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(tokens, precision, Path(folder))
        before = _reset_peak()
        device = scene.train(kind)
        peak = peak_memory_bytes()
    found = {"process": peak, "training": peak - before, "charged": device.peak_memory_bytes}
    print(json.dumps(found | {"operations": device.flops}))


def _reset_peak() -> int:
    """Reset Linux's peak memory of this process; returns its current resident bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory_bytes()


def lcd() -> list[float]:
    """Seconds of each choice of depths for a fleet whose devices were all timed."""
    import numpy as np

    from fedspine.control.depth import DepthPlanner, rising_ranks
    from fedspine.control.device_times import timed
    from fedspine.core.fleet import Cost

    rng, layers = np.random.default_rng(0), FULL.depth
    planner = DepthPlanner(
        rule="barrier-floor",
        ranks=rising_ranks(layers, layers * RANK, 1.0),
        traffic=np.arange(layers + 1.0),
        least=2,
        coverage=0.1,
        fixed=0,
        rank_worth=0.5,
    )
    times: dict[str, Any] = {}
    for device in range(DEVICES):
        costs = rng.uniform(1, 20, 3)  # seconds of forward pass, backward pass and traffic
        seen = None
        for depth in (2, 4, 6):
            computing, bytes_each = costs[0] + costs[1] * depth / layers, depth * 10**5
            seconds = computing + costs[2] * depth / layers
            cost = Cost(bytes_each, bytes_each, 0.0, 0, seconds, computing)
            how = {"depth": depth, "layers": layers, "full_bytes": 2e5 * layers, "discount": 0.8}
            seen = timed(seen, cost, **how)
        times[f"d{device}"] = seen
    before, most = dict.fromkeys(times, 4), dict.fromkeys(times, layers)
    return [_seconds(lambda: planner.plan(times, before, most)) for _ in range(PLANS)]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(turns: int, wanted: str) -> None:
    import torch

    from fedspine.lm.precision import choose

    torch.set_num_threads(1)
    choice = choose("auto", torch.device("cpu")) if wanted == "auto" else None
    precision = wanted if choice is None else choice.precision
    lines = [
        f"Six-layer MiniLM, {precision}, rank {RANK}, {ROWS} rows, one thread of {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}, commit {commit()}; {turns} turns of {STEPS} steps. Ratios "
        "are over depth 6; those of seconds are medians over neighbouring turns, with their range.",
        "",
        "| rows x tokens | training | step, ms | ratio | peak of the process, MB | ratio "
        "| training adds, MB | ratio | memory charged | operations charged |",
        "|" + "---|" * 10,
    ]
    kept = []
    for tokens in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            seconds, once = timed(Scene(tokens, precision, Path(folder)), turns)
        memory = {kind: peaks(kind, tokens, precision) for kind in KINDS}
        lines += [row(kind, tokens, seconds, memory) for kind in KINDS]
        steps = once / median(seconds[FULL])
        kept.append(f"{1e3 * once:.0f} ms at {tokens} tokens ({steps:.1f} steps of depth 6)")
    solved = lcd()
    lines += [
        "",
        f"Keeping the prefix of the device's {ROWS} rows, once: {', '.join(kept)}.",
        "",
        f"LCD for {DEVICES} devices: {1e3 * median(solved):.1f} ms (median of {PLANS}, longest "
        f"{1e3 * max(solved):.1f}).",
    ]
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "depth.md").write_text(text, encoding="utf-8")
    print(text)


def row(
    kind: Kind,
    tokens: int,
    seconds: dict[Kind, list[float]],
    memory: dict[Kind, dict[str, float]],
) -> str:
    shares = [ours / full for ours, full in zip(seconds[kind], seconds[FULL], strict=True)]
    own, full = memory[kind], memory[FULL]
    over = {name: own[name] / full[name] for name in own}
    cells = [
        f"{BATCH} x {tokens}",
        kind.name,
        f"{1e3 * median(seconds[kind]):.0f}",
        f"{median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})",
        f"{own['process'] / 1e6:.0f}",
        f"{over['process']:.2f}",
        f"{own['training'] / 1e6:.0f}",
        *(f"{over[name]:.2f}" for name in ("training", "charged", "operations")),
    ]
    return f"| {' | '.join(cells)} |"


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()


if __name__ == "__main__":
    limit_onednn_cache()
    keep_freed_memory()
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--turns", type=int, default=9, help="default: 9")
    words.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    words.add_argument("--peaks", help=argparse.SUPPRESS)
    words.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.peaks:
        own_peaks(given.peaks, given.tokens, given.precision)
    else:
        main(given.turns, given.precision)
