"""The bytes of messages that are never packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine.core.message import DTYPES, NotAMessage, message, pack
from fedspine.core.outline import outline


@message
class Outlined:
    name: str
    share: float | None
    tensors: dict[str, torch.Tensor]
    rest: tuple[object, ...]


TYPES = [getattr(torch, name) for name, _ in DTYPES.values()]
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype), SHAPES, st.sampled_from(TYPES)
)
VALUES = st.builds(
    Outlined,
    name=st.text(max_size=8),
    share=st.none() | st.floats(allow_nan=False),
    tensors=st.dictionaries(st.text(max_size=5), TENSORS, max_size=5),
    rest=st.tuples(TENSORS, SHAPES.map(lambda shape: torch.ones(shape, dtype=torch.bool))),
)


@settings(max_examples=40)
@given(VALUES)
def test_an_outline_has_the_bytes_of_the_packed_message(value):
    assert outline(value).bytes == pack(value).bytes


def test_tensors_of_all_types_are_laid_out_as_safetensors_does():
    # 11 of each, so that their places have different numbers of digits
    value = tuple(torch.zeros(size, dtype=dtype) for dtype in TYPES for size in range(11))
    assert outline(value).bytes == pack(value).bytes


def test_tensors_without_numbers_count_as_those_with():
    real = {"a": torch.zeros(3, 5).half(), "mask": torch.ones(9, dtype=torch.bool)}
    bare = real | {"a": torch.zeros(3, 5, device="meta").half()}
    assert outline(bare) == outline(real)
    assert outline(bare).bytes == pack(real).bytes


def test_what_cannot_be_packed_has_no_outline():
    with pytest.raises(NotAMessage):
        outline({"object": object()})
    with pytest.raises(NotAMessage):
        outline(np.zeros(2, dtype=object))
