"""Frozen weights in 8 or 4 bits: their numbers, pruning, gradients and memory."""

import importlib.util

import pytest
import torch
from tiny_models import model_on

from fedspine.lm.cost import HALF, frozen_bytes
from fedspine.lm.frozen import packed, unpacked
from fedspine.lm.load import load
from fedspine.lm.structure import cut, full, kept_columns, kept_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not here: pip install torchao"
)
INPUTS = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.ones(2, 6).long()}


@pytest.fixture(scope="module", params=[(8, "bert"), (4, "bert"), (4, "qwen3")], ids=str)
def bases(request, tiny_folder):
    """A base as it came, one with the weights that the quantised one expands to, and that one."""
    bits, architecture = request.param
    kind = "classification" if architecture == "bert" else "causal-lm"
    place = str(tiny_folder(architecture))
    plain, same = (load(place, kind=kind, classes=3)[0] for _ in range(2))
    few, _ = load(place, kind=kind, classes=3, bits=bits)
    for path in same.weights:
        same.weights[path] = few.slice(path, full(few.layout))
    return plain, same, few


def test_a_weight_is_off_by_about_a_step_of_its_group(bases):
    plain, same, few = bases
    for site in plain.layout.sites:
        exact, found = (
            base.weights[site.path][0].T if site.column_units else base.weights[site.path][0]
            for base in (plain, same)
        )
        groups = exact.unflatten(1, (-1, few.layout.group))
        # a range that holds 0, as a zero point must be a code
        span = groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)
        most = 2**few.layout.held_bits - 1
        # half a step for the number, half for the zero point; the scale is rounded to 8 bits, which
        # may cut 2^-9 of the range off, and makes a step as much larger
        allowed = span * ((1 + 2**-9) / most + 2**-9)
        apart = (found - exact).abs().unflatten(1, (-1, few.layout.group)).amax(2)
        assert bool((apart <= allowed).all())
        assert not torch.equal(found, exact)


def test_cutting_codes_is_cutting_what_they_expand_to(bases):
    _, same, few = bases
    structure = model_on(few, heads=[1, 2], channels=[40, 23]).structure
    for site in few.layout.sites:
        weight, bias = few.slice(site.path, structure)
        rows, columns = kept_rows(site, structure), kept_columns(site, structure)
        whole, shift = same.weights[site.path]
        assert torch.equal(weight, cut(cut(whole, rows, 0), columns, 1))
        assert bias is None or torch.equal(bias, cut(shift, rows, 0))


@pytest.mark.parametrize("lowest", [0, 1])
def test_outputs_and_gradients_are_those_of_the_expanded_weights(bases, lowest):
    _, same, few = bases
    outputs, gradients = [], []
    for base in (same, few):
        model = model_on(base, heads=[2, 1], channels=[40, 23])
        for site in base.layout.sites[:: 1 if lowest == 0 else 2]:
            for factor in (f"{site.path}.lora_A", f"{site.path}.lora_B"):
                if lowest:  # layers without an adapter above some that have one
                    del model.adapter[factor]
        factors = [factor.requires_grad_() for factor in model.adapter.values()]
        logits = base.fit(model)(**INPUTS).logits
        gradients.append(torch.autograd.grad(logits.square().sum(), factors))
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[1], outputs[0])
    for found, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_graph_keeps_an_expanded_weight(bases):
    *_, few = bases
    model = model_on(few)
    for site in few.layout.sites[1::2]:
        del model.adapter[f"{site.path}.lora_A"], model.adapter[f"{site.path}.lora_B"]
    # of the feed-forward layers, since no head has these
    shapes = {(site.rows, site.columns) for site in few.layout.sites if site.per_unit == 1}
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        for factor in model.adapter.values():
            factor.requires_grad_()
        few.fit(model)(**INPUTS)
    assert seen
    assert not shapes & {tuple(shape) for shape in seen}


def test_the_charge_is_what_is_held_and_one_layer(bases):
    plain, _, few = bases
    for model in (model_on(few), model_on(few, heads=[1, 2], channels=[40, 23])):
        structure = model.structure
        few.fit(model)
        weights = few.fitted_weights().values()
        held = sum(weight.bytes for weight in weights)
        largest = max(weight.expanded().numel() for weight in weights)
        charged = frozen_bytes(few.layout, structure, few.embeddings)
        assert charged == HALF * few.embeddings + held + HALF * largest
        assert charged < frozen_bytes(plain.layout, structure, plain.embeddings)


def test_two_codes_share_a_byte():
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    assert packed(codes).shape == (2, 4)
    assert torch.equal(unpacked(packed(codes)), codes)
