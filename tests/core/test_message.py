"""The codec: whatever may cross the wire comes back as it was, and nothing else gets through."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedspine.core.message import NotAMessage, Packed, message, pack, unpack

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@message
class Leaf:
    name: str
    value: object


@message
class Pair:
    left: object
    right: object = None


@st.composite
def tensors(draw):
    """Any bits of any dtype, some of them NaN, in any layout."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if dtype is torch.bool:
        made = (
            torch.from_numpy(rng.random(shape) < 0.5)
            if shape
            else torch.tensor(bool(rng.random() < 0.5))
        )
    else:
        made = torch.frombuffer(bytearray(rng.bytes(8 * max(1, math.prod(shape)))), dtype=dtype)
        made = made[: math.prod(shape)].reshape(shape)
    return made.T if made.dim() == 2 and draw(st.booleans()) else made


@st.composite
def arrays(draw):
    dtype = draw(
        st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_])
    )
    made = np.asarray(np.random.default_rng(0).integers(0, 2, draw(shapes))).astype(dtype)
    made.setflags(write=draw(st.booleans()))
    return made


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars | tensors() | arrays(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["tuple", "dict", "tensor", "message"]),
            inner,
            max_size=3,
        ),
        st.builds(Leaf, name=st.text(max_size=3), value=inner),
        st.builds(Pair, left=inner, right=inner),
    ),
    max_leaves=8,
)


def same(first, second):
    """Equal in type, structure and every bit."""
    assert type(first) is type(second)
    match first:
        case torch.Tensor():
            assert first.dtype == second.dtype
            assert first.shape == second.shape
            assert _bits(first) == _bits(second)
        case np.ndarray():
            assert first.dtype == second.dtype
            assert first.shape == second.shape
            assert first.tobytes() == second.tobytes()
        case tuple():
            assert len(first) == len(second)
            for one, other in zip(first, second, strict=True):
                same(one, other)
        case dict():
            assert list(first) == list(second)
            for key in first:
                same(first[key], second[key])
        case Leaf() | Pair():
            same(vars(first), vars(second))
        case float():
            assert first.hex() == second.hex()
        case _:
            assert first == second


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(deadline=None, max_examples=150)
@given(values)
def test_everything_comes_back_as_it_was(value):
    packed = pack(value)
    again = unpack(packed)
    same(value, again)
    assert pack(again).payload == packed.payload


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_travel(value):
    assert str(unpack(pack((value,)))[0]) == str(value)


def test_numpy_scalars_become_plain_numbers():
    same(unpack(pack((np.int64(3), np.float32(0.5), np.float64(0.1)))), (3, 0.5, 0.1))


def test_bytes_are_the_length_of_what_travels():
    packed = pack(Leaf(name="x", value=torch.zeros(1000)))
    assert packed.bytes == len(packed.payload)
    assert 4000 < packed.bytes < 4400
    assert packed.sha256 == pack(unpack(packed)).sha256


def test_booleans_travel_as_bits():
    many, none = (
        pack(torch.ones(80_000, dtype=torch.bool)).bytes,
        pack(torch.ones(0, dtype=torch.bool)).bytes,
    )
    assert 10_000 <= many - none < 10_100


def test_sharing_does_not_survive_the_wire():
    shared = torch.arange(4.0)
    first, second = unpack(pack((shared, shared[1:])))
    first[1] = 9.0
    assert second.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not torch.bool])
def test_packed_bytes_are_those_of_safetensors_own_way_from_torch(dtype):
    whole = torch.arange(24).to(dtype).view(2, 3, 4)
    views = (
        whole,
        whole[:, 1:],
        whole.transpose(0, 2),
        whole[:0],
        whole[0, 0, 0],
        whole[:1].expand(3, 3, 4),
    )
    packed = pack(views).payload
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    copies = {
        f"{i:05d}": view.clone(memory_format=torch.contiguous_format)
        for i, view in enumerate(views)
    }
    assert packed == save(copies, header["__metadata__"])


def test_gradients_stay_behind():
    assert not unpack(pack(torch.ones(2, requires_grad=True))).requires_grad


class Unregistered:
    """An object that no message may hold."""


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Unregistered(), "value: Unregistered"),
        ({"a": (1, Unregistered())}, r"value\['a'\]\[1\]: Unregistered"),
        (Leaf(name="x", value=[1, 2]), r"value\.value: list"),
        ({1: "x"}, "value: dict keys must be strings"),
        ({"set": {1}}, r"value\['set'\]: set"),
        (b"bytes", "value: bytes"),
        (Unregistered, "value: type"),
        (print, "value: builtin_function_or_method"),
        (1j, "value: complex"),
        ((np.array([Unregistered()]),), r"value\[0\]: arrays of object"),
        (np.array(["text"]), "value: arrays of <U4"),
    ],
)
def test_what_is_no_message_is_refused_with_its_place(value, where):
    with pytest.raises(NotAMessage, match=where):
        pack(value)


def changed(payload, edit):
    """The payload with its tree edited, its tensors as they were."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    header["__metadata__"]["fedspine"] = json.dumps(
        edit(json.loads(header["__metadata__"]["fedspine"]))
    )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload[8 + length :]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda tree: tree | {"message": "Unregistered"}, "unknown message 'Unregistered'"),
        (
            lambda tree: tree | {"fields": {"name": "x"}},
            r"has the fields \['name', 'value'\], got \['name'\]",
        ),
        (lambda tree: tree | {"fields": tree["fields"] | {"more": 1}}, "got .*'more'"),
        (
            lambda tree: tree | {"fields": {"name": "x", "value": {"tensor": "00009"}}},
            "tensor '00009' is missing",
        ),
        (lambda tree: tree | {"fields": 3}, "not a packed message"),
        (lambda tree: {"call": "os.system"}, "unknown node"),
        (lambda tree: [tree], "unknown node"),
        (lambda tree: {"tensor": "00000", "bits": [-3]}, "3 bytes of bits cannot be of shape"),
    ],
)
def test_a_tree_that_pack_never_makes_is_refused(edit, reason):
    payload = pack(Leaf(name="x", value=torch.ones(3))).payload
    unpack(changed(payload, lambda tree: tree))  # the surgery itself is sound
    with pytest.raises(NotAMessage, match=reason):
        unpack(changed(payload, edit))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_torn_bytes_are_refused(data):
    payload = pack(Pair(left=torch.arange(9.0), right=("x", 1))).payload
    with pytest.raises(NotAMessage):
        unpack(payload[: data.draw(st.integers(0, len(payload) - 1))])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_flipped_bytes_give_a_value_or_are_refused(data):
    payload = bytearray(
        pack(Pair(left=torch.arange(9.0), right=torch.ones(9, dtype=torch.bool))).payload
    )
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        unpack(bytes(payload))
    except NotAMessage as error:
        assert "\n" not in str(error)  # noqa: PT017 - most flips hit numbers and are not seen


def test_there_is_no_pickle_inside_and_none_is_read():
    payload = pack(Leaf(name="x", value=torch.ones(3))).payload
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(payload)
    with pytest.raises(NotAMessage):
        unpack(Packed(pickle.dumps(Leaf)))


def test_messages_are_frozen_and_named_once():
    with pytest.raises(AttributeError):
        Leaf(name="x", value=1).name = "y"
    with pytest.raises(TypeError):
        Leaf("x", 1)
    with pytest.raises(TypeError, match="two messages are called Leaf"):
        message(type("Leaf", (), {"__annotations__": {"other": int}, "__module__": "elsewhere"}))
