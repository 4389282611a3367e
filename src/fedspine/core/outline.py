"""A message without its values, and its size on the wire.

`fedspine plan` charges messages without packing them, since their tensors may take gigabytes.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedspine.core.message import DTYPES, JSON_TEXT, LENGTH, encoded

if TYPE_CHECKING:
    import torch

ALIGNED = 8  # bytes; the length of a safetensors header is a multiple of it
# torch's names of dtypes, in the order in which safetensors writes a file's tensors
WRITTEN = ("uint64", "int64", "float64", "float32", "uint32", "int32", "bfloat16", "float16",
           "uint16", "int16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")  # fmt: skip
IN_HEADER = {torch_name: (name, size) for name, (torch_name, size) in DTYPES.items()}


@dataclass(frozen=True)
class Outline:
    """The JSON of a message, and the dtype and shape of each of its tensors."""

    text: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """The size of the packed message: a header with each tensor's offsets, and the tensors."""
        header: dict[str, Any] = {"__metadata__": {"fedspine": self.text}}
        end = 0
        numbered = sorted(enumerate(self.tensors), key=lambda one: WRITTEN.index(one[1][0]))
        for number, (dtype, shape) in numbered:
            name, size = IN_HEADER[dtype]
            begin, end = end, end + size * math.prod(shape)
            entry = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
            header[f"{number:05d}"] = entry
        length = len(JSON_TEXT.encode(header))
        return LENGTH + -(-length // ALIGNED) * ALIGNED + end


def outline(value: Any) -> Outline:
    """The outline of what `core.message.pack` would make of `value`, whose floating-point tensors
    may be on PyTorch's meta device.

    Raises NotAMessage as `pack` does.

    >>> from fedspine.core.message import pack
    >>> outline((1, "x")).bytes == pack((1, "x")).bytes
    True
    """
    tensors: list[tuple[str, tuple[int, ...]]] = []

    def keep(tensor: "torch.Tensor") -> str:
        tensors.append((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        return f"{len(tensors) - 1:05d}"

    return Outline(JSON_TEXT.encode(encoded(value, keep, "value", 0)), tuple(tensors))
