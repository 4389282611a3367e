"""S-UCB: it finds the best cell and finds it again, and its tree stays a tiling of the square."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine.control.bandit import (
    DEPTH,
    SIDE,
    U0,
    V0,
    WHOLE,
    Bandit,
    N,
    S,
    bands,
    choose,
    credit,
    leaf_of,
    reward,
    rewards,
    update_scale,
)
from fedspine.control.plan import Plan, PlanResult
from fedspine.core.message import pack, unpack

units = st.floats(0, 1)
plays = st.lists(st.tuples(units, units, units), max_size=60)
finite = st.floats(-1e6, 1e6)

ROUNDS = 400
# a random share over a third of the rounds is 1/16 +- 0.021: four times that is nine standard
# deviations above it
CLEARLY_ABOVE_RANDOM = 4 / 16


def trained(history, **options) -> Bandit:
    bandit = Bandit()
    for u, v, earned in history:
        bandit = credit(bandit, u, v, earned, **options)
    return bandit


def hits(best_of, *, seed: int, rounds: int = ROUNDS, **options) -> np.ndarray:
    """Which rounds played the best of 16 cells, whose reward is 0.8 where others give 0.4, with
    noise of 0.1.
    """
    rng = np.random.default_rng(seed)
    bandit, hit = Bandit(), np.zeros(rounds, bool)
    for number in range(rounds):
        u, v = choose(bandit, exploration=0.1, rng=rng, **options)
        hit[number] = (int(4 * u), int(4 * v)) == best_of(number)
        earned = np.clip((0.8 if hit[number] else 0.4) + 0.1 * rng.standard_normal(), 0, 1)
        bandit = credit(bandit, u, v, float(earned))
    return hit


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_best_cell(seed):
    assert hits(lambda number: (2, 1), seed=seed)[-ROUNDS // 3 :].mean() > CLEARLY_ABOVE_RANDOM


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_best_cell_again_after_a_switch(seed):
    hit = hits(lambda number: (2, 1) if number < ROUNDS // 2 else (0, 3), seed=seed)
    assert hit[-ROUNDS // 3 :].mean() > CLEARLY_ABOVE_RANDOM


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_best_band_once_the_ratio_is_frozen(seed):
    hit = hits(lambda number: (0, 2), seed=seed, frozen_ratio=True)
    # random plays one band of four
    assert hit[-ROUNDS // 3 :].mean() > 0.25 + 4 * np.sqrt(0.25 * 0.75 / (ROUNDS / 3))


@pytest.mark.parametrize("seed", range(5))
def test_learns_inside_what_can_be_executed(seed):
    # without `within`, the two quadrants below u = 0.5 would stay unplayed, first for ever, and v a
    # coin's throw
    hit = hits(lambda number: (3, 1), seed=seed, within=((0.75, 1.0), (0.0, 1.0)))
    assert hit[-ROUNDS // 3 :].mean() > 0.25 + 4 * np.sqrt(0.25 * 0.75 / (ROUNDS / 3))


@pytest.mark.parametrize("options", [{}, {"discount": 0.5}, {"split_at": 1}])
def test_first_four_choices_visit_the_quadrants_in_random_order(options):
    orders = set()
    for seed in range(40):
        rng, bandit, order = np.random.default_rng(seed), Bandit(), []
        for _ in range(4):
            u, v = choose(bandit, exploration=0.1, rng=rng)
            order.append((u >= 0.5, v >= 0.5))
            bandit = credit(bandit, u, v, 1.0, **options)
        assert len(set(order)) == 4
        orders.add(tuple(order))
    assert len(orders) > 12  # of 24; 40 random orders leave about 20


@given(plays, st.integers(1, 4), st.floats(0.5, 1))
def test_leaves_tile_the_square(history, max_tree_depth, discount):
    leaves = trained(history, max_tree_depth=max_tree_depth, discount=discount).leaves
    assert (leaves[:, SIDE] ** 2).sum() == 1.0
    assert (leaves[:, SIDE] == 0.5 ** leaves[:, DEPTH]).all() and leaves[
        :, DEPTH
    ].max() <= max_tree_depth
    centres = np.arange(0.5, 16) / 16  # of the finest cells: each lies in exactly one leaf
    for u in centres:
        inside = (leaves[:, U0] <= u) & (u < leaves[:, U0] + leaves[:, SIDE])
        spans = leaves[inside]
        assert spans[:, SIDE].sum() == 1.0 and len(np.unique(spans[:, V0])) == len(spans)


@given(plays, units, units, units)
def test_the_executed_action_is_credited_and_everything_else_fades(history, u, v, earned):
    before = trained(history)
    row = leaf_of(before, u, v)
    low = before.leaves[row, [U0, V0]]
    assert (low <= (u, v)).all() and ((u, v) <= low + before.leaves[row, SIDE]).all()
    after = credit(before, u, v, earned, split_at=np.inf)
    expected = before.leaves.copy()
    expected[:, [N, S]] *= 0.95
    expected[row, [N, S]] += (1, earned)
    np.testing.assert_array_equal(after.leaves, expected)


@given(plays)
def test_splits_lose_no_evidence(history):
    plain, split = trained(history, split_at=np.inf), trained(history, max_tree_depth=4)
    for column in (N, S):
        assert split.leaves[:, column].sum() == pytest.approx(plain.leaves[:, column].sum())


@given(plays)
def test_bands_tile_v_and_keep_the_evidence(history):
    bandit = trained(history, max_tree_depth=3)
    bars = bands(bandit)
    np.testing.assert_array_equal(bars[:, V0], np.append(0.0, np.cumsum(bars[:, SIDE])[:-1]))
    assert bars[:, SIDE].sum() == 1.0
    assert bars[:, [N, S]].sum(axis=0) == pytest.approx(bandit.leaves[:, [N, S]].sum(axis=0))


@given(
    plays, st.tuples(units, units).map(sorted), st.tuples(units, units).map(sorted), st.booleans()
)
def test_choices_stay_within(history, u_range, v_range, frozen):
    bandit, rng = trained(history), np.random.default_rng(0)
    u, v = choose(
        bandit,
        exploration=0.1,
        within=(tuple(u_range), tuple(v_range)),
        frozen_ratio=frozen,
        rng=rng,
    )
    assert v_range[0] <= v <= v_range[1]
    assert u == 0.0 if frozen else u_range[0] <= u <= u_range[1]


def test_credit_leaves_the_old_state_alone_and_travels():
    bandit = Bandit()
    after = credit(bandit, 0.1, 0.1, 0.5)
    assert not bandit.leaves[:, N].any()
    np.testing.assert_array_equal(unpack(pack(after)).leaves, after.leaves)


@given(
    finite,
    st.floats(0, 1e6),
    units,
    units,
    st.floats(0, 1e6),
)
def test_rewards_are_bounded(gain, scale, progress, importance, lateness):
    made = {
        "scale": scale,
        "progress": progress,
        "importance": importance,
        "lateness": lateness,
    }
    assert 0 <= reward(gain=gain, **made) <= 1
    assert reward(gain=gain, **made) <= reward(gain=gain + 1, **made)
    assert reward(gain=gain, **made) >= reward(gain=gain, **{**made, "lateness": lateness + 1})


def test_reward_by_hand():
    quality = (1 + math.tanh(1)) / 2  # where the gain is twice the scale
    value = reward(gain=0.2, scale=0.099, progress=0.5, importance=1.0, lateness=0.25)
    assert value == pytest.approx((quality + 0.5 + 1.0) / 3 / (1 + 0.25), rel=1e-12)


@pytest.mark.parametrize("bad", ["gain", "scale", "progress", "importance", "lateness"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_refuse_what_is_not_finite(bad, value):
    good = {"gain": 0.1, "scale": 0.1, "progress": 0.1, "importance": 0.1, "lateness": 0.1}
    with pytest.raises(ValueError, match="finite"):
        reward(**{**good, bad: value})


@pytest.mark.parametrize("bad", [{"scale": -1.0}, {"lateness": -1.0}])
def test_rewards_refuse_negative_scales(bad):
    good = {"gain": 0.1, "scale": 0.1, "progress": 0.1, "importance": 0.1, "lateness": 0.1}
    with pytest.raises(ValueError, match="negative"):
        reward(**{**good, **bad})


def test_bad_actions_and_windows_are_refused():
    for u, v, earned in [(1.1, 0.5, 0.5), (np.nan, 0.5, 0.5), (0.5, -0.1, 0.5), (0.5, 0.5, np.nan)]:
        with pytest.raises(ValueError, match="expected"):
            credit(Bandit(), u, v, earned)
    with pytest.raises(ValueError, match="expected"):
        choose(
            Bandit(), exploration=0.1, within=((0.6, 0.5), WHOLE[1]), rng=np.random.default_rng(0)
        )


def test_a_claimed_gain_does_not_make_all_others_count_alike():
    """Of two devices whose gain is known, the median is the mean."""
    plan = Plan(sparsity=0.1, rank=4, action=(0.5, 0.5), progress=1.0)
    gains = {"good": 0.5, "worse": -0.5, "bad": 2.0**75}
    found = {
        id: PlanResult(plan=plan, seconds=1.0, gain=gain, importance=1.0, effective_rank=1.0)
        for id, gain in gains.items()
    }
    _, scale = rewards({"good": found["good"], "bad": found["bad"]}, 0.5)
    for _ in range(20):
        earned, scale = rewards({"good": found["good"], "worse": found["worse"]}, scale)
    assert scale < 1.0 and earned["good"] > 1.1 * earned["worse"]


def test_scale_is_a_running_median():
    assert update_scale(None, []) is None
    first = update_scale(None, [1.0, -2.0, 9.0])
    assert first == 2.0 and update_scale(first, []) == 2.0
    assert update_scale(first, iter([-4.0])) == pytest.approx(0.9 * 2 + 0.1 * 4)
    with pytest.raises(ValueError, match="finite"):
        update_scale(first, [1.0, np.nan])
