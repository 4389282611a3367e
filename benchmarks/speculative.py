"""A run's pruned decoder as the draft of its dense one: `python benchmarks/speculative.py RUN`
writes results/speculative.md.

The dense and the pruned model of one run of language modelling are exported and continue the same
prompts greedily, one at a time on one thread: the dense model alone, and with the pruned one as
`assistant_model` of transformers' `generate` (assisted generation, Leviathan et al. 2023,
arXiv:2211.17192). Both write the same tokens, which is checked. Which is faster depends on the time
of a draft step and on how many of its tokens the dense model accepts. They take turns, prompt by
prompt, so that other load on the machine affects both.
"""

import argparse
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
PROMPT = 8  # tokens at most of a test row that are continued, unless it is a dialogue
PROMPTS, TOKENS = 12, 48  # prompts, and new tokens of each
DRAFTED = (2, 4, 8)  # tokens of the draft before each call of the dense model


@dataclass(frozen=True)
class Written:
    """One continuation: its new tokens, how long it took, and calls of the dense model and of the
    draft.
    """

    tokens: list[int]
    seconds: float
    dense_calls: int
    draft_calls: int = 0

    @property
    def accepted(self) -> int:
        """Tokens of the draft that were taken: each call of the dense model adds one of its own."""
        return len(self.tokens) - self.dense_calls

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return len(self.tokens) / self.seconds


def main(folder: Path, device: str, base: str | None, prompts: int, new: int) -> None:
    import numpy as np
    import torch
    import transformers

    from fedspine.exports.load import load_model
    from fedspine.exports.of_run import export_model, open_run
    from fedspine.exports.parity_rows import parity_rows

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = {}
        for name in ("dense", device):
            to = Path(scratch) / name
            export_model(folder, device=name, format="hf", to=to, base=base, parity=False)
            loaded[name] = load_model(to)
    dense, draft = loaded["dense"], loaded[device]
    run = open_run(folder, base)
    rows, rows_from = parity_rows(run.recipe, run.record, run.tokenizer, None, prompts)
    # a text may be cut into several rows, so of these as many as were asked for
    rows = rows.take(np.linspace(0, len(rows) - 1, min(prompts, len(rows))).astype(int))
    most = PROMPT if rows.counted is None else None
    texts = [rows.prompt(row)[:most].tolist() for row in np.flatnonzero(rows.lengths)]
    lines = [
        f"{run.recipe.task.model} of a run of {run.recipe.method.name}; the draft is its model "
        f"`{device}`, sparsity {draft.sparsity:.2f}, {draft.parameters / dense.parameters:.2f} of "
        f"the parameters. {len(texts)} prompts ({rows_from}), up to {new} tokens each, greedily, "
        f"fp32, one thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, transformers "
        f"{transformers.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}, commit {commit()}. All took turns, prompt by prompt; ratios "
        "are medians over prompts. All wrote the same tokens.",
        "",
        "| | tokens per second | over dense alone | draft's tokens accepted | tokens per call of "
        "the dense model |",
        "|---|---|---|---|---|",
    ]
    lines += table(*in_turns(dense, draft, texts, new))
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "speculative.md").write_text(text, encoding="utf-8")
    print(text)


def in_turns(
    dense: Any, draft: Any, prompts: Sequence[list[int]], new: int
) -> tuple[list[Written], list[Written], dict[int, list[Written]]]:
    """What the dense model, the draft alone, and both together at each number of draft tokens wrote
    after each prompt.
    """
    alone, drafts, both = [], [], {drafted: [] for drafted in DRAFTED}
    write(dense.module, prompts[0], new)  # loads kernels
    for prompt in prompts:
        alone.append(write(dense.module, prompt, new))
        drafts.append(write(draft.module, prompt, new))
        for drafted, found in both.items():
            found.append(write(dense.module, prompt, new, draft.module, drafted))
            if found[-1].tokens != alone[-1].tokens:
                raise AssertionError(
                    f"with a draft {found[-1].tokens} came, alone {alone[-1].tokens}"
                )
    return alone, drafts, both


def write(module: Any, prompt: list[int], new: int, draft: Any = None, drafted: int = 0) -> Written:
    """Continue a prompt greedily, with so many tokens of the draft before each call of `module`."""
    import torch

    more: dict[str, Any] = {}
    if draft is not None:
        # always so many, however sure the draft is
        draft.generation_config.update(
            num_assistant_tokens=drafted,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        more["assistant_model"] = draft
    ids = torch.tensor([prompt])
    with calls_of(module) as dense_calls, calls_of(draft) as draft_calls, torch.inference_mode():
        started = time.perf_counter()
        whole = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            **more,
        )
        seconds = time.perf_counter() - started
    tokens = whole[0, len(prompt) :].tolist()
    return Written(tokens, seconds, len(dense_calls), len(draft_calls))


@contextmanager
def calls_of(module: Any) -> Iterator[list[None]]:
    """A list that grows by one with each call of the module; None is never called."""
    calls: list[None] = []
    if module is None:
        yield calls
        return
    hook = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def table(alone: list[Written], drafts: list[Written], both: dict[int, list[Written]]) -> list[str]:
    """A row for each way to write."""
    found = {"dense alone": alone, "draft alone (other tokens)": drafts}
    found |= {f"dense with {drafted} draft tokens at a time": one for drafted, one in both.items()}
    lines = []
    for name, each in found.items():
        over = median(one.rate / dense.rate for one, dense in zip(each, alone, strict=True))
        asked = sum(one.draft_calls for one in each)
        accepted = f"{sum(one.accepted for one in each) / asked:.1%}" if asked else "-"
        per_call = sum(len(one.tokens) for one in each) / sum(one.dense_calls for one in each)
        rate = f"{median(one.rate for one in each):.1f}"
        lines.append(f"| {name} | {rate} | {over:.2f} | {accepted} | {per_call:.2f} |")
    return lines


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()


if __name__ == "__main__":
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("run", type=Path, help="a run of kind causal-lm that pruned its model")
    words.add_argument("--device", default="global", help="whose model is the draft")
    words.add_argument("--base", help="where the run's base is now")
    words.add_argument("--prompts", type=int, default=PROMPTS)
    words.add_argument("--tokens", type=int, default=TOKENS, help="new ones of each prompt")
    given = words.parse_args()
    main(given.run, given.device, given.base, given.prompts, given.tokens)
