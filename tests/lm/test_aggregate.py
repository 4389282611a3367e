"""Laws of merging adapters of unequal rank and shape, and of handing the result back out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding

from fedspine.lm.aggregate import (
    Contribution,
    average_factors,
    by_norm,
    change_factors,
    mean_product,
    merge_changes,
)
from fedspine.lm.factoring import EXACT_BELOW, change_spectra, effective_rank, factor, hand_out
from fedspine.lm.lora import a_name, b_name, cut_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, cut_adapter, full, kept_columns, kept_rows

LARGEST = 8
# grouped queries, so that heads have rows of two sizes
LAYOUT = PrunableLayout(
    architecture="llama",
    prefix="model",
    layers=2,
    heads=2,
    channels=12,
    width=16,
    query_heads=4,
    head_dim=4,
)
seeds = st.integers(0, 2**32 - 1)


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def adapter_of(rng, rank, layout=LAYOUT):
    """Random factors, B no longer zero."""
    made = fresh(layout.sites, rank, rng)
    return {
        name: normal(rng, *tensor.shape) if name.endswith("lora_B") else tensor
        for name, tensor in made.items()
    }


def product(adapter, path):
    return adapter[b_name(path)] @ adapter[a_name(path)]


def products(adapter, layout=LAYOUT):
    return {site.path: product(adapter, site.path) for site in layout.sites}


def structure_of(rng, layout=LAYOUT):
    """Random units, at least one head and one channel of each layer."""

    def some(units):
        kept = torch.from_numpy(rng.random((layout.layers, units)) < 0.6)
        kept[
            torch.arange(layout.layers), torch.from_numpy(rng.integers(units, size=layout.layers))
        ] = True
        return kept

    return Structure(heads=some(layout.heads), channels=some(layout.channels))


def contribution(rng, adapter, structure, rank, weight, *, trained=True):
    """A device that got the best adapter of its rank, and changed it if it trained."""
    sent = hand_out(LAYOUT, adapter, structure, rank)
    back = (
        {name: tensor + 0.1 * normal(rng, *tensor.shape) for name, tensor in sent.items()}
        if trained
        else sent
    )
    return Contribution(sent=sent, back=back, structure=structure, weight=weight)


def fleet(rng, adapter, *, devices=5, trained=True):
    return [
        contribution(
            rng,
            adapter,
            structure_of(rng),
            int(rng.integers(1, LARGEST + 1)),
            1.0 + i,
            trained=trained,
        )
        for i in range(devices)
    ]


def apart(expected, devices=5):
    """By rounding, of products of rank 2 * LARGEST at most, one for each device."""
    return rounding(2 * LARGEST * devices, float(expected.abs().max()))


def close(ours, theirs):
    for path, expected in theirs.items():
        torch.testing.assert_close(ours[path], expected, rtol=0, atol=apart(expected))


@settings(deadline=None, max_examples=15)
@given(seeds)
@pytest.mark.slow
def test_nobody_training_changes_nothing_over_five_rounds(seed):
    rng = np.random.default_rng(seed)
    adapter = adapter_of(rng, LARGEST)
    start = dense = products(adapter)
    for round in range(5):
        dense = merge_changes(LAYOUT, dense, fleet(rng, adapter, trained=False))
        adapter = factor(LAYOUT, dense, LARGEST, adapter, seed=round)
    # float error: 16 products of rank 8 against rank 8, each rounded by 2^-24, five times: 5e-6 of
    # the largest entry
    close(dense, start)
    close(products(adapter), start)


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_late_products_count_as_changes(seed):
    """Where all are late, the mean of products is the merge of changes, whatever their ranks."""
    rng = np.random.default_rng(seed)
    parts = fleet(rng, adapter_of(rng, LARGEST))
    late = [replace(part, late=True) for part in parts]
    today = products(adapter_of(rng, LARGEST))
    close(mean_product(LAYOUT, today, late), merge_changes(LAYOUT, today, parts))


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, LARGEST))
def test_late_factors_count_as_changes(seed, rank):
    """Of one that trained and one that did not, both late, on an adapter that is neither's."""
    rng = np.random.default_rng(seed)
    then, today, everything = adapter_of(rng, rank), adapter_of(rng, rank), full(LAYOUT)
    changed = {name: tensor + normal(rng, *tensor.shape) for name, tensor in then.items()}
    parts = [
        Contribution(sent=then, back=back, structure=everything, weight=weight, late=True)
        for back, weight in ((changed, 1.0), (then, 3.0))
    ]
    merged = average_factors(LAYOUT, today, parts)
    close(merged, {name: today[name] + (changed[name] - then[name]) / 4 for name in today})


def test_delta_keeps_the_tail_that_zero_padding_and_product_averaging_lose():
    # Section 3.1: ten devices of rank 2, ten of rank 8, five rounds in which nobody trains.
    rng = np.random.default_rng(0)
    start = factor(
        LAYOUT, products(adapter_of(rng, LARGEST)), LARGEST, adapter_of(rng, LARGEST), seed=0
    )
    ranks, everything = [2] * 10 + [8] * 10, full(LAYOUT)

    def tail(adapter):
        return sum(
            float(torch.linalg.svdvals(m)[2:].square().sum()) for m in products(adapter).values()
        )

    delta, padded, kept, mean, dense = start, start, start, start, products(start)
    for round in range(5):
        parts = [contribution(rng, delta, everything, rank, 1.0, trained=False) for rank in ranks]
        dense = merge_changes(LAYOUT, dense, parts)
        delta = factor(LAYOUT, dense, LARGEST, delta, seed=round)
        cuts = [cut_rank(padded, rank) for rank in ranks]
        padded = average_factors(
            LAYOUT, padded, [Contribution(cut, cut, everything, 1.0) for cut in cuts]
        )
        cuts = [cut_rank(kept, rank) for rank in ranks]
        parts = [Contribution(cut, cut, everything, 1.0) for cut in cuts]
        kept = average_factors(LAYOUT, kept, parts, padding="before")
        parts = [contribution(rng, mean, everything, rank, 1.0, trained=False) for rank in ranks]
        mean = factor(LAYOUT, mean_product(LAYOUT, dense, parts), LARGEST, mean, seed=round)
    assert tail(delta) / tail(start) == pytest.approx(1.0, abs=1e-4)
    for name in start:  # which who lacks them does not change
        torch.testing.assert_close(kept[name], start[name])
    # half of the devices send zeros for the tails of A and of B: each round halves both, and energy
    # is squared
    assert tail(padded) / tail(start) == pytest.approx((0.5 * 0.5) ** (2 * 5), rel=1e-3)
    # half of the products lack the tail: each round halves it
    assert tail(mean) / tail(start) == pytest.approx(0.5 ** (2 * 5), rel=1e-3)


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_an_entry_moves_by_the_mean_of_its_owners_and_else_stays(seed):
    rng = np.random.default_rng(seed)
    adapter = adapter_of(rng, LARGEST)
    dense, parts = products(adapter), fleet(rng, adapter, devices=3)
    merged = merge_changes(LAYOUT, dense, parts)
    for site in LAYOUT.sites:
        total, weight = torch.zeros_like(dense[site.path]), torch.zeros_like(dense[site.path])
        for part in parts:
            rows, columns = kept_rows(site, part.structure), kept_columns(site, part.structure)
            rows = torch.arange(site.rows) if rows is None else rows
            columns = torch.arange(site.columns) if columns is None else columns
            change = product(part.back, site.path) - product(part.sent, site.path)
            total[rows[:, None], columns] += part.weight * change
            weight[rows[:, None], columns] += part.weight
        expected = dense[site.path] + total / weight.clamp_min(1)
        assert torch.equal(merged[site.path][weight == 0], dense[site.path][weight == 0])
        torch.testing.assert_close(
            merged[site.path], expected, rtol=0, atol=apart(expected, devices=3)
        )


def test_what_one_device_owns_moves_by_its_full_change():
    rng = np.random.default_rng(1)
    adapter, everything = adapter_of(rng, LARGEST), full(LAYOUT)
    few = Structure(heads=everything.heads.clone(), channels=everything.channels.clone())
    few.channels[0, 5] = False
    owner = contribution(rng, adapter, everything, LARGEST, 1.0)
    others = [contribution(rng, adapter, few, LARGEST, 100.0) for _ in range(3)]
    merged, dense = merge_changes(LAYOUT, products(adapter), [owner, *others]), products(adapter)
    for path, where in (
        ("model.layers.0.mlp.up_proj", (5,)),
        ("model.layers.0.mlp.down_proj", (slice(None), 5)),
    ):
        change = product(owner.back, path) - product(owner.sent, path)
        torch.testing.assert_close(
            (merged[path] - dense[path])[where],
            change[where],
            rtol=0,
            atol=apart(dense[path], devices=1),
        )


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_a_mean_of_products_is_that_of_an_entrys_owners_and_else_what_was_before(seed):
    rng = np.random.default_rng(seed)
    adapter = adapter_of(rng, LARGEST)
    before, parts = products(adapter_of(rng, LARGEST)), fleet(rng, adapter, devices=3)
    merged = mean_product(LAYOUT, before, parts)
    for site in LAYOUT.sites:
        total, weight = torch.zeros(site.rows, site.columns), torch.zeros(site.rows, site.columns)
        for part in parts:
            rows, columns = kept_rows(site, part.structure), kept_columns(site, part.structure)
            rows = torch.arange(site.rows) if rows is None else rows
            columns = torch.arange(site.columns) if columns is None else columns
            total[rows[:, None], columns] += part.weight * product(part.back, site.path)
            weight[rows[:, None], columns] += part.weight
        expected = torch.where(weight > 0, total / weight.clamp_min(1), before[site.path])
        assert torch.equal(merged[site.path][weight == 0], before[site.path][weight == 0])
        torch.testing.assert_close(
            merged[site.path], expected, rtol=0, atol=apart(expected, devices=3)
        )


def test_where_nothing_is_cut_a_mean_of_products_is_the_mean_of_changes():
    # DW + mean(B'A' - BA) = mean(B'A') where every device was sent DW itself
    rng = np.random.default_rng(7)
    adapter, everything = adapter_of(rng, LARGEST), full(LAYOUT)
    parts = [contribution(rng, adapter, everything, LARGEST, 1.0 + i) for i in range(3)]
    dense = products(adapter)
    nothing = {path: torch.zeros_like(matrix) for path, matrix in dense.items()}
    close(mean_product(LAYOUT, nothing, parts), merge_changes(LAYOUT, dense, parts))


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_weights_by_norm_are_in_proportion_to_all_products_together(seed):
    rng = np.random.default_rng(seed)
    parts = fleet(rng, adapter_of(rng, LARGEST), devices=3)
    weighed = by_norm(parts)
    norms = [
        torch.cat([m.double().flatten() for m in products(part.back).values()]).norm()
        for part in parts
    ]
    for part, old, norm in zip(weighed, parts, norms, strict=True):
        # norms agree to the precision of fp32 products, summed in another order
        assert part.weight == pytest.approx(float(norm / sum(norms)), rel=rounding(LARGEST))
        assert (part.sent, part.back, part.structure) == (old.sent, old.back, old.structure)


def test_weights_by_norm_are_equal_where_nobody_has_learnt_anything():
    rng = np.random.default_rng(8)
    untrained = fresh(LAYOUT.sites, LARGEST, rng)
    parts = [Contribution(untrained, untrained, full(LAYOUT), weight) for weight in (1.0, 5.0)]
    assert [part.weight for part in by_norm(parts)] == [0.5, 0.5]
    assert by_norm([]) == []


@pytest.mark.parametrize("merge", [merge_changes, average_factors, mean_product])
def test_the_order_of_devices_does_not_matter(merge):
    rng = np.random.default_rng(2)
    adapter = adapter_of(rng, LARGEST)
    parts = fleet(rng, adapter)
    before = adapter if merge is average_factors else products(adapter)
    found, expected = (merge(LAYOUT, before, each) for each in (parts[::-1], parts))
    for path, tensor in expected.items():
        off = rounding(len(parts), float(tensor.abs().max()))
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=off)


def test_factors_that_no_device_owns_stay():
    rng = np.random.default_rng(3)
    adapter, everything = adapter_of(rng, LARGEST), full(LAYOUT)
    without = Structure(heads=everything.heads.clone(), channels=everything.channels.clone())
    without.heads[1, 0] = False
    sent = cut_adapter(adapter, LAYOUT.sites, without)
    back = {name: tensor + 1.0 for name, tensor in sent.items()}
    merged = average_factors(
        LAYOUT, adapter, [Contribution(sent, back, without, w) for w in (1.0, 2.0)]
    )
    name = b_name("model.layers.1.self_attn.k_proj")
    assert torch.equal(merged[name][:4], adapter[name][:4])
    torch.testing.assert_close(merged[name][4:], adapter[name][4:] + 1.0)


def test_directions_beyond_every_devices_rank_stay():
    rng = np.random.default_rng(9)
    adapter, everything = adapter_of(rng, LARGEST), full(LAYOUT)
    parts = []
    for rank in (2, 5):
        sent = cut_rank(adapter, rank)
        parts.append(
            Contribution(sent, {name: 2 * factor for name, factor in sent.items()}, everything, 1.0)
        )
    merged = average_factors(LAYOUT, adapter, parts)
    for site in LAYOUT.sites:
        a, b = merged[a_name(site.path)], merged[b_name(site.path)].T
        for factor_now, factor_then in (
            (a, adapter[a_name(site.path)]),
            (b, adapter[b_name(site.path)].T),
        ):
            assert torch.equal(factor_now[5:], factor_then[5:])
            # the mean of 2 and 0 times the old
            torch.testing.assert_close(factor_now[2:5], factor_then[2:5])
            torch.testing.assert_close(factor_now[:2], 2 * factor_then[:2])


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, LARGEST))
def test_handing_out_is_optimal(seed, rank):
    rng = np.random.default_rng(seed)
    adapter, structure = adapter_of(rng, LARGEST), structure_of(rng)
    wide = cut_adapter(adapter, LAYOUT.sites, structure)
    small, plain = hand_out(LAYOUT, adapter, structure, rank), cut_rank(wide, rank)
    for path, whole in products(wide).items():
        # Eckart and Young: no matrix of this rank is nearer than the tail of the singular values
        best = torch.linalg.svdvals(whole.double())[rank:].norm()
        size = float(whole.norm())
        left = float((product(small, path) - whole).norm())
        assert small[a_name(path)].shape[0] == small[b_name(path)].shape[1] == rank
        off = rounding(2 * LARGEST, size)  # factors from an SVD, and their product
        assert left == pytest.approx(float(best), abs=off)
        assert left <= float((product(plain, path) - whole).norm()) + off


def test_handing_out_a_poor_adapter_revives_what_is_dead():
    rng = np.random.default_rng(4)
    poor = adapter_of(rng, LARGEST)
    for site in LAYOUT.sites:
        poor[b_name(site.path)][:, 2:] = 0.0  # rank 2 in a room for 8
    small = hand_out(LAYOUT, poor, full(LAYOUT), 4)
    close(products(small), products(poor))
    for site in LAYOUT.sites:
        a, b = small[a_name(site.path)], small[b_name(site.path)]
        assert bool((b[:, 2:] == 0).all())
        assert bool((a[2:].norm(dim=1) > 1e-3).all())


@settings(deadline=None, max_examples=10)
@given(seeds, st.booleans())
def test_factors_are_the_best_of_their_rank_and_balanced(seed, large):
    rng = np.random.default_rng(seed)
    side = EXACT_BELOW + 24 if large else 16
    layout = PrunableLayout(
        architecture="bert",
        prefix="bert",
        layers=1,
        heads=2,
        channels=side,
        width=side,
        query_heads=2,
        head_dim=side // 2,
    )
    # a spectrum that falls by 0.7 a step, as trained changes do: randomised SVD needs a gap
    values = 0.7 ** torch.arange(side)
    dense = {
        site.path: torch.linalg.qr(normal(rng, side, side)).Q
        * values
        @ torch.linalg.qr(normal(rng, side, side)).Q.T
        for site in layout.sites
    }
    adapter = factor(layout, dense, LARGEST, fresh(layout.sites, LARGEST, rng), seed=0)
    for path, matrix in dense.items():
        best = float(torch.linalg.svdvals(matrix.double())[LARGEST:].norm())
        assert float((product(adapter, path) - matrix).norm()) <= best * (1 + 1e-3)
        a, b = adapter[a_name(path)], adapter[b_name(path)]
        # singular values are good to the rounding of the largest, which is 1; norms are their roots
        off = rounding(side)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=0, atol=off)
        torch.testing.assert_close(a.norm(dim=1).square(), values[:LARGEST], rtol=0, atol=off)


def test_directions_that_carry_nothing_get_fresh_rows():
    rng = np.random.default_rng(5)
    dense = products(cut_rank(adapter_of(rng, LARGEST), 3))
    adapter = factor(LAYOUT, dense, LARGEST, fresh(LAYOUT.sites, LARGEST, rng), seed=0)
    close(products(adapter), dense)
    for site in LAYOUT.sites:
        a, b = adapter[a_name(site.path)], adapter[b_name(site.path)]
        bound = 1 / math.sqrt(site.columns)
        assert bool((b[:, 3:] == 0).all())
        assert bool((a[3:].abs() <= bound).all())
        assert bool((a[3:].abs().amax(1) > 0).all())


def test_growing_the_rank_leaves_the_function():
    rng = np.random.default_rng(6)
    adapter = adapter_of(rng, 3)
    grown = factor(LAYOUT, products(adapter), LARGEST, fresh(LAYOUT.sites, LARGEST, rng), seed=1)
    close(products(hand_out(LAYOUT, grown, full(LAYOUT), 6)), products(adapter))


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, LARGEST))
def test_spectra_are_those_of_the_dense_change(seed, rank):
    rng = np.random.default_rng(seed)
    part = contribution(rng, adapter_of(rng, LARGEST), structure_of(rng), rank, 1.0)
    spectra = change_spectra(LAYOUT, part)
    for row, site in zip(spectra, LAYOUT.sites, strict=True):
        left, right = change_factors(part, site)
        expected = torch.linalg.svdvals(left.double() @ right.double())[: 2 * rank]
        size = float(expected[0])
        # squares are decomposed, so a value is good to the root of the precision of doubles, 1.5e-8
        # of the largest, times what adds up over the sums
        torch.testing.assert_close(
            row[: len(expected)].double(), expected, rtol=0, atol=1e-6 * size
        )
        assert bool((row[len(expected) :] <= 1e-6 * size).all())


@pytest.mark.parametrize(
    ("spectra", "expected"),
    [
        ([[1.0, 0.0, 0.0]], 1.0),
        ([[2.0, 2.0, 2.0]], 3.0),
        ([[1.0, 0.0], [3.0, 3.0]], 1.5),  # a mean over sites
        ([[0.0, 0.0], [5.0, 5.0]], 2.0),  # a site that did not change has no rank
        ([[0.0, 0.0]], 0.0),
        # shares 0.8 and 0.2 of the energy: exp(-0.8 ln 0.8 - 0.2 ln 0.2)
        ([[2.0, 1.0]], math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))),
    ],
)
def test_effective_rank(spectra, expected):
    assert effective_rank(torch.tensor(spectra)) == pytest.approx(expected)
