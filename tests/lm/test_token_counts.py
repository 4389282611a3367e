"""The private histogram of tokens: what a text can change, the noise, and what the server takes."""

import numpy as np
import pytest

from fedspine.core.draws import SecretDraws, SeededDraws
from fedspine.core.task import Examples
from fedspine.lm.token_counts import (
    CountTokens,
    TokenCounts,
    discrete_laplace,
    floor_of,
    private_counts,
    summed,
)

TOKENS = 50


def examples(*rows, sources=None):
    lengths = [len(row) for row in rows]
    return Examples(
        ids=np.array([id for row in rows for id in row], np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None,
        segments=None,
        padding=0,
        sources=None if sources is None else np.array(sources),
    )


def exact(data, clip, special=(0,)):
    order = CountTokens(tokens=TOKENS, clip=clip, epsilon=1e6)
    assert order.ratio == 0  # so large an epsilon needs no noise in floating point
    return private_counts(data, special, order, SeededDraws((1,))).counts


def test_without_noise_they_are_the_counts_and_special_tokens_are_none():
    assert exact(examples([0, 3, 3, 7], [0, 7]), clip=9).nonzero()[0].tolist() == [3, 7]
    assert exact(examples([0, 3, 3, 7], [0, 7]), clip=9)[[3, 7]].tolist() == [2, 2]


def test_where_nothing_is_promised_all_tokens_count():
    order = CountTokens(tokens=TOKENS, clip=2, epsilon=None)
    counts = private_counts(examples([0, 3, 3, 7]), (0,), order, SeededDraws((1,))).counts
    assert counts[[3, 7]].tolist() == [2, 1]


def test_a_text_counts_for_no_more_than_its_clip_also_in_several_windows():
    text = [0, *range(1, 30)]
    assert exact(examples(text), clip=5).sum() == 5
    assert exact(examples(text, text), clip=5).sum() == 10
    assert exact(examples(text, text, sources=[4, 4]), clip=5).sum() == 5


@pytest.mark.parametrize("draws", [SeededDraws((3,)), SecretDraws(b"k" * 32)])
def test_the_noise_has_the_mean_and_the_spread_of_its_distribution(draws):
    """The discrete Laplace distribution of ratio a has the variance 2 a / (1 - a)^2, and its fourth
    moment bounds how far the variance of n draws may be from it.
    """
    order = CountTokens(tokens=40_000, clip=16, epsilon=8.0)
    a, n = order.ratio, order.tokens
    assert a == pytest.approx(np.exp(-0.5))
    noise = discrete_laplace(n, a, draws)
    variance = 2 * a / (1 - a) ** 2
    k = np.arange(-400, 401)
    mass = (1 - a) / (1 + a) * a ** np.abs(k)
    fourth = float((mass * k**4).sum())
    assert float((mass * k**2).sum()) == pytest.approx(variance)
    # five standard errors
    assert abs(noise.mean()) < 5 * np.sqrt(variance / n)
    assert abs(noise.var() - variance) < 5 * np.sqrt((fourth - variance**2) / n)
    # the ratio of neighbouring probabilities is what the promise rests on: at 0 and 1
    at_zero, at_one = (noise == 0).mean(), (noise == 1).mean()
    assert abs(at_one / at_zero - a) < 5 * a * np.sqrt(1 / (n * at_zero) + 1 / (n * at_one))


def test_what_one_text_changes_is_within_the_clip_and_below_the_noise():
    order = CountTokens(tokens=TOKENS, clip=4, epsilon=1.0)
    one, other = examples([0, 5, 6, 7, 8, 9, 10], [0, 9]), examples([0, 9])
    apart = exact(one, clip=4) - exact(other, clip=4)
    assert np.abs(apart).sum() == 4
    noisy = private_counts(one, {0}, order, SeededDraws((0,))).counts
    # an entry has no noise with a probability of (1 - a) / (1 + a), an eighth; of 50, half have
    # none with one of less than 1e-9 (binomial)
    assert (noisy == exact(one, clip=4)).mean() < 0.5


def test_the_same_seed_gives_the_same_counts():
    order = CountTokens(tokens=TOKENS, clip=4, epsilon=1.0)
    data = examples([0, *range(1, 20)])
    one, other, another = (
        private_counts(data, {0}, order, SeededDraws((seed,))).counts for seed in (1, 1, 2)
    )
    assert np.array_equal(one, other)
    assert not np.array_equal(one, another)


def test_the_server_takes_noise_for_zero_and_what_many_devices_have_for_real():
    devices, order = 30, CountTokens(tokens=5000, clip=16, epsilon=8.0)
    least = floor_of(devices, order)
    # between the normal distribution's quantile of 1 in 5000 and twice that
    spread = np.sqrt(devices * 2 * order.ratio) / (1 - order.ratio)
    assert 3.54 * spread < least < 7.1 * spread
    common = np.zeros(order.tokens, np.int64)
    common[:3] = 2 * least // devices + 1
    replies = [
        TokenCounts(counts=(common + discrete_laplace(5000, order.ratio, SeededDraws((i,)))))
        for i in range(devices)
    ]
    total = summed(replies, order)
    assert (total[:3] > 0).all()
    # one is expected at most; that there are more than 6 has a chance of 1 in 10,000 (Poisson)
    assert (total[3:] > 0).sum() <= 6


def test_without_noise_a_single_count_is_enough():
    order = CountTokens(tokens=3, clip=16, epsilon=None)
    assert summed([TokenCounts(counts=np.array([0, 1, 0], np.int32))], order).tolist() == [0, 1, 0]
