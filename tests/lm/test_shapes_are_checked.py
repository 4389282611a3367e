"""The hook of tests/conftest.py: annotations of shapes and types are checked in tests."""

import jaxtyping
import torch

from fedspine.lm.structure import cut


def test_the_first_calls_are_checked_and_then_one_by_turns():
    """Of 200 calls with floats as indices 1 to 4, 97 and 194 are refused; a check left out lets it
    return the tensor, as there is nothing to cut.
    """
    refused = []
    for call in range(1, 201):
        try:
            cut(torch.ones(3), torch.zeros(3), 0)
        except jaxtyping.TypeCheckError:
            refused.append(call)
    assert refused == [1, 2, 3, 4, 97, 194]
