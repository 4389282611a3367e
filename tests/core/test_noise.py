"""The noise that a device adds to the weights that it trained."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedspine.core.draws import SecretDraws, SeededDraws
from fedspine.core.noise import LARGEST, Noise

SHAPE = (40, 500)


def noise_of(before, after, rows=32, share=3.0):
    return Noise(share, SeededDraws((7,))).added({"x": before}, {"x": after}, rows)["x"] - after


def test_it_is_the_share_of_what_changed_and_falls_with_the_fourth_root_of_the_rows():
    before = torch.randn(SHAPE)
    change = torch.sign(torch.randn(SHAPE)) * 0.01  # as AdamW's
    for rows, expected in ((32, 3.0), (512, 1.5), (320_000, 0.3)):
        came = noise_of(before, before + change, rows)
        # the deviation of n draws is known to 1 / sqrt(2 n), of which this is five
        assert float(came.std() / 0.01) == pytest.approx(
            expected, rel=5 / math.sqrt(2 * came.numel())
        )


@pytest.mark.parametrize("along", [0, 1])
def test_a_row_or_a_column_in_which_all_of_the_change_is_gathered_does_not_stand_out(along):
    change = torch.zeros(SHAPE)
    change.select(along, 5)[:] = 0.01
    came = noise_of(torch.zeros(SHAPE), change)
    there = came.select(along, 5)
    assert float(there.std() / 0.01) == pytest.approx(3.0, rel=5 / math.sqrt(2 * len(there)))
    assert came.std() > 0


def test_what_did_not_change_and_what_was_not_sent_stay():
    before = {"frozen": torch.randn(3, 4), "bias": torch.zeros(4), "none": torch.zeros(0, 4)}
    after = before | {"bias": torch.ones(4), "own": torch.ones(2)}
    came = Noise(4.0, SecretDraws(b"k" * 32)).added(before, after, 32)
    assert torch.equal(came["frozen"], before["frozen"])
    assert torch.equal(came["own"], after["own"])
    assert came["none"].shape == (0, 4)
    assert not torch.equal(came["bias"], after["bias"])


def test_what_comes_out_crosses_the_wire():
    came = Noise(8.0, SeededDraws((1,))).added(
        {"x": torch.zeros(50)}, {"x": torch.full((50,), LARGEST)}, 1
    )
    assert came["x"].half().isfinite().all()


# --- the draws of a real site ---

WORDS = np.array([0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 1], np.uint64)


def test_every_draw_is_the_exact_one_of_its_bits(monkeypatch):
    """Box and Muller's in float64, for random bits and all edges. The docstring's bound on the
    distribution follows: the density is 0.4 at most, and float32 holds each of the two uniform
    numbers to 2**-24.
    """
    some = np.frombuffer(np.random.default_rng(0).bytes(4 * 2**18), "<u4").reshape(2, -1)
    edges = np.stack([each.ravel() for each in np.meshgrid(WORDS, WORDS)])
    words = np.concatenate([some, edges], 1).astype("<u4")
    monkeypatch.setattr(SecretDraws, "_bytes", lambda _, count: words.tobytes()[:count])
    came = SecretDraws(b"k" * 32).coarse_normal(words.size).reshape(2, -1)
    uniform = (words[0].astype(np.float32) + np.float32(0.5)).astype(float) / 2**32
    assert np.abs(uniform - (words[0] + 0.5) / 2**32).max() < 2**-24
    radius = np.sqrt(-2 * np.log(uniform))
    angle = words[1].view("<i4") * (np.pi / 2**31)
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    # five roundings of 2^-24 of a radius up to 6.7, of which the docstring promises
    assert np.abs(came - exact).max() < 2e-6
    assert 6.7 < np.abs(came).max() < 6.77


def test_draws_are_normal_to_five_deviations():
    draws, counts, whole = SecretDraws(b"k" * 32), np.zeros(5), 2**24
    for _ in range(8):
        came = draws.coarse_normal(whole // 8)
        counts += [np.count_nonzero(np.abs(came) > most) for most in range(1, 6)]
    expected = whole * 2 * stats.norm.sf(np.arange(1, 6))
    assert expected[-1] > 9
    least, most = stats.poisson.interval(1 - 1e-4, expected)
    assert (least <= counts).all() and (counts <= most).all(), (counts, expected)
    some, half = came[: 2**19], len(came) // 2
    # the last of eight calls; Kolmogorov's distribution is beyond 1.95 once in a thousand
    assert stats.kstest(some, stats.norm.cdf).statistic * len(some) ** 0.5 < 1.95
    # the two of a pair, of one radius
    assert abs(np.corrcoef(came[:half], came[half:])[0, 1]) < 4 / half**0.5
    assert abs(np.corrcoef(came[:half] ** 2, came[half:] ** 2)[0, 1]) < 4 / half**0.5


def test_many_tensors_at_a_time_get_what_each_would_alone(monkeypatch):
    """In the order of their names, however they are stacked and in however many parts."""
    shapes = [(4, 9), (7, 4), (4, 9), (3,), (2, 3, 3, 3), (7, 4), (), (4, 9), (2, 3, 3, 3)]
    before = {f"l{place}": torch.randn(shape) for place, shape in enumerate(shapes)}
    after = {name: tensor + torch.randn(tensor.shape) for name, tensor in before.items()}
    draws = SeededDraws((7,))
    alone = {}
    for name, sent in before.items():
        alone |= Noise(8.0, draws, 0.3).added({name: sent}, {name: after[name]}, 32)
    for entries in (1, 50, 2**19):
        monkeypatch.setattr("fedspine.core.noise.TOGETHER", entries)
        came = Noise(8.0, SeededDraws((7,)), 0.3).added(before, after, 32)
        assert list(came) == list(after)
        assert all(torch.equal(came[name], alone[name]) for name in after), entries
