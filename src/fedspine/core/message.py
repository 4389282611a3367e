"""The messages that may cross the wire, and the codec for traffic, checkpoints and the comparison
of states.

A message is a frozen, keyword-only dataclass. It is packed as one safetensors file whose metadata
holds the JSON of everything that is not a tensor; never a pickle. Fields may be None, bool, int,
float, str, tuples, dicts with string keys, torch tensors, numpy arrays and other messages. Boolean
tensors travel as bits.

A received message may be meant to exhaust memory. So each tensor is referenced once, sizes and
nesting are bounded, and decoding needs at most three times the bytes of the message, itself
included, plus SPARE_BYTES.
"""

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, TypeVar, dataclass_transform

import numpy as np

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "dict[str, torch.Tensor]"  # by parameter name
Buffer: TypeAlias = bytes | bytearray | memoryview | np.ndarray
T = TypeVar("T")

SPARE_BYTES = 64 << 20  # that a message of any size may take when it is decoded
PER_HEADER_BYTE = 40  # bytes that JSON takes at most as Python objects; tests/core measure it
MOST_DEPTH = 64  # of tuples, dicts and messages in each other
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 1 << 40  # of one tensor
MOST_ELEMENTS_BESIDE_NONE = 1 << 24  # product of the other dimensions, where one is 0
LARGEST_INT = (1 << 256) - 1  # larger ones are no float, and only cost time

LENGTH = 8  # bytes before the header, its length
DTYPES = {  # name in the header: name in torch, bytes of an element
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
_TORCH_NAMES = frozenset(name for name, _ in DTYPES.values())
_REGISTRY: dict[str, type] = {}  # filled at import time only: the names that may be decoded
_FIELDS: dict[type, tuple[str, ...]] = {}  # of every message
_PLAIN = (bool, int, float, str)  # go into the JSON as they are, and so does None
JSON_TEXT = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for each message


class NotAMessage(ValueError):
    """Bytes or a value that the codec refuses; the text says where and why."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass and register its name for decoding.

    >>> from fedspine import message
    >>> @message
    ... class Hello:
    ...     name: str
    >>> unpack(pack(Hello(name="x")))
    Hello(name='x')
    """
    made = dataclass(frozen=True, kw_only=True, eq=False)(cls)
    known = _REGISTRY.setdefault(cls.__name__, made)
    if (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
        raise TypeError(
            f"two messages are called {cls.__name__}: {known.__module__} and {made.__module__}"
        )
    _REGISTRY[cls.__name__] = made
    _FIELDS[made] = tuple(field.name for field in fields(made))
    return made


@dataclass(frozen=True)
class Packed:
    """An encoded value; `bytes` is what every fleet charges for it."""

    payload: bytes

    @property
    def bytes(self) -> int:
        return len(self.payload)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.payload).hexdigest()


def pack(value: Any) -> Packed:
    """Encode a message, or a tuple or dict of what messages may hold.

    Raises NotAMessage for anything else; the text names the place inside the value.
    """
    from safetensors import TensorSpec, serialize

    tensors: Tensors = {}

    def keep(tensor: "torch.Tensor") -> str:
        name = f"{len(tensors):05d}"
        tensors[name] = tensor.detach().cpu().contiguous()
        return name

    tree = encoded(value, keep, "value", 0)
    # straight from memory: safetensors' own way from torch takes six times as long for a small
    # message
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    return Packed(bytes(serialize(specs, metadata={"fedspine": JSON_TEXT.encode(tree)})))


def unpack(packed: Packed | Buffer, *, spare_bytes: int = SPARE_BYTES) -> Any:
    """Decode what `pack` made; raises NotAMessage for bytes that are not such a file or name an
    unknown message.

    All that is decoded takes at most twice the bytes of the message plus `spare_bytes`, which is
    checked before memory is allocated. Callers raise it for a run's own state, whose digest they
    checked.
    """
    payload = packed.payload if isinstance(packed, Packed) else packed
    try:
        return _Reader(payload, spare_bytes).value()
    except NotAMessage:
        raise
    except Exception as error:
        raise NotAMessage(f"not a packed message: {error}") from None


def encoded(value: Any, keep: Callable[["torch.Tensor"], str], where: str, depth: int) -> Any:
    """The JSON form of a value; `keep` takes each of its tensors and returns a name for it.

    `where` names the place in errors. Raises NotAMessage as `pack` does.
    """
    if type(value) is int:
        return value if -LARGEST_INT <= value <= LARGEST_INT else _too_large(value, where)
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if depth == MOST_DEPTH:
        raise NotAMessage(f"{where[:60]}: values are nested deeper than {MOST_DEPTH}")
    below = depth + 1
    if isinstance(value, tuple):
        items = [encoded(item, keep, f"{where}[{i}]", below) for i, item in enumerate(value)]
        return {"tuple": items}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise NotAMessage(f"{where}: dict keys must be strings")
        return {
            "dict": {
                key: encoded(item, keep, f"{where}[{key!r}]", below) for key, item in value.items()
            }
        }
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return _encode_array(value, keep, where)
    name = type(value).__name__
    if _REGISTRY.get(name) is type(value):
        return {
            "message": name,
            "fields": {
                field: encoded(getattr(value, field), keep, f"{where}.{field}", below)
                for field in _FIELDS[type(value)]
            },
        }
    raise NotAMessage(
        f"{where}: {type(value).__name__} cannot cross "
        "the wire; use a @message, tensor, tuple or dict"
    )


def _encode_array(value: Any, keep: Callable[["torch.Tensor"], str], where: str) -> dict[str, Any]:
    import torch

    kind = "tensor" if _is_tensor(value) else "array"
    try:
        # writable, since torch warns of arrays that are not
        array = (
            value
            if kind == "tensor"
            else torch.from_numpy(np.require(value, requirements=("C", "W")))
        )
    except (TypeError, ValueError):
        raise NotAMessage(f"{where}: arrays of {value.dtype} cannot cross the wire") from None
    if array.dtype is torch.bool:
        bits = torch.from_numpy(np.packbits(array.cpu().numpy().reshape(-1)))
        return {kind: keep(bits), "bits": list(array.shape)}
    if str(array.dtype).removeprefix("torch.") not in _TORCH_NAMES:
        raise NotAMessage(f"{where}: tensors of {array.dtype} cannot cross the wire")
    return {kind: keep(array)}


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class _Reader:
    """Reads one message; it counts what an allocation takes before it makes it."""

    def __init__(self, payload: Buffer, spare_bytes: int) -> None:
        self._bytes = np.frombuffer(payload, np.uint8)
        self._most = self._room = 2 * self._bytes.size + spare_bytes
        length = int.from_bytes(self._bytes[:LENGTH].tobytes(), "little")
        if length > self._bytes.size - LENGTH:
            raise NotAMessage(f"not a packed message: it has no header of {length} bytes")
        self._start = LENGTH + length  # of the tensors' bytes
        self._take(PER_HEADER_BYTE * length)
        header = _JSON_OBJECTS.decode(str(self._bytes[LENGTH : self._start], "utf-8"))
        self._text = header.pop("__metadata__")["fedspine"]
        self._entries = _entries(header, self._bytes.size - self._start)

    def value(self) -> Any:
        """The whole value; each tensor must be referenced exactly once."""
        value = self._decode(_JSON_OBJECTS.decode(self._text), 0)
        if self._entries:
            raise NotAMessage(f"tensor {next(iter(self._entries))!r} has no place in the value")
        return value

    def _take(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise NotAMessage(
                f"a message of {self._bytes.size} bytes would take more than {self._most} "
                "when it is decoded; send numbers as tensors, and masks of fewer entries"
            )

    def _decode(self, tree: Any, depth: int) -> Any:
        kind = type(tree)
        if kind is int:
            return tree if -LARGEST_INT <= tree <= LARGEST_INT else _too_large(tree, "value")
        if kind is not dict:
            if kind is not list:  # null, true, false, a number or a text
                return tree
        elif depth == MOST_DEPTH:
            raise NotAMessage(f"values are nested deeper than {MOST_DEPTH}")
        elif len(tree) == 1:  # faster than `match`, and most nodes are such
            ((what, inner),) = tree.items()
            if what == "tuple" and type(inner) is list:
                return tuple([self._decode(item, depth + 1) for item in inner])
            if what == "dict" and type(inner) is dict:
                return {key: self._decode(item, depth + 1) for key, item in inner.items()}
            if what == "tensor":
                return self._copied(self._entry(inner))
            if what == "array":
                return self._copied(self._entry(inner)).numpy()
        else:
            match tree:
                case {"tensor": name, "bits": shape, **rest} if not rest:
                    return self._mask(self._entry(name), shape)
                case {"array": name, "bits": shape, **rest} if not rest:
                    return self._mask(self._entry(name), shape).numpy()
                case {"message": name, "fields": values, **rest} if not rest:
                    return self._message(name, values, depth + 1)
        raise NotAMessage(f"unknown node {str(tree)[:60]!r}")

    def _message(self, name: str, values: dict[str, Any], depth: int) -> Any:
        cls = _REGISTRY.get(name)
        if cls is None:
            raise NotAMessage(f"unknown message {name!r}")
        if values.keys() != set(_FIELDS[cls]):
            raise NotAMessage(f"{name} has the fields {sorted(_FIELDS[cls])}, got {sorted(values)}")
        return cls(**{key: self._decode(item, depth) for key, item in values.items()})

    def _entry(self, name: str) -> "_Entry":
        entry = self._entries.pop(name, None)
        if entry is None:
            raise NotAMessage(f"tensor {name!r} is missing, or has another place already")
        return entry

    def _copied(self, entry: "_Entry") -> "torch.Tensor":
        """A tensor of its own: aligned as torch aligns, so that arithmetic does not depend on where
        the bytes lay.
        """
        import torch

        self._take(entry.stop - entry.begin)
        tensor = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype][0]))
        if entry.stop > entry.begin:
            address = self._bytes.ctypes.data + self._start + entry.begin
            ctypes.memmove(tensor.data_ptr(), address, entry.stop - entry.begin)
        return tensor

    def _mask(self, entry: "_Entry", shape: Any) -> "torch.Tensor":
        import torch

        count, bits = _elements(shape), _elements(entry.shape)
        if count is None or not 0 <= 8 * bits - count < 8 or entry.dtype != "U8":
            raise NotAMessage(f"{bits} bytes of bits cannot be of shape {str(shape)[:60]}")
        self._take(count)
        packed = self._bytes[self._start + entry.begin : self._start + entry.stop]
        return torch.from_numpy(np.unpackbits(packed, count=count).view(np.bool_).reshape(shape))


class _Entry(NamedTuple):
    """A tensor in the header; its bytes are [begin, stop) of those behind the header."""

    dtype: str
    shape: list[int]
    begin: int
    stop: int


def _entries(header: dict[str, Any], size: int) -> dict[str, _Entry]:
    """The tensors of a header; raises NotAMessage unless they fill `size` bytes without a gap."""
    entries, end = {}, 0
    for name, entry in header.items():
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in DTYPES:
            raise NotAMessage(f"tensor {name!r} is of the unknown type {str(dtype)[:60]!r}")
        count = _elements(shape)
        if count is None or begin != end or stop != end + count * DTYPES[dtype][1]:
            raise NotAMessage(
                f"tensor {name!r} of shape {str(shape)[:60]} cannot be bytes {begin} to {stop}"
            )
        entries[name], end = _Entry(dtype, shape, end, stop), stop
    if end != size:
        raise NotAMessage(f"not a packed message: tensors of {end} bytes in {size} bytes")
    return entries


def _elements(shape: Any) -> int | None:
    """The number of elements; None for an invalid shape or one beyond the limits."""
    if type(shape) is not list or len(shape) > MOST_DIMENSIONS:
        return None
    count = whole = 1
    for length in shape:
        if type(length) is not int or not 0 <= length <= MOST_ELEMENTS:
            return None
        count, whole = count * length, whole * (length or 1)
    # what is made of a tensor without elements, such as sums, is as large as its other dimensions
    return count if count or whole <= MOST_ELEMENTS_BESIDE_NONE else None


def _too_large(value: int, where: str) -> NoReturn:
    raise NotAMessage(f"{where}: an integer of {value.bit_length()} bits; at most 256 are expected")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key comes twice."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    raise NotAMessage("not a packed message: a key comes twice")


_JSON_OBJECTS = json.JSONDecoder(object_pairs_hook=_once)
