"""Every architecture with a unit map: its prunable layout is that of the real module, and slicing
equals zeroing.
"""

from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import logging
from tiny_models import KINDS, fp32_apart, labels_for, logits, minilm, model_on, stories, tiny
from tolerances import LOGITS
from torch import nn
from transformers import AutoModelForSequenceClassification

from fedspine.core.errors import BadInput
from fedspine.lm.base import Model
from fedspine.lm.load import load
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.prunable_layout import UNIT_MAPS, unit_map
from fedspine.lm.structure import full, kept_columns, kept_rows, sparsity
from fedspine.lm.tiny import DECODERS, ENCODERS, write_tiny


def spread(tensor, index, dim, units):
    """The tensor with zeros where `dim` was cut; itself where nothing was."""
    if index is None:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = units
    return torch.zeros(shape).index_copy(dim, index, tensor)


def zeroed(base, model):
    """The full-size model whose dropped rows and columns are zero, in the base weights and in the
    adapter.
    """
    adapter = {}
    for site in base.layout.sites:
        rows, columns = kept_rows(site, model.structure), kept_columns(site, model.structure)
        adapter[a_name(site.path)] = spread(
            model.adapter[a_name(site.path)], columns, 1, site.columns
        )
        adapter[b_name(site.path)] = spread(model.adapter[b_name(site.path)], rows, 0, site.rows)
        weight, bias = base.slice(site.path, model.structure)
        weight = spread(spread(weight, columns, 1, site.columns), rows, 0, site.rows)
        base.weights[site.path] = (
            weight,
            None if bias is None else spread(bias, rows, 0, site.rows),
        )
    return Model(structure=full(base.layout), adapter=adapter, head=model.head, scale=model.scale)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_layout_counts_the_weights_of_the_module(tmp_path, name):
    base, _ = tiny(tmp_path, name)
    stock = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / f"tiny-{name}", num_labels=3
    )
    backbone = stock.base_model
    inside = {
        f"{stock.base_model_prefix}.{path}": child.weight
        for path, child in backbone.named_modules()
        if isinstance(child, nn.Linear) and "pooler" not in path
    }
    assert {site.path: (site.rows, site.columns) for site in base.layout.sites} == {
        path: tuple(weight.shape) for path, weight in inside.items()
    }
    assert base.layout.parameters == sum(weight.numel() for weight in inside.values())


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_sliced_equals_zeroed(tmp_path, name, kind):
    base, tokenizer = tiny(tmp_path, name, kind)
    heads = base.layout.heads
    model = model_on(base, heads=[heads // 2, heads - 1], channels=[40, 17])
    sliced = logits(base.fit(model), tokenizer)
    whole = logits(base.fit(zeroed(base, model)), tokenizer)
    torch.testing.assert_close(sliced, whole, atol=fp32_apart(base, whole), rtol=0)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_pruning_and_the_adapter_change_the_logits(tmp_path, name):
    base, tokenizer = tiny(tmp_path, name)
    whole, cut = model_on(base), model_on(base, channels=[40, 17])
    bare = Model(structure=whole.structure, adapter={}, head=whole.head, scale=1.0)
    first, second, third = (
        logits(base.fit(model), tokenizer).clone() for model in (whole, cut, bare)
    )
    # a thousand times what rounding does
    assert (first - second).abs().max() > 1e-2
    assert (first - third).abs().max() > 1e-2
    assert 0 < sparsity(base.layout, cut.structure) < 1


def test_minilm_sliced_equals_zeroed():
    base, tokenizer = minilm()
    weights = dict(base.weights)
    try:
        model = model_on(base, heads=[6, 5, 12, 3, 7, 6], channels=[768, 400, 1536, 1000, 512, 768])
        sliced = logits(base.fit(model), tokenizer)
        whole = logits(base.fit(zeroed(base, model)), tokenizer)
    finally:
        base.weights = weights
    torch.testing.assert_close(sliced, whole, atol=fp32_apart(base, whole), rtol=0)


def test_stories_sliced_equals_zeroed():
    base, tokenizer = stories()
    weights = dict(base.weights)
    try:
        model = model_on(base, heads=[4, 1, 2, 3, 4], channels=[172, 60, 100, 43, 172])
        sliced = logits(base.fit(model), tokenizer)
        whole = logits(base.fit(zeroed(base, model)), tokenizer)
    finally:
        base.weights = weights
    torch.testing.assert_close(sliced, whole, atol=LOGITS, rtol=0)


def test_fewer_layers(tmp_path):
    for name in (*ENCODERS, *DECODERS):
        base, tokenizer = load(
            str(write_tiny(tmp_path / name, name)), kind="classification", classes=3, layers=1
        )
        assert base.layout.layers == 1
        assert logits(base.fit(model_on(base)), tokenizer).shape == (
            3,
            len(labels_for("classification")),
        )


def test_same_seed_same_bytes(tmp_path):
    first, second, other = (
        write_tiny(tmp_path / str(i), "bert", seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    files = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert files[0] == files[1] != files[2]


def test_an_unknown_architecture_is_refused_with_those_known():
    with pytest.raises(BadInput, match="nearest: bert") as caught:
        unit_map("albert")
    assert all(name in str(caught.value) for name in UNIT_MAPS)


def test_a_folder_of_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BadInput, match="architecture 'gpt2' has no unit map"):
        load(str(tmp_path), kind="causal-lm")


def test_loading_is_silent(tmp_path):
    # the Hub's library warns each time that it tries again, and bad input is to end in one line
    logging.set_verbosity_warning()
    load(str(write_tiny(tmp_path, "bert")), kind="classification", classes=3)
    assert logging.get_verbosity() == logging.ERROR


def test_an_unknown_tiny_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'bert'"):
        write_tiny(tmp_path, "berd")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda adapter, a, b: adapter.pop(b), "has {a} without {b}"),
        (lambda adapter, a, b: adapter.pop(a), "has {b} without {a}"),
        (lambda adapter, a, b: adapter.update(x=adapter[a]), "has x, which is no factor"),
    ],
)
def test_a_factor_without_effect_is_refused(tmp_path, change, line):
    base, _ = tiny(tmp_path, "bert")
    model, path = model_on(base), base.layout.sites[0].path
    names = {"a": a_name(path), "b": b_name(path)}
    adapter = dict(model.adapter)
    change(adapter, **names)
    with pytest.raises(ValueError, match=line.format(**names)):
        base.fit(replace(model, adapter=adapter))
    with pytest.raises(ValueError, match=line.format(**names)):
        base.fit_stack([model.structure], adapter, model.head, model.scale)
