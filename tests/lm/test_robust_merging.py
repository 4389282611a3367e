"""Robust merges of adapters of unequal rank and shape, against loops over single entries."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding

from fedspine.core.aggregation import Median, MultiKrum, NormClip, TrimmedMean
from fedspine.core.fleet import Cost, Reply
from fedspine.core.merging import root_mean_square
from fedspine.lm.aggregate import (
    Contribution,
    average_factors,
    bounded,
    by_norm,
    change_factors,
    mean_product,
    merge_changes,
)
from fedspine.lm.lora import a_name, adapter_rank, b_name, cut_rank, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, cut_adapter, full, kept_columns, kept_rows

RANKS = (2, 3, 4)
LAYOUT = PrunableLayout(
    architecture="llama",
    prefix="model",
    layers=1,
    heads=2,
    channels=4,
    width=8,
    query_heads=4,
    head_dim=2,
)
OFF = rounding(6, 4.0)  # a weighted mean over at most 6 devices of numbers below 4
seeds = st.integers(0, 2**32 - 1)
by_name = pytest.mark.parametrize(
    "how", [TrimmedMean(share=0.2), Median()], ids=lambda how: how.name
)


def drawn(rng, tensors):
    return {
        name: torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
        for name, tensor in tensors.items()
    }


def products(adapter):
    return {
        site.path: adapter[b_name(site.path)] @ adapter[a_name(site.path)] for site in LAYOUT.sites
    }


def structure_of(rng):
    """Random units, at least one head and one channel of each layer."""
    heads = torch.from_numpy(rng.random((LAYOUT.layers, LAYOUT.heads)) < 0.6)
    channels = torch.from_numpy(rng.random((LAYOUT.layers, LAYOUT.channels)) < 0.6)
    heads[:, 0], channels[:, 0] = True, True
    return Structure(heads=heads, channels=channels)


def round_of(rng, devices, *, ranks=RANKS, whole=False):
    """The adapter before a round, and what devices of unequal ranks and shapes made of it."""
    before = drawn(rng, fresh(LAYOUT.sites, max(ranks), rng))
    parts = []
    for i in range(devices):
        structure = full(LAYOUT) if whole else structure_of(rng)
        sent = cut_rank(cut_adapter(before, LAYOUT.sites, structure), int(rng.choice(ranks)))
        change = drawn(rng, sent)
        back = {name: tensor + 0.5 * change[name] for name, tensor in sent.items()}
        parts.append(Contribution(sent, back, structure, 1.0 + i % 3))
    return before, parts


def by_hand(how, owners, replies, before):
    """What is left of one entry, of (value, weight) of those who own it."""
    if len(owners) < how.fewest(replies):
        return before
    owners = sorted(owners)
    cut = how.cut(replies) if how.name == "trimmed_mean" else (len(owners) - 1) // 2
    left = owners[cut : len(owners) - cut]
    return sum(value * weight for value, weight in left) / sum(weight for _, weight in left)


def place(index, line):
    """Where a line of the whole lies in a cut factor, None where it was cut away."""
    if index is None:
        return line
    found = (index == line).nonzero()
    return int(found) if len(found) else None


@by_name
@settings(max_examples=10)
@given(seed=seeds, devices=st.integers(3, 6))
def test_factors_are_merged_by_those_who_own_a_line_and_have_the_rank(how, seed, devices):
    before, parts = round_of(np.random.default_rng(seed), devices)
    found = average_factors(LAYOUT, before, parts, how)
    for site in LAYOUT.sites:
        for name, kept, lines_first in (
            (a_name(site.path), kept_columns, False),
            (b_name(site.path), kept_rows, True),
        ):
            rows, columns = before[name].shape
            for row in range(rows):
                for column in range(columns):
                    line, rank = (row, column) if lines_first else (column, row)
                    owners = []
                    for part in parts:
                        at = place(kept(site, part.structure), line)
                        if at is not None and rank < adapter_rank(part.back):
                            entry = (at, rank) if lines_first else (rank, at)
                            owners.append((float(part.back[name][entry]), part.weight))
                    expected = by_hand(how, owners, devices, float(before[name][row, column]))
                    assert float(found[name][row, column]) == pytest.approx(expected, abs=OFF)


@by_name
@pytest.mark.parametrize("merge", [merge_changes, mean_product])
@settings(max_examples=10)
@given(seed=seeds, devices=st.integers(3, 6))
def test_products_are_merged_by_those_who_own_an_entry(merge, how, seed, devices):
    adapter, parts = round_of(np.random.default_rng(seed), devices)
    parts[0] = replace(parts[0], late=True)
    dense = products(adapter)
    found = merge(LAYOUT, dense, parts, how)
    for site in LAYOUT.sites:
        whole = []
        for part in parts:
            if merge is merge_changes or part.late:
                left, right = change_factors(part, site)
            else:
                left, right = part.back[b_name(site.path)], part.back[a_name(site.path)]
            value = torch.full((site.rows, site.columns), torch.nan)
            rows = kept_rows(site, part.structure)
            columns = kept_columns(site, part.structure)
            rows = torch.arange(site.rows) if rows is None else rows
            columns = torch.arange(site.columns) if columns is None else columns
            value[rows[:, None], columns[None, :]] = left @ right
            if part.late and merge is mean_product:  # its change, on today's product
                value += dense[site.path]
            whole.append(value)
        for row in range(site.rows):
            for column in range(site.columns):
                owners = [
                    (float(value[row, column]), part.weight)
                    for value, part in zip(whole, parts, strict=True)
                    if not torch.isnan(value[row, column])
                ]
                was = float(dense[site.path][row, column])
                stays = 0.0 if merge is merge_changes else was
                expected = by_hand(how, owners, devices, stays)
                expected += was if merge is merge_changes else 0.0
                # products of factors of some 2, 8 of them, and a mean: numbers below 30
                off = rounding(8 + devices, 30.0)
                assert float(found[site.path][row, column]) == pytest.approx(expected, abs=off)


@by_name
@pytest.mark.parametrize("merge", [average_factors, merge_changes, mean_product])
def test_one_device_in_five_moves_nothing_out_of_the_others_range(merge, how):
    """It sends the largest numbers of fp16, as the owner of everything at the largest rank."""
    rng = np.random.default_rng(1)
    adapter, parts = round_of(rng, 4, ranks=(4,), whole=True)
    before = adapter if merge is average_factors else products(adapter)
    bad = Contribution(
        adapter,
        {name: torch.full_like(tensor, 65504.0) for name, tensor in adapter.items()},
        full(LAYOUT),
        2.0**31,
    )
    found = merge(LAYOUT, before, [*parts, bad], how)
    alone = [merge(LAYOUT, before, [part]) for part in parts]
    for name, tensor in found.items():
        each = torch.stack([one[name] for one in alone])
        off = rounding(2 * max(RANKS) + len(parts), float(each.abs().amax()))
        assert (tensor >= each.amin(0) - off).all() and (tensor <= each.amax(0) + off).all()


def fleet_of(how):
    notes = []
    return SimpleNamespace(aggregation=how, notes=notes, note=lambda **values: notes.append(values))


def replies_of(parts):
    cost = Cost(bytes_down=1, bytes_up=1, flops=1.0, peak_memory_bytes=1, seconds=1.0)
    return [Reply(str(i), value=None, cost=cost, order=None) for i in range(len(parts))]


def change_of(part):
    sent = cut_rank(part.sent, adapter_rank(part.back))
    return root_mean_square({name: part.back[name] - sent[name] for name in sent})


@given(seeds, st.integers(2, 6), st.floats(1.5, 1e4))
def test_changes_are_bounded_over_unequal_ranks_and_shapes(seed, honest, times):
    _, parts = round_of(np.random.default_rng(seed), honest + 1)
    bad = parts[-1]
    sent = cut_rank(bad.sent, adapter_rank(bad.back))
    far = {name: sent[name] + 10 * times * (bad.back[name] - sent[name]) for name in sent}
    parts[-1] = Contribution(bad.sent, far, bad.structure, bad.weight)
    fleet = fleet_of(NormClip())
    after = bounded(fleet, LAYOUT, replies_of(parts), parts)
    most = sorted(map(change_of, parts))[(len(parts) - 1) // 2]
    for before, now in zip(parts, after, strict=True):
        # a change of a thousandth of what it was keeps as many of 24 bits
        assert change_of(now) <= most * (1 + 1e-3) + 1e-6
        assert (now is before) == (change_of(before) <= most)
    assert str(honest) in {note["device"] for note in fleet.notes}
    assert {note["bounded"] for note in fleet.notes} == {"adapter"}


def test_a_device_that_gave_up_rank_is_measured_by_what_it_kept():
    rng = np.random.default_rng(0)
    _, parts = round_of(rng, 3, ranks=(4,), whole=True)
    shrunk = Contribution(
        parts[0].sent, cut_rank(parts[0].sent, 2), parts[0].structure, parts[0].weight
    )
    parts = [shrunk, *parts[1:]]
    after = bounded(fleet_of(NormClip()), LAYOUT, replies_of(parts), parts)
    assert after[0] is shrunk  # it changed nothing


@given(seed=seeds, honest=st.integers(4, 6), size=st.floats(100.0, 65504.0))
def test_a_bad_device_is_left_out_over_unequal_ranks_and_shapes(seed, honest, size):
    """It owns a sub-model like all others, whose changes are some 0.5 in every entry."""
    adapter, parts = round_of(np.random.default_rng(seed), honest + 1)
    bad = parts[-1]
    far = {name: tensor + size for name, tensor in bad.sent.items()}
    parts[-1] = replace(bad, back=far, weight=2.0**31)
    fleet = fleet_of(MultiKrum())
    after = bounded(fleet, LAYOUT, replies_of(parts), parts)
    assert after[:-1] == parts[:-1] and after[-1].weight == 0
    assert fleet.notes == [{"device": str(honest), "bounded": "adapter", "share": 0}]
    for merge, before in ((average_factors, adapter), (merge_changes, products(adapter))):
        found, without = (merge(LAYOUT, before, those) for those in (after, parts[:-1]))
        assert all(torch.equal(found[name], without[name]) for name in before)
    left = [part.weight for part in by_norm(after)]
    assert left == [*(part.weight for part in by_norm(parts[:-1])), 0]


def test_units_of_different_sub_models_are_compared_with_themselves():
    """Six devices changed every unit alike but kept different ones; a seventh differs a little."""
    rng = np.random.default_rng(0)
    whole = drawn(rng, fresh(LAYOUT.sites, 4, rng))
    parts = []
    for i in range(7):
        structure = structure_of(rng)
        back = cut_rank(cut_adapter(whole, LAYOUT.sites, structure), int(rng.choice(RANKS)))
        sent = {name: torch.zeros_like(tensor) for name, tensor in back.items()}
        if i == 3:
            back = {name: tensor + 0.01 for name, tensor in back.items()}
        parts.append(Contribution(sent, back, structure, 1.0))
    after = bounded(fleet_of(MultiKrum(share=0.2)), LAYOUT, replies_of(parts), parts)
    assert [part.weight for part in after] == [1, 1, 1, 0, 1, 1, 1]
