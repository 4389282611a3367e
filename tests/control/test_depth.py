"""LEGEND's control: rising ranks, times that are affine in depth, depths that end together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine.control.depth import DepthPlanner, choose_depths, own_ranks, rising_ranks
from fedspine.control.device_times import timed
from fedspine.core.fleet import Cost

RULES = ("barrier-floor", "align-fastest", "tiers", "fixed")


@given(
    layers=st.integers(1, 24),
    mean=st.integers(1, 32),
    difference=st.sampled_from([-1.5, -0.5, 0.0, 0.5, 1.0, 1.5]),
)
def test_ranks_rise_and_spend_the_budget(layers, mean, difference) -> None:
    ranks = rising_ranks(layers, layers * mean, difference)
    assert sum(ranks) == layers * mean
    assert min(ranks) >= 1
    assert list(ranks) == sorted(ranks, reverse=difference < 0)


def test_the_ranks_of_the_reimplementation() -> None:
    assert rising_ranks(12, 270, 1.0) == tuple(range(17, 29))


def fleet(seed=0, devices=80, layers=12):
    """Seconds [devices, depths] of 30 slow, 40 middle and 10 fast devices in random power modes
    with random links, as section 9 of the reconstruction measures.
    """
    rng = np.random.default_rng(seed)
    kinds = np.repeat([0, 1, 2], np.round(np.array([30, 40, 10]) * devices / 80).astype(int))
    forward = np.array([1.08, 0.5, 0.2])[kinds] * rng.integers(1, 5, len(kinds))
    link = 94e6 / 80 * 8 / (rng.uniform(1, 30, len(kinds)) * 1e6)
    costs = np.stack([30 * forward, 30 * forward, link], 1)
    traffic = np.arange(layers + 1) / layers
    return round_seconds(costs, traffic)


def round_seconds(costs, traffic):
    """Seconds [devices, depths] of a forward and a backward pass of all blocks and of their traffic
    [devices, 3], where each depth's `traffic` is a share of it.
    """
    depths = np.linspace(0, 1, len(traffic))
    return costs @ np.stack([np.ones_like(traffic), depths, traffic])


def chosen(rule, seconds, *, most=None, ranks=None, least=1, coverage=0.1, fixed=6):
    devices, layers = seconds.shape[0], seconds.shape[1] - 1
    most = np.full(devices, layers) if most is None else most
    ranks = rising_ranks(layers, 8 * layers, 1.0) if ranks is None else ranks
    return choose_depths(rule, seconds, most, ranks, least=least, coverage=coverage, fixed=fixed)


def waiting(seconds, depths):
    """The mean share of a round that a device waits."""
    times = seconds[np.arange(len(depths)), depths]
    return float((times.max() - times).mean() / times.max())


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 50), least=st.integers(1, 4))
def test_depths_keep_their_bounds(rule, seed, least) -> None:
    seconds = fleet(seed)
    most = np.random.default_rng(seed).integers(1, 13, 80)
    depths = chosen(rule, seconds, most=most, least=least)
    assert (depths <= most).all()
    if rule != "fixed":
        assert (depths >= np.minimum(least, most)).all()


@given(seed=st.integers(0, 50), least=st.integers(1, 4), devices=st.sampled_from([3, 8, 80]))
def test_a_round_ends_as_early_as_its_score_is_best(seed, least, devices) -> None:
    """Against the listing of the reconstruction, written out device by device."""
    seconds = fleet(seed, devices)
    devices, layers = seconds.shape[0], seconds.shape[1] - 1
    ranks = rising_ranks(layers, 8 * layers, 1.0)
    first = seconds[:, least].max()
    best, expected = -np.inf, None
    for end in sorted({t for t in seconds[:, least:].ravel() if t >= first}):
        depths = [max(k for k in range(least, layers + 1) if row[k] <= end) for row in seconds]
        cover = [np.mean([k >= layers - block for k in depths]) for block in range(layers)]
        if min(cover) < 0.1:
            continue
        score = sum(r * c for r, c in zip(ranks, cover, strict=True)) / sum(ranks) / end
        if score > best * (1 + 1e-12):
            best, expected = score, depths
    assert chosen("barrier-floor", seconds, least=least).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_devices_wait_less_than_at_one_depth(seed) -> None:
    seconds = fleet(seed)
    depths = chosen("barrier-floor", seconds)
    # the three fleets have 0.60 to 0.64; depths that leave a device's speed aside have 1 and more
    assert waiting(seconds, depths) < 0.75 * waiting(seconds, np.full(80, 12))
    barrier = seconds[np.arange(80), depths].max()
    assert seconds[:, 1].max() <= barrier <= seconds[:, 12].max()


def test_tiers_are_thirds_by_speed() -> None:
    seconds = round_seconds(np.outer(np.arange(1, 10), [1.0, 1.0, 0.0]), np.arange(13) / 12)
    assert chosen("tiers", seconds).tolist() == [12, 12, 12, 9, 9, 9, 6, 6, 6]


def test_the_fastest_device_sets_the_time() -> None:
    costs = np.array([[1.0, 1.0, 0.0], [1.5, 2.0, 0.0], [9.0, 9.0, 0.0]])
    depths = chosen("align-fastest", round_seconds(costs, np.arange(5) / 4))
    assert depths.tolist() == [4, 1, 1]  # of 2 s; the third cannot be done by then


def test_a_block_that_memory_forbids_to_all_is_not_waited_for() -> None:
    seconds = fleet(0, 8)
    depths = chosen("barrier-floor", seconds, most=np.full(len(seconds), 3))
    assert depths.max() == 3


def test_own_ranks_fit_the_link() -> None:
    ranks = (6, 8, 8, 10)
    assert own_ranks(ranks, 3, 0.1, 100.0) == (8, 8, 10)
    assert own_ranks(ranks, 3, 1.0, 13.0) == (4, 4, 5)
    assert own_ranks(ranks, 3, 1.0, -5.0) == (1, 1, 1)


def test_a_device_with_a_slow_link_cuts_its_ranks_to_be_done_with_half_of_the_devices() -> None:
    links = {"a": 3.0, "b": 3.0, "c": 3.0, "slow": 9.0}  # seconds of the traffic of all blocks
    traffic = np.arange(5) / 4
    times = {}
    for device, link in links.items():
        for work, depth in ((0.2, 2), (0.2, 4), (1.0, 1), (1.0, 4)):
            computing, sending = 4.0 * work * (1 + depth / 4), link * traffic[depth]
            bytes_each = int(4e5 * traffic[depth])
            cost = Cost(bytes_each, bytes_each, 0.0, 0, computing + sending, computing)
            how = {"depth": depth, "layers": 4, "full_bytes": 8e5, "discount": 1.0}
            times[device] = timed(times.get(device), cost, work=work, **how)
    settings = {"rule": "fixed", "ranks": (4, 6, 8, 10), "traffic": traffic, "fixed": 4}
    common, own = (
        DepthPlanner(**settings, least=1, coverage=0.0, fit_ranks=fit).plan(
            times, {}, dict.fromkeys(links, 4)
        )
        for fit in (False, True)
    )
    assert common.ranks == {}
    assert [own.ranks[id] for id in "abc"] == [settings["ranks"]] * 3
    cut, link = own.ranks["slow"], common.seconds["slow"] - own.seconds["slow"]
    assert 1 < max(cut) < 10
    assert common.seconds["a"] == own.seconds["a"] < common.seconds["slow"]
    # done with the others, which one more rank of each block would not be
    a_rank = link / (28 - sum(cut))
    assert own.seconds["slow"] <= own.seconds["a"] < own.seconds["slow"] + 4 * a_rank
