"""Which units go: never back, the least important first, exactly so many at the target; and cutting
adapters.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine.core.errors import BadInput
from fedspine.lm.lora import a_name, b_name, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import (
    Structure,
    check_target,
    cut_adapter,
    final_targets,
    full,
    is_full,
    kept_columns,
    kept_rows,
    shrink,
    sparsity,
)

TINY = PrunableLayout(
    architecture="bert",
    prefix="bert",
    layers=2,
    heads=4,
    channels=64,
    width=32,
    query_heads=4,
    head_dim=8,
)
MINILM = PrunableLayout(
    architecture="bert",
    prefix="bert",
    layers=6,
    heads=12,
    channels=1536,
    width=384,
    query_heads=12,
    head_dim=32,
)
ROBERTA = PrunableLayout(
    architecture="roberta",
    prefix="roberta",
    layers=12,
    heads=12,
    channels=3072,
    width=768,
    query_heads=12,
    head_dim=64,
)
DECODER = PrunableLayout(
    architecture="llama",
    prefix="model",
    layers=20,
    heads=8,
    channels=256,
    width=128,
    query_heads=16,
    head_dim=8,
)
targets = st.floats(0.05, 0.7)


def random_scores(layout, seed):
    rng = np.random.default_rng(seed)
    return tuple(
        torch.from_numpy(rng.random((layout.layers, units)).astype(np.float32))
        for units in (layout.heads, layout.channels)
    )


def tolerance(layout):
    """A quarter of a percent, or half a channel where that is more."""
    return max(0.0025, layout.shape.channel_parameters / layout.shape.parameters / 2) + 1e-9


def path_to(layout, target, seed):
    """The structures of a device that shrinks at random paces, with other scores each step."""
    rng = np.random.default_rng(seed)
    structures = [full(layout)]
    for step in [*np.sort(rng.random(4)) * target, target]:
        scores = random_scores(layout, rng.integers(2**32))
        structures.append(
            shrink(layout, structures[-1], scores, sparsity=float(step), target=target)
        )
    return structures


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([TINY, MINILM]), targets, st.integers(0, 2**32 - 1))
def test_any_path_ends_at_the_target_and_nothing_grows_back(layout, target, seed):
    structures = path_to(layout, target, seed)
    for earlier, later in itertools.pairwise(structures):
        assert not bool((later.heads & ~earlier.heads).any())
        assert not bool((later.channels & ~earlier.channels).any())
    assert abs(sparsity(layout, structures[-1]) - target) <= tolerance(layout)


@pytest.mark.parametrize("target", [0.3, 0.5])
@pytest.mark.parametrize("layout", [MINILM, ROBERTA, DECODER], ids=["minilm", "roberta", "decoder"])
def test_models_end_within_a_quarter_percent(layout, target):
    end = shrink(layout, full(layout), random_scores(layout, 0), sparsity=target, target=target)
    assert abs(sparsity(layout, end) - target) <= 0.0025


def test_sparsity_counts_the_weights_that_are_gone():
    structure = full(TINY)
    structure.heads[0, 1] = False
    structure.channels[1, :3] = False
    # a head holds 8 rows of q, k and v and 8 columns of o, a channel one row and one column, all 32
    # wide
    block = 4 * 32 * 32 + 2 * 32 * 64
    assert sparsity(TINY, structure) == pytest.approx((4 * 8 * 32 + 3 * 2 * 32) / (2 * block))
    assert not is_full(structure)
    assert is_full(full(TINY))


def test_shrinking_changes_nothing_in_place():
    before = full(TINY)
    shrink(TINY, before, random_scores(TINY, 0), sparsity=0.5, target=0.5)
    assert is_full(before)


@settings(deadline=None, max_examples=20)
@given(targets, st.integers(0, 2**32 - 1))
def test_the_least_important_go_first(target, seed):
    scores = random_scores(TINY, seed)
    end = shrink(TINY, full(TINY), scores, sparsity=target, target=target)
    for kept, score in ((end.heads, scores[0]), (end.channels, scores[1])):
        for layer in range(TINY.layers):
            gone = score[layer][~kept[layer]]
            assert not len(gone) or gone.max() <= score[layer][kept[layer]].min()


def test_ties_go_to_the_lower_index():
    equal = tuple(torch.zeros_like(score) for score in random_scores(TINY, 0))
    end = shrink(TINY, full(TINY), equal, sparsity=0.5, target=0.5)
    assert end.heads.tolist() == [[False, False, True, True]] * 2
    assert end.channels.tolist() == [[False] * 32 + [True] * 32] * 2


def test_decoders_keep_their_first_tenth_and_their_last_layer():
    thin = 0.3 * DECODER.layers / (DECODER.layers - 3)
    assert final_targets(DECODER, 0.3) == [0.0, 0.0, *[thin] * (DECODER.layers - 3), 0.0]
    assert final_targets(ROBERTA, 0.3) == [0.3] * ROBERTA.layers
    # what the others could not carry without going below their floors, all carry
    assert final_targets(DECODER, 0.74) == [0.74] * DECODER.layers
    end = shrink(DECODER, full(DECODER), random_scores(DECODER, 0), sparsity=0.4, target=0.4)
    whole = end.heads.all(1) & end.channels.all(1)
    assert whole.tolist() == [True] * 2 + [False] * 17 + [True]
    assert abs(sparsity(DECODER, end) - 0.4) <= 0.0025


@pytest.mark.parametrize(("layers", "protected"), [(1, 0), (2, 0), (5, 0), (11, 0), (12, 2)])
def test_no_layer_of_a_short_decoder_stays_whole(layers, protected):
    """One of five would leave the others a quarter more to lose."""
    short = replace(DECODER, layers=layers)
    targets = final_targets(short, 0.5)
    assert targets.count(0.0) == protected
    assert targets[protected and 1 : layers - (protected and 1)] == [
        0.5 * layers / (layers - protected)
    ] * (layers - protected)
    end = shrink(short, full(short), random_scores(short, 0), sparsity=0.5, target=0.5)
    assert abs(sparsity(short, end) - 0.5) <= 0.0025


def test_a_target_that_no_structure_has_is_refused():
    check_target(TINY, 0.8)
    with pytest.raises(BadInput, match="lower the target"):
        check_target(TINY, 0.95)


def adapter_of(layout, rank=3):
    rng = np.random.default_rng(0)
    adapter = fresh(layout.sites, rank, rng)
    return {
        name: torch.from_numpy(rng.standard_normal(tuple(t.shape)).astype(np.float32))
        for name, t in adapter.items()
    }


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([TINY, DECODER]), st.integers(0, 2**32 - 1))
def test_cutting_twice_is_cutting_once(layout, seed):
    _, *middle, end = path_to(layout, 0.6, seed)
    adapter, within = adapter_of(layout), middle[seed % len(middle)]
    once = cut_adapter(adapter, layout.sites, end)
    twice = cut_adapter(
        cut_adapter(adapter, layout.sites, within), layout.sites, end, within=within
    )
    assert list(once) == list(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert sum(t.numel() for t in once.values()) < sum(t.numel() for t in adapter.values())


def test_an_adapter_is_cut_where_its_weight_is():
    structure = Structure(heads=full(TINY).heads.clone(), channels=full(TINY).channels.clone())
    structure.heads[1, 2] = False
    adapter = adapter_of(TINY)
    cut = cut_adapter(adapter, TINY.sites, structure)
    for site in TINY.sites:
        dense = adapter[b_name(site.path)] @ adapter[a_name(site.path)]
        rows, columns = kept_rows(site, structure), kept_columns(site, structure)
        dense = dense if rows is None else dense[rows]
        dense = dense if columns is None else dense[:, columns]
        torch.testing.assert_close(cut[b_name(site.path)] @ cut[a_name(site.path)], dense)
    gone = "bert.encoder.layer.1.attention.self.query"
    assert torch.equal(
        cut[b_name(gone)], torch.cat([adapter[b_name(gone)][:16], adapter[b_name(gone)][24:]])
    )
