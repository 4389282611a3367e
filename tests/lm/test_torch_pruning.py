"""An independent check of the pruner: Torch-Pruning removes the units that `shrink` dropped, from
the stock module.

Torch-Pruning (Fang et al. 2023, arXiv:2301.12900) traces the module and finds by itself which rows
and columns go with the rows it is asked to remove: those of one feed-forward layer for channels,
those of the queries for heads. The adapter is merged at full size before. Nothing of ours takes
part but the list of dropped units.
"""

import numpy as np
import pytest
import torch
import torch_pruning as tp
from tiny_models import STORIES, logits, minilm, model_on, stories, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.llama import modeling_llama

from fedspine.lm.base import Model
from fedspine.lm.load import locate
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import cut_adapter, shrink, sparsity

TARGETS = (0.3, 0.5)
# tokens of the text that is traced: no width of any module, so that dimensions cannot be confused
LENGTH = 7
ROOTS = {  # below a block: whose rows to remove for heads, whose for channels
    "bert": ("attention.self.query", "intermediate.dense"),
    "llama": ("self_attn.q_proj", "mlp.gate_proj"),
}

KINDS = {
    "bert": ("classification", AutoModelForSequenceClassification),
    "llama": ("causal-lm", AutoModelForCausalLM),
}


def wide_and_cut(base, target, seed=0):
    """A model with a random adapter on the whole base, and the same with the structure that
    `shrink` gives it.
    """
    layout, rng = base.layout, np.random.default_rng(seed)
    wide = model_on(base, seed=seed)
    scores = tuple(
        torch.from_numpy(rng.random((layout.layers, units)).astype(np.float32))
        for units in (layout.heads, layout.channels)
    )
    structure = shrink(layout, wide.structure, scores, sparsity=target, target=target)
    adapter = cut_adapter(wide.adapter, layout.sites, structure)
    return wide, Model(structure=structure, adapter=adapter, head=wide.head, scale=wide.scale)


def merged(stock, model):
    """The stock module with the head, and the adapter added to its weights."""
    stock.load_state_dict(model.head, strict=False)
    with torch.no_grad():
        for path in {
            name.removesuffix(".lora_A") for name in model.adapter if name.endswith(".lora_A")
        }:
            stock.get_submodule(path).weight += (
                model.scale * model.adapter[b_name(path)] @ model.adapter[a_name(path)]
            )
    return stock


def stand_still(query, key, *_, **__):
    """Rotary embeddings that do not rotate."""
    return query, key


def prune(stock, layout, structure, monkeypatch):
    """Remove from the stock module, with Torch-Pruning, the heads and channels that the structure
    lacks.
    """
    stock.config.use_cache = False
    tokens = torch.arange(LENGTH)[None] + 5
    with monkeypatch.context() as patch:
        # Rotations stay within a head, so they couple no two heads; but following their slices does
        # not end.
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", stand_still)
        graph = tp.DependencyGraph().build_dependency(
            stock,
            example_inputs={"input_ids": tokens},
            forward_fn=lambda module, inputs: module(**inputs).logits,
            verbose=False,
        )
    heads, channels = ROOTS[layout.architecture]
    blocks = stock.base_model.get_submodule(
        "encoder.layer" if layout.architecture == "bert" else "layers"
    )
    of_one_head = layout.query_heads // layout.heads * layout.head_dim
    groups = []
    for layer, block in enumerate(blocks):
        for path, kept, lines in (
            (heads, structure.heads, of_one_head),
            (channels, structure.channels, 1),
        ):
            gone = [
                u * lines + i
                for u in (~kept[layer]).nonzero().flatten().tolist()
                for i in range(lines)
            ]
            if gone:
                root = block.get_submodule(path)
                groups.append(graph.get_pruning_group(root, tp.prune_linear_out_channels, gone))
    for group in groups:
        group.prune()
    return stock


def same(ours, module, tokenizer):
    """Our fp32 logits are those of the module but for rounding; returns how far they may be off."""
    single = logits(module, tokenizer)
    exact = logits(module.double(), tokenizer)
    module.float()
    # The module's own rounding, fp32 against fp64, is the yardstick. Ours sums the adapter apart
    # from the weight, which makes three products of one: up to three times the error, and one for
    # where the largest happens to be.
    allowed = 4 * float((single - exact).abs().max())
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=allowed)
    return allowed


def agree(base, tokenizer, stock, target, monkeypatch):
    """Torch-Pruning's module and ours compute the same, whole and pruned, and what was dropped
    makes a difference.
    """
    wide, narrow = wide_and_cut(base, target)
    assert sparsity(base.layout, narrow.structure) == pytest.approx(target, abs=0.01)
    whole, stock = logits(base.fit(wide), tokenizer), merged(stock, wide)
    same(whole, stock, tokenizer)
    theirs = prune(stock, base.layout, narrow.structure, monkeypatch)
    for site in base.layout.sites:
        expected = base.slice(site.path, narrow.structure)[0].shape
        assert theirs.get_submodule(site.path).weight.shape == expected, site.path
    ours = logits(base.fit(narrow), tokenizer)
    assert (ours - whole).abs().max() > 1000 * same(ours, theirs, tokenizer)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", list(ROOTS))
def test_tiny_models(tmp_path, monkeypatch, architecture, target):
    kind, auto = KINDS[architecture]
    base, tokenizer = tiny(tmp_path, architecture, kind)
    stock = auto.from_pretrained(tmp_path / f"tiny-{architecture}", attn_implementation="eager")
    agree(base, tokenizer, stock, target, monkeypatch)


@pytest.mark.parametrize("target", TARGETS)
def test_stories(monkeypatch, target):
    base, tokenizer = stories()
    stock = AutoModelForCausalLM.from_pretrained(
        STORIES, attn_implementation="eager", dtype=torch.float32
    )
    agree(base, tokenizer, stock, target, monkeypatch)


@pytest.mark.parametrize("target", TARGETS)
def test_minilm(monkeypatch, target):
    base, tokenizer = minilm()
    stock = AutoModelForSequenceClassification.from_pretrained(
        locate("minilm"), num_labels=8, attn_implementation="eager", dtype=torch.float32
    )
    agree(base, tokenizer, stock, target, monkeypatch)
