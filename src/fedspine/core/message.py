"""The messages that may cross the wire, and the one codec behind traffic, checkpoints and equality
tests.

A message is a frozen, keyword-only dataclass. It is packed as one safetensors file whose metadata
holds the JSON of everything that is not a tensor; never a pickle. Fields may be None, bool, int,
float, str, tuples, dicts with string keys, torch tensors, numpy arrays and other messages. Boolean
tensors travel as bits.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, dataclass_transform

import numpy as np

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "dict[str, torch.Tensor]"  # by parameter name
T = TypeVar("T")

_REGISTRY: dict[str, type] = {}  # filled at import time only: the names that may be decoded
_FIELDS: dict[type, tuple[str, ...]] = {}  # of every message
_PLAIN = (bool, int, float, str)  # go into the JSON as they are, and so does None
_JSON = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for each message


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

    Raises NotAMessage for anything else, naming the place inside the value.
    """
    from safetensors import TensorSpec, serialize

    tensors: Tensors = {}

    def keep(tensor: "torch.Tensor") -> str:
        name = f"{len(tensors):05d}"
        tensors[name] = tensor.detach().cpu().contiguous()
        return name

    tree = _encode(value, keep, "value")
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
    return Packed(bytes(serialize(specs, metadata={"fedspine": _JSON.encode(tree)})))


def unpack(packed: Packed | bytes) -> Any:
    """Decode what `pack` made; raises NotAMessage for bytes that are not such a file or name an
    unknown message.
    """
    from safetensors.torch import load

    payload = packed.payload if isinstance(packed, Packed) else packed
    try:
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        tree = json.loads(header["__metadata__"]["fedspine"])
        tensors = load(payload)
    except Exception as error:
        raise NotAMessage(f"not a packed message: {error}") from None
    try:
        return _decode(tree, tensors)
    except NotAMessage:
        raise
    except Exception as error:
        raise NotAMessage(f"not a packed message: {error}") from None


def _encode(value: Any, keep: Callable[["torch.Tensor"], str], where: str) -> Any:
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, keep, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise NotAMessage(f"{where}: dict keys must be strings")
        return {
            "dict": {key: _encode(item, keep, f"{where}[{key!r}]") for key, item in value.items()}
        }
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return _encode_array(value, keep, where)
    name = type(value).__name__
    if _REGISTRY.get(name) is type(value):
        return {
            "message": name,
            "fields": {
                field: _encode(getattr(value, field), keep, f"{where}.{field}")
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
    return {kind: keep(array)}


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _decode(tree: Any, tensors: Tensors) -> Any:
    if tree is None or isinstance(tree, _PLAIN):
        return tree
    match tree:
        case {"tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"dict": items}:
            return {key: _decode(item, tensors) for key, item in items.items()}
        case {"tensor": name, **rest}:
            return _decode_array(tensors, name, rest)
        case {"array": name, **rest}:
            return _decode_array(tensors, name, rest).numpy()
        case {"message": name, "fields": values}:
            return _decode_message(name, values, tensors)
    raise NotAMessage(f"unknown node {str(tree)[:60]!r}")


def _decode_array(tensors: Tensors, name: str, rest: dict[str, Any]) -> "torch.Tensor":
    import torch

    if name not in tensors:
        raise NotAMessage(f"tensor {name!r} is missing")
    # a copy of its own: aligned as torch aligns, so that arithmetic does not depend on where the
    # bytes lay
    tensor = tensors[name].clone()
    if "bits" not in rest:
        return tensor
    shape = rest["bits"]
    count = math.prod(shape)
    if (
        min(shape, default=0) < 0 or not 0 <= 8 * tensor.numel() - count < 8
    ):  # else a few bytes could claim any size
        raise NotAMessage(f"{tensor.numel()} bytes of bits cannot be of shape {str(shape)[:60]}")
    bits = np.unpackbits(tensor.numpy(), count=count)
    return torch.from_numpy(bits.astype(bool).reshape(shape))


def _decode_message(name: str, values: dict[str, Any], tensors: Tensors) -> Any:
    cls = _REGISTRY.get(name)
    if cls is None:
        raise NotAMessage(f"unknown message {name!r}")
    if values.keys() != set(_FIELDS[cls]):
        raise NotAMessage(
            f"{name} has the fields {sorted(_FIELDS[cls])}, but {sorted(values)} came"
        )
    return cls(**{key: _decode(item, tensors) for key, item in values.items()})
