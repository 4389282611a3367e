"""Fed-HeLLo's patterns: how many devices of a fleet train each block."""

import numpy as np
import pytest

from fedspine.control.patterns import blocks_of_device, heights, shares

LAYERS, DEVICES = 6, 600


def trained(pattern, count, **more):
    """How many devices train each block, where each trains as many."""
    found = np.zeros(LAYERS, dtype=int)
    for i in range(DEVICES):
        blocks = blocks_of_device(pattern, LAYERS, count, f"d{i}", seed=3, **more)
        assert len(set(blocks)) == count and list(blocks) == sorted(blocks)
        found[list(blocks)] += 1
    return found


@pytest.mark.parametrize(
    ("pattern", "collective"),
    [
        ("triangle", [3, 3, 3, 2, 2, 1]),
        ("inverted", [1, 2, 2, 3, 3, 3]),
        ("bottleneck", [3, 2, 1, 2, 3, 3]),
    ],
)
def test_a_fleet_of_three_kinds_has_the_patterns_form(pattern, collective):
    """Devices with 3, 5 and 6 of 6 blocks, each kind with the highest of the pattern."""
    kinds = [blocks_of_device(pattern, LAYERS, count, "d", seed=0) for count in (3, 5, 6)]
    assert [sum(block in blocks for blocks in kinds) for block in range(LAYERS)] == collective


def test_uniform_trains_all_blocks_alike_and_each_device_always_the_same():
    found = trained("uniform", 2)
    # each block by a third of 600 devices: a standard error of sqrt(600 * 2/9) = 11.5
    assert abs(found - DEVICES / 3).max() < 4 * 11.5
    assert blocks_of_device("uniform", 6, 2, "d", 3) == blocks_of_device("uniform", 6, 2, "d", 3)


@pytest.mark.parametrize("pattern", ["triangle", "inverted", "bottleneck", "uniform"])
def test_drawn_blocks_follow_the_patterns_probabilities(pattern):
    expected = shares(heights(pattern, LAYERS))
    expected = DEVICES * expected / expected.sum()
    found = trained(pattern, 1, round=0)
    assert (abs(found - expected) < 4 * np.sqrt(expected)).all()
    again = [blocks_of_device(pattern, LAYERS, 3, "d", 3, round=number) for number in range(20)]
    assert len(set(again)) > 1


@pytest.mark.parametrize("pattern", ["triangle", "inverted", "bottleneck", "uniform"])
@pytest.mark.parametrize("round", [None, 4])
def test_no_block_below_what_memory_holds(pattern, round):
    blocks = blocks_of_device(pattern, LAYERS, 5, "d", 0, lowest=3, round=round)
    assert blocks == (3, 4, 5)
