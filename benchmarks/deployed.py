"""How much faster half of MiniLM runs: `python benchmarks/deployed.py` writes results/deployed.md.

A structure of sparsity 0.5 (6 of 12 heads, 768 of 1536 channels in each layer) and the unpruned
model take turns, call by call, in one process, so that other load on the machine affects both.
"""

import os
import platform
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from fedspine.exports.bench import compare
from fedspine.exports.hf import export
from fedspine.lm.base import Model
from fedspine.lm.load import load
from fedspine.lm.structure import full, shrink

HERE = Path(__file__).parent
LABELS = tuple("abcdefgh")


def main() -> None:
    rng = np.random.default_rng(0)
    base, tokenizer = load("minilm", kind="classification", classes=len(LABELS))
    whole = full(base.layout)
    scores = torch.rand(whole.heads.shape), torch.rand(whole.channels.shape)
    half = shrink(base.layout, whole, scores, sparsity=0.5, target=0.5)
    head = base.initial_head(rng)
    lines = [
        f"MiniLM, sparsity 0.5 against the whole model, fp32, {os.cpu_count()} "
        f"cores, torch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {commit()}. Medians of calls taken in turns.",
        "",
        "| threads | tokens | batch | half, ms | whole, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, structure in (("half", half), ("whole", whole)):
            model = Model(structure=structure, adapter={}, head=head, scale=1.0)
            target = Path(folder) / name
            export(
                base,
                model,
                tokenizer,
                target,
                labels=LABELS,
                kind="classification",
                max_tokens=128,
                name=name,
            )
        for threads in sorted({1, os.cpu_count() or 1}):
            for tokens in (32, 64, 128):
                found = compare(
                    Path(folder) / "half", Path(folder) / "whole", tokens=tokens, threads=threads
                )
                for batch, ratio in found.latency_ratio.items():
                    times = (
                        1e3 * side.latency_seconds[batch] for side in (found.model, found.against)
                    )
                    cells = " | ".join(f"{time:.1f}" for time in times)
                    lines.append(f"| {threads} | {tokens} | {batch} | {cells} | {ratio:.3f} |")
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "deployed.md").write_text(text)
    print(text)


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()


if __name__ == "__main__":
    main()
