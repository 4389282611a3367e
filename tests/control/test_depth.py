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


def test_own_ranks_are_a_share_of_the_common_ones() -> None:
    ranks = (6, 8, 8, 10)
    assert own_ranks(ranks, 3, 1.0) == (8, 8, 10)
    assert own_ranks(ranks, 3, 0.5) == (4, 4, 5)
    assert own_ranks(ranks, 3, 0.0) == (1, 1, 1)


RANKS, TRAFFIC = (4, 6, 8, 10), np.arange(1, 6) / 5  # of a head, and of one more block each


def planned(links, *, computing=2.0, most=4, **settings):
    """The plan for devices whose traffic of all blocks takes `links` seconds, and whose forward
    pass and backward pass take `computing` seconds each.
    """
    times = {}
    for device, link in links.items():
        for work, depth in ((0.2, 2), (0.2, 4), (1.0, 1), (1.0, 4)):
            spent, sending = computing * work * (1 + depth / 4), link * TRAFFIC[depth]
            bytes_each = int(4e5 * TRAFFIC[depth])
            cost = Cost(bytes_each, bytes_each, 0.0, 0, spent + sending, spent)
            how = {"depth": depth, "layers": 4, "full_bytes": 8e5, "discount": 1.0}
            times[device] = timed(times.get(device), cost, work=work, **how)
    settings = {"rule": "barrier-floor", "fixed": 4, "least": 1, "coverage": 0.0} | settings
    planner = DepthPlanner(ranks=RANKS, traffic=TRAFFIC, **settings)
    return planner.plan(times, {}, dict.fromkeys(links, most))


def test_a_device_with_a_slow_link_has_lower_ranks_rather_than_few_blocks() -> None:
    links = {"a": 1.0, "b": 1.0, "c": 1.0, "slow": 3.0}
    plan, common = (planned(links, computing=0.5, rank_worth=worth) for worth in (0.5, None))
    assert common.ranks == {}
    assert [plan.ranks[id] for id in "abc"] == [RANKS] * 3
    assert plan.depths["slow"] >= 3
    assert max(plan.ranks["slow"]) < max(RANKS)
    assert plan.seconds["a"] < plan.seconds["slow"] < 1.0 + 3.0


@given(
    links=st.lists(st.floats(0.1, 50.0), min_size=2, max_size=8),
    worth=st.sampled_from([0.25, 0.5, 1.0]),
    most=st.integers(1, 4),
    rule=st.sampled_from(RULES),
)
def test_own_ranks_keep_their_bounds(links, worth, most, rule) -> None:
    names = {str(place): link for place, link in enumerate(links)}
    plan = planned(names, rank_worth=worth, most=most, rule=rule)
    for device, depth in plan.depths.items():
        assert 1 <= depth <= most
        own, common = plan.ranks[device], RANKS[4 - depth :]
        assert len(own) == depth
        assert all(1 <= each <= rank for each, rank in zip(own, common, strict=True))
    assert np.isfinite(plan.round_seconds)


def worth(ranks):
    return sum(rank**0.5 for rank in ranks)


def test_the_round_of_own_ranks_is_worth_most_per_second() -> None:
    """Against every time at which the round could end, tried one by one, on certain times."""
    links = {"a": 0.5, "b": 2.0, "c": 6.0, "d": 20.0}
    plan = planned(links, rank_worth=0.5)
    found = sum(map(worth, plan.ranks.values())) / max(plan.seconds.values())
    for end in np.linspace(0.5, 30, 60):
        gained, last = 0.0, 0.0
        for link in links.values():
            best, took = (), 0.0
            for depth in range(1, 5):
                computing = 2.0 * (1 + depth / 4) + link * 0.2
                adapters = link * depth / 5
                for own in {own_ranks(RANKS, depth, share) for share in np.linspace(0, 1, 41)}:
                    spent = computing + adapters * sum(own) / sum(RANKS[4 - depth :])
                    if spent <= end and worth(own) > worth(best):
                        best, took = own, spent
            gained, last = gained + worth(best), max(last, took if best else np.inf)
        assert gained / last < found * 1.05  # the ends that are compared are a grid


def test_before_any_link_is_known_ranks_are_a_quarter() -> None:
    plan = DepthPlanner(
        rule="fixed", ranks=RANKS, traffic=TRAFFIC, least=1, coverage=0.0, fixed=4, rank_worth=0.5
    ).plan({}, {}, {"a": 4})
    assert plan.ranks == {"a": (1, 1, 2, 2)}
