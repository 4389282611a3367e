"""Laws of merging what devices send, and the lines for settings that cannot work."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from fedspine.core.aggregation import (
    CHOICES,
    Mean,
    Median,
    MultiKrum,
    NormClip,
    TrimmedMean,
    aggregation_of,
)
from fedspine.core.errors import BadInput
from fedspine.core.merging import Weighted, combined, distances, root_mean_square, trimmed
from fedspine.core.server_optimiser import Server
from fedspine.core.tensors import average

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(1, 2**31)
HOWS = [Mean(), TrimmedMean(), Median(), MultiKrum(), NormClip()]
by_name = pytest.mark.parametrize("how", HOWS, ids=lambda how: how.name)
# a weighted mean of n fp32 numbers: n products, n sums and a quotient, each rounded by 2^-24
OFF = 2**-24


def fleet_of(how):
    notes = []
    return SimpleNamespace(
        aggregation=how,
        server=Server(),
        note=lambda **values: notes.append(values),
        notes=notes,
    )


def tensors(rng, size=1.0):
    """Two tensors, with entries from a coarse grid, so that some are equal."""
    drawn = {"w": (4, 3), "b": (5,)}
    return {
        name: size * torch.from_numpy(rng.integers(-4, 5, shape) / 4).float()
        for name, shape in drawn.items()
    }


def parts(rng, devices):
    return [Weighted(f"device-{i}", int(rng.integers(1, 9)), tensors(rng)) for i in range(devices)]


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@given(seeds, st.integers(3, 12), st.floats(0.05, 0.49))
def test_a_trimmed_mean_is_that_of_scipy(seed, devices, share):
    values = np.random.default_rng(seed).standard_normal((devices, 7)).astype(np.float32)
    how = TrimmedMean(share=share)
    found, settled = trimmed(
        how, torch.from_numpy(values), torch.ones(devices), torch.ones(devices, 7, dtype=bool)
    )
    # scipy cuts a share as well, rounded down, which ours is one at least
    expected = trim_mean(values.astype(np.float64), how.cut(devices) / devices + 1e-9, axis=0)
    assert settled.all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=devices * OFF * np.abs(values).max())


@given(seeds, st.integers(3, 12))
def test_a_median_is_that_of_numpy(seed, devices):
    values = np.random.default_rng(seed).standard_normal((devices, 7)).astype(np.float32)
    found, settled = trimmed(
        Median(), torch.from_numpy(values), torch.ones(devices), torch.ones(devices, 7, dtype=bool)
    )
    assert settled.all()
    np.testing.assert_allclose(found, np.median(values, 0), rtol=0, atol=4 * OFF * 4)


@by_name
@given(seed=seeds, devices=st.integers(3, 9))
def test_the_order_of_devices_does_not_matter(how, seed, devices):
    """Bit for bit where values are sorted; a sum rounds as it is ordered."""
    rng = np.random.default_rng(seed)
    before, those = tensors(rng), parts(rng, devices)
    one = combined(fleet_of(how), "head", those, before)
    other = combined(fleet_of(how), "head", [those[i] for i in rng.permutation(devices)], before)
    if how.name in ("trimmed_mean", "median"):
        assert equal(one, other)
    else:
        torch.testing.assert_close(flat(one), flat(other), rtol=0, atol=4 * devices * OFF)


@given(seeds, st.integers(2, 9))
def test_nothing_trimmed_is_the_mean(seed, devices):
    """Beside one device that is below and one that is above everybody, all the others count."""
    rng = np.random.default_rng(seed)
    before, those = tensors(rng), parts(rng, devices)
    far = [
        Weighted(name, 2**31, {key: torch.full_like(tensor, by) for key, tensor in before.items()})
        for name, by in (("low", -65504.0), ("high", 65504.0))
    ]
    found = combined(fleet_of(TrimmedMean(share=1 / (devices + 2))), "head", those + far, before)
    mean = average((part.weight, part.tensors) for part in those)
    torch.testing.assert_close(flat(found), flat(mean), rtol=0, atol=2 * devices * OFF)


@given(seeds, st.integers(2, 9))
def test_bounds_that_nobody_reaches_give_the_mean_bit_for_bit(seed, devices):
    rng = np.random.default_rng(seed)
    before, those = tensors(rng), parts(rng, devices)
    fleet = fleet_of(NormClip(bound=1e6))
    found = combined(fleet, "head", those, before)
    assert equal(found, average((part.weight, part.tensors) for part in those))
    assert not fleet.notes


@pytest.mark.parametrize("how", [TrimmedMean(), Median()], ids=lambda how: how.name)
@given(seed=seeds, honest=st.integers(2, 9), value=st.floats(-65504, 65504), weight=rows)
def test_whatever_one_device_sends_no_entry_leaves_the_range_of_the_others(
    how, seed, honest, value, weight
):
    rng = np.random.default_rng(seed)
    before, those = tensors(rng), parts(rng, honest)
    bad = {name: torch.full_like(tensor, value) for name, tensor in before.items()}
    found = flat(combined(fleet_of(how), "head", [*those, Weighted("bad", weight, bad)], before))
    others = torch.stack([flat(part.tensors) for part in those])
    assert (found >= others.amin(0)).all() and (found <= others.amax(0)).all()


@given(seeds, st.integers(5, 12), st.floats(20.0, 65504.0), st.booleans(), rows)
def test_as_many_bad_devices_as_are_left_out_change_no_bit(seed, devices, value, alike, weight):
    """Whether they send the same or not: the others are within 4 of each other in each entry."""
    rng, how = np.random.default_rng(seed), MultiKrum()
    before, those = tensors(rng), parts(rng, devices - how.left_out(devices))
    bad = [
        Weighted(
            f"bad-{i}",
            weight,
            {
                name: torch.full_like(tensor, value if alike or not i else -value)
                for name, tensor in before.items()
            },
        )
        for i in range(how.left_out(devices))
    ]
    fleet = fleet_of(how)
    found = combined(fleet, "head", [*those, *bad], before)
    assert equal(found, average((part.weight, part.tensors) for part in those))
    assert fleet.notes == [{"device": part.device, "bounded": "head", "share": 0} for part in bad]


@given(seeds, st.integers(5, 12), st.floats(0.05, 0.49))
def test_multi_krum_keeps_the_changes_that_are_nearest_to_their_neighbours(seed, devices, share):
    how, points = MultiKrum(share=share), np.random.default_rng(seed).standard_normal((devices, 3))
    bad = how.left_out(devices)
    assume(devices >= how.fewest(devices))
    apart = ((points[:, None] - points[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(row, i))[: devices - bad - 2].sum() for i, row in enumerate(apart)]
    best = sorted(np.argsort(scores)[: devices - bad])
    assert np.flatnonzero(how.kept(apart.tolist())).tolist() == best


def test_distances_are_means_over_the_entries_that_both_own():
    changes = [
        {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])},
        {"x": torch.tensor([3.0, torch.nan]), "y": torch.tensor([[1.0]])},
        {"x": torch.tensor([torch.nan, 65504.0])},
    ]
    far = 65502.0**2
    # the second and the third share no entry: as far apart as the farthest two that do
    assert distances(changes).tolist() == [[0, 4, far], [4, 0, far], [far, far, 0]]


@given(seeds, st.integers(1, 9), st.floats(1e-3, 65504), st.floats(0.5, 3))
def test_whatever_one_device_sends_the_model_moves_no_farther_than_the_largest_change_of_another(
    seed, honest, size, bound
):
    """Times the bound, where that is above 1: it is a mean of changes of at most that norm."""
    rng = np.random.default_rng(seed)
    before, those = tensors(rng), parts(rng, honest)
    bad = Weighted("bad", 2**20, tensors(rng, size))
    found = combined(fleet_of(NormClip(bound=bound)), "head", [*those, bad], before)
    most = max(float((flat(part.tensors) - flat(before)).norm()) for part in those)
    moved = float((flat(found) - flat(before)).norm())
    # each of 17 entries below 2 + bound * 2 is off by a few roundings for every device
    assert moved <= max(1.0, bound) * most + 17 * 8 * (honest + 1) * 4 * OFF


def test_who_is_bounded_is_noted_with_the_share_that_counts():
    before = {"w": torch.zeros(4)}
    sent = {"a": 1.0, "b": 1.0, "c": -1000.0}
    those = [Weighted(name, 1, {"w": torch.full((4,), by)}) for name, by in sent.items()]
    fleet = fleet_of(NormClip(bound=2.0))
    found = combined(fleet, "head", those, before)
    assert fleet.notes == [{"device": "c", "bounded": "head", "share": 0.002}]
    assert torch.allclose(found["w"], torch.zeros(4), atol=4 * OFF)  # (1 + 1 - 2) / 3


def test_the_median_norm_of_an_even_number_is_the_lower_one():
    assert NormClip().shares([1.0, 4.0]) == [1.0, 0.25]
    assert NormClip().shares([1.0, 1.0, 4.0, 4.0]) == [1.0, 1.0, 0.25, 0.25]
    assert NormClip().shares([3.0]) == [0.0]  # which nothing can be compared with
    assert NormClip().shares([0.0, 0.0, 5.0]) == [1.0, 1.0, 0.0]


def test_sizes_are_compared_by_entry():
    small, large = {"x": torch.ones(3)}, {"x": torch.ones(300)}
    assert root_mean_square(small) == root_mean_square(large) == 1.0


@pytest.mark.parametrize("how", [TrimmedMean(), Median()], ids=lambda how: how.name)
def test_an_entry_with_too_few_owners_is_not_settled(how):
    values = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [9.0, 9.0, 9.0]])
    owned = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
    found, settled = trimmed(how, values, torch.ones(3), owned)
    assert settled.tolist() == [True, False, False]
    assert found.tolist() == [2.0, 0.0, 0.0]


def test_as_many_owners_of_an_entry_may_be_bad_as_devices_of_the_round():
    """Two of ten are cut, also where five own the entry and both bad ones are among them."""
    values = torch.tensor([[1.0], [2.0], [3.0], [1e4], [1e4], *[[0.0]] * 5])
    owned = torch.tensor([[True]] * 5 + [[False]] * 5)
    found, _ = trimmed(TrimmedMean(share=0.2), values, torch.ones(10), owned)
    assert found.tolist() == [3.0]


@by_name
def test_too_few_replies_leave_all_as_it_was(how):
    rng = np.random.default_rng(0)
    before, those = tensors(rng), parts(rng, 1)
    found = combined(fleet_of(how), "head", those, before)
    assert equal(found, those[0].tensors if how == Mean() else before)


def test_rows_of_a_classifier_are_weighed_by_what_devices_have_of_their_class():
    fleet = fleet_of(Mean())
    values = [torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[4.0], [4.0], [4.0]])]
    those = [
        Weighted(name, rows, {"w": value, "a": value})
        for name, rows, value in zip("xy", (2, 1), values, strict=True)
    ]
    fleet.server.row_shares = {
        "x": {"w": torch.tensor([0.5, 0.5, 0.0])},
        "y": {"w": torch.tensor([0.0, 1.0, 0.0])},
    }
    found = combined(fleet, "head", those, {"w": torch.zeros(3, 1), "a": torch.zeros(3, 1)})
    # x alone has rows of class 0, x and y have one each of class 1, and nobody any of class 2
    assert found["w"].flatten().tolist() == [1.0, 2.5, 2.0]
    assert found["a"].flatten().tolist() == [2.0, 2.0, 2.0]  # no classifier: by rows


def test_a_device_of_unknown_labels_counts_alike_in_all_rows_and_medians_are_weighed_too():
    values = [torch.full((2,), value) for value in (0.0, 1.0, 5.0)]
    those = [Weighted(name, 2, {"b": v}) for name, v in zip("xyz", values, strict=True)]
    for how, expected in (
        (Mean(), [5 * 0.5 / 1.5, (1 + 5 * 0.5) / 1.5]),  # z has half of its weight in each row
        (TrimmedMean(share=0.2), [0.0, 1.0]),  # of three the middle one is left, where it counts
    ):
        fleet = fleet_of(how)
        fleet.server.row_shares = {
            "x": {"b": torch.tensor([1.0, 0.0])},
            "y": {"b": torch.tensor([0.0, 1.0])},
        }
        before = {"b": torch.zeros(2)}  # of an entry of which nothing is left
        assert combined(fleet, "head", those, before)["b"].tolist() == pytest.approx(expected)


def test_a_name_a_table_and_a_part_are_the_same():
    for name, cls in CHOICES.items():
        assert aggregation_of(name) == aggregation_of({"name": name}) == cls()
    assert aggregation_of({"name": "norm_clip", "bound": 3.0}) == NormClip(bound=3.0)
    assert aggregation_of(None) is None


@pytest.mark.parametrize(
    ("given_", "line"),
    [
        ("medien", "unknown fleet.aggregation.name 'medien'; did you mean 'median'?"),
        ({"name": "median", "bound": 2.0}, "unknown key of .fleet.aggregation. for median 'bound'"),
        ({"bound": 2.0}, "unknown key of .fleet.aggregation. for mean 'bound'"),
    ],
)
def test_unknown_names_and_settings_are_refused(given_, line):
    with pytest.raises(BadInput, match=line):
        aggregation_of(given_)


@pytest.mark.parametrize(
    ("how", "replies", "line"),
    [
        (TrimmedMean(share=0.1), 5, "share of 0.1, which needs 10 replies in a round, .* are 5"),
        (TrimmedMean(share=0.4), 2, "needs 3 replies in a round, but there are 2"),
        (TrimmedMean(share=0.5), 9, "share is 0.5, but a share above 0 and below 0.5"),
        (TrimmedMean(share=0.0), 9, 'to leave nothing out write fleet.aggregation = "mean"'),
        (
            MultiKrum(),
            4,
            "multi_krum with a share of 0.2, which needs 5 replies .* are 4",
        ),
        (MultiKrum(share=0.4), 10, "share of 0.4, which needs 11 replies in a round, .* are 10"),
        (MultiKrum(share=0.6), 9, "share is 0.6, but a share above 0 and below 0.5"),
        (Median(), 2, "median, which needs 3 replies in a round, but there are 2"),
        (NormClip(), 1, "norm_clip, which needs 2 replies in a round, but there is 1"),
        (NormClip(bound=0.0), 9, "bound is 0, but a multiple of the median norm above 0"),
        (NormClip(bound=-1.0), 9, "bound is -1, but"),
    ],
)
def test_what_cannot_work_is_one_line(how, replies, line):
    with pytest.raises(BadInput, match=line):
        how.check(replies)


def test_what_can_work_is_not_refused():
    for how, replies in (
        (Mean(), 1),
        (TrimmedMean(share=0.2), 5),
        (TrimmedMean(share=0.1), 10),
        (Median(), 3),
        (MultiKrum(), 5),
        (MultiKrum(), 10),
        (NormClip(), 2),
    ):
        how.check(replies)
