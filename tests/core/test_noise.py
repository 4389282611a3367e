"""The noise that a device adds to the weights that it trained."""

import math

import pytest
import torch

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
