"""Accounting, draws, clipping and noise: what the promise of differential privacy rests on."""

import math

import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from fedspine.core import accountant
from fedspine.core.accountant import GRID, Spending, epsilon_of, noise_multiplier
from fedspine.core.draws import SecretDraws, SeededDraws
from fedspine.core.errors import BadInput
from fedspine.core.noise import clipped, noise_like, noisy_update
from fedspine.core.privacy import BudgetExceeded, Guard, MemoryLedger, Privacy, added

KEY = bytes(range(32))
COUNT = 200_000


def spent(multiplier, rate, steps):
    return Spending(noise_multiplier=multiplier, rate=rate, steps=steps)


def guard(memory=None, **changes):
    stated = {"level": "rows", "epsilon": 2.0, "delta": 1e-5, "clip": 1.0, "answers": 4}
    terms = Privacy(**stated | changes)
    return Guard(terms, SeededDraws((0, 1)), MemoryLedger(terms, {} if memory is None else memory))


# --- the accountant ---


def test_epsilon_of_dp_sgd_as_published():
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, delta = 1e-5 and 10,000 steps give 1.26.

    The paper turns moments into epsilon by the bound log(1 / delta) / (order - 1), which the
    conversion of Canonne et al. improves on.
    """
    release = spent(4.0, 0.01, 10_000)
    moments = RdpAccountant(list(accountant.ORDERS))
    moments.compose(accountant._event(release.noise_multiplier, release.rate, release.steps))
    orders, values = np.array(moments._orders), moments._rdp
    # half a unit of the published digits
    assert min(values + math.log(1e5) / (orders - 1)) == pytest.approx(1.26, abs=0.005)
    assert 0.9 < epsilon_of([release], 1e-5) < 1.26


@pytest.mark.parametrize("multiplier", [0.6, 1.0, 4.0])
def test_epsilon_bounds_the_exact_one_of_gaussian_noise(multiplier):
    """Balle and Wang 2018 (arXiv:1805.06530), theorem 8, give the exact delta of an epsilon."""
    epsilon = epsilon_of([spent(multiplier, 1.0, 1)], 1e-5)
    half, shift = 1 / (2 * multiplier), epsilon * multiplier
    exact = stats.norm.cdf(half - shift) - math.exp(epsilon) * stats.norm.cdf(-half - shift)
    assert exact <= 1e-5
    closer = 0.8 * epsilon  # the bound is not loose by a quarter
    assert (
        stats.norm.cdf(half - closer * multiplier)
        - math.exp(closer) * stats.norm.cdf(-half - closer * multiplier)
        > 1e-5
    )


def test_nothing_spent_is_nothing_and_no_noise_is_no_bound():
    assert epsilon_of([], 1e-5) == 0.0
    assert epsilon_of([spent(1.0, 0.1, 5), spent(0.0, 0.1, 1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(1.0, 0.06, 200), (8.0, 0.01, 500), (3.0, 1.0, 10)]
)
def test_the_noise_is_the_least_that_keeps_the_budget(epsilon, rate, steps):
    found = noise_multiplier(epsilon, 1e-5, rate, steps)
    assert epsilon_of([spent(found, rate, steps)], 1e-5) <= epsilon
    less = found - 2 / GRID  # the last step on the grid may be one beyond the least
    assert epsilon_of([spent(less, rate, steps)], 1e-5) > epsilon


def test_a_budget_that_no_noise_keeps_is_bad_input():
    with pytest.raises(BadInput, match="raise it, or train for fewer steps"):
        noise_multiplier(1e-7, 1e-5, 1.0, 100)


# --- the draws ---


@pytest.mark.parametrize("draws", [SeededDraws((3, 1, 4)), SecretDraws(KEY)], ids=["seed", "key"])
def test_draws_have_their_distributions(draws):
    # a true generator fails each test once in 10^6 sets of draws; these are fixed
    uniform, normal = draws.uniform(COUNT), draws.normal(COUNT)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6
    assert stats.kstest(normal, "norm").pvalue > 1e-6
    for drawn in (uniform, normal):  # neighbours, and the two halves that Box and Muller give
        lags = [np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1] for lag in (1, 2, COUNT // 2)]
        assert max(map(abs, lags)) < 5 / math.sqrt(COUNT // 2)


def test_secret_draws_repeat_with_their_key_and_no_other():
    first, again, other = SecretDraws(KEY), SecretDraws(KEY), SecretDraws(KEY[::-1])
    drawn = first.normal(7)
    assert len(drawn) == 7 and (drawn == again.normal(7)).all()
    assert not np.isin(drawn, other.normal(7)).any()
    assert not np.isin(drawn, first.normal(7)).any()  # the stream goes on
    with pytest.raises(ValueError, match="32 bytes"):
        SecretDraws(b"short")


# --- clipping and noise ---


@settings(max_examples=50, deadline=None)
@given(scale=some.floats(1e-3, 1e3), most=some.floats(1e-2, 10))
def test_clipping_bounds_the_joint_norm_and_keeps_the_direction(scale, most):
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy(scale * rng.standard_normal(shape)).float()
        for name, shape in (("a", (3, 5)), ("b", (7,)))  # unequal shapes, one norm
    }
    made = clipped(tensors, most)
    before, after = (torch.cat([t.flatten() for t in x.values()]) for x in (tensors, made))
    # fp32 rounds each entry by 2^-24 of itself at most, twice
    assert float(after.double().norm()) <= most * (1 + 2.0**-22)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 1 - 1e-6
    if float(before.norm()) < most:
        assert torch.equal(before, after)


def test_an_update_that_is_not_finite_counts_as_none():
    made = clipped({"a": torch.tensor([1.0, math.nan]), "b": torch.ones(2)}, 1.0)
    assert all(not tensor.any() for tensor in made.values())


def test_the_noise_of_an_update_is_twice_the_clip_by_the_multiplier():
    before, after = {"x": torch.zeros(COUNT)}, {"x": torch.full((COUNT,), 10.0)}
    kept = guard(level="devices", clip=0.5)
    released = noisy_update(before, after, kept, 3.0)["x"]
    # the update is clipped to norm 0.5, so each entry is 0.5 / sqrt(n); noise has 3 * 2 * 0.5
    deviation = float(released.std())
    assert deviation == pytest.approx(3.0, rel=5 / math.sqrt(2 * COUNT))
    assert abs(float(released.mean()) - 0.5 / math.sqrt(COUNT)) < 5 * 3 / math.sqrt(COUNT)
    silent = noisy_update(before, after, kept, 0.0)["x"]
    # the factor and the products are rounded once each; the norm is taken in fp64
    assert float(silent.double().norm()) == pytest.approx(0.5, rel=2 * 2**-24)


def test_noise_has_the_shape_of_its_tensor():
    assert noise_like(torch.zeros(2, 3), SecretDraws(KEY)).shape == (2, 3)


# --- the budget ---


def test_the_budget_lasts_for_the_planned_answers_and_no_more():
    memory = {}
    epsilons = []
    for _ in range(4):
        kept = guard(memory)
        multiplier = kept.spend(0.1, 20)
        epsilons.append(kept.epsilon)
    assert multiplier == noise_multiplier(2.0, 1e-5, 0.1, 80)
    assert epsilons == sorted(epsilons)
    # multipliers are multiples of 1e-4, and epsilon changes a few times as much as they do
    assert 2.0 * (1 - 1e-3) < epsilons[-1] <= 2.0
    before = memory["privacy"]
    with pytest.raises(BudgetExceeded, match="its privacy budget is spent"):
        guard(memory).spend(0.1, 20)
    assert memory["privacy"] is before  # what is declined costs nothing


def test_other_orders_cannot_spend_more_than_the_budget():
    """A server that asks for more steps as it goes on gets no more out of a device."""
    memory, steps, declined = {}, 1, False
    while not declined:
        try:
            guard(memory).spend(0.2, steps)
        except BudgetExceeded:
            declined = True
        steps *= 10
    assert 0 < memory["privacy"].epsilon <= 2.0


def test_without_an_epsilon_nothing_is_promised_or_counted():
    kept = guard(epsilon=None)
    assert kept.spend(0.1, 20) == 0.0 and kept.epsilon is None


def test_equal_releases_are_one_entry():
    entries = added(added((), spent(1.0, 0.1, 5)), spent(1.0, 0.1, 7))
    assert [vars(entry) for entry in added(entries, spent(2.0, 0.1, 1))] == [
        {"noise_multiplier": 1.0, "rate": 0.1, "steps": 12},
        {"noise_multiplier": 2.0, "rate": 0.1, "steps": 1},
    ]
