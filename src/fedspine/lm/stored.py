"""What blocks keep for the backward pass, quantised: the forward pass is exact, and the gradient is
taken at activations of few bits.

FedQuad, Li et al. 2025 (arXiv:2506.01001), says that; how many bits and which groups is ours. Each
128 numbers share a least value and a step in fp32, and each is kept as the nearest of 2^bits
values.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspine.lm.base import Base
from fedspine.lm.frozen import packed, unpacked

GROUP = 128  # numbers that share a range
HIDDEN = ("hidden_states", "x")  # what transformers calls what enters a block
RANGE_BITS = 64  # of a group's least value and step


@dataclass(frozen=True)
class Quantised:
    """Blocks whose stored activations have so many bits, 4 or 8."""

    blocks: tuple[int, ...]
    bits: int


def bits_each(bits: int) -> float:
    """What a number takes with its part of the group's range.

    >>> bits_each(4), bits_each(8)
    (4.5, 8.5)
    """
    return bits + RANGE_BITS / GROUP


@dataclass(frozen=True)
class Codes:
    """Numbers of a few bits each; as many as `size`, in groups of 128."""

    codes: Tensor  # uint8 [groups, 128 * bits / 8]
    least: Tensor  # fp32 [groups, 1]
    step: Tensor  # fp32 [groups, 1]
    bits: int
    size: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int) -> "Codes":
        """The codes of a flat tensor."""
        missing = -len(numbers) % GROUP
        groups = torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, GROUP).float()
        least = groups.amin(1, keepdim=True)
        step = (groups.amax(1, keepdim=True) - least) / (2**bits - 1)
        step = torch.where(step > 0, step, 1.0)
        codes = groups.sub_(least).div_(step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        if bits == 4:
            codes = packed(codes)
        return cls(codes=codes, least=least, step=step, bits=bits, size=len(numbers))

    def numbers(self) -> Tensor:
        """What they stand for, a flat fp32 tensor."""
        codes = self.codes
        if self.bits == 4:
            codes = unpacked(codes)
        return torch.addcmul(self.least, codes.float(), self.step).flatten()[: self.size]

    @property
    def bytes(self) -> int:
        parts = (self.codes, self.least, self.step)
        return sum(part.numel() * part.element_size() for part in parts)


class Stored:
    """While it is entered, these blocks of the fitted model keep their activations as codes.

    What several layers of a block read is kept once. Weights, what is shared by all blocks, and one
    number for each token stay as they are. `bytes` is what the codes of the last pass take, and
    `whole_bytes` what the activations took before.
    """

    def __init__(self, base: Base, how: Quantised) -> None:
        self._blocks = [base.blocks[block] for block in how.blocks]
        weights = base.fitted_weights().values()  # a quantised one is expanded, and then forgotten
        self._weights = {_place(weight) for weight in weights if isinstance(weight, Tensor)}
        self._bits, self._inside = how.bits, False
        self._shared: set[int] = set()  # storages of what enters a block beside the hidden states
        self._seen: dict[Any, tuple[Tensor, Codes]] = {}  # of the block that is computed
        self._stack = ExitStack()
        self.bytes = self.whole_bytes = 0

    def __enter__(self) -> "Stored":
        for block in self._blocks:
            begin = block.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._stack.callback(begin.remove)
            self._stack.callback(block.register_forward_hook(self._end, always_call=True).remove)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._stack.enter_context(hooks)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if block is self._blocks[0]:
            self.bytes = self.whole_bytes = 0
        beside = [*inputs[1:], *(each for name, each in named.items() if name not in HIDDEN)]
        self._shared = {_place(tensor) for tensor in _tensors(beside)}
        self._inside = True

    def _end(self, *_: object) -> None:
        self._inside = False
        self._seen.clear()  # from here on only the codes are kept

    def _pack(self, tensor: Tensor) -> Any:
        wanted = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] > 1
        place = _place(tensor)
        left = place in self._weights or place in self._shared or not tensor.numel()
        if left or not (self._inside and wanted):
            return tensor
        # all views of the same numbers are kept once; the tensor is held as long as its place is
        # remembered, so that nothing else gets there
        key = (place, tensor.storage_offset(), *tensor.shape, *tensor.stride())
        key = place if _is_whole(tensor) else key
        if key not in self._seen:
            flat = _flat_numbers(tensor)
            self._seen[key] = (tensor, Codes.of(flat, self._bits))
            self.bytes += self._seen[key][1].bytes
            self.whole_bytes += flat.numel() * flat.element_size()
        return self._seen[key][1], tensor.dtype, _form(tensor)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        codes, dtype, form = kept
        return codes.numbers().to(dtype).as_strided(*form)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of what it is a view of."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _flat_numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in the order in which they lie, or in its own if it is a part."""
    if _is_whole(tensor):
        return tensor.detach().as_strided((tensor.numel(),), (1,), 0)
    return tensor.detach().reshape(-1)


def _form(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a tensor in its flat numbers."""
    strides = tensor.stride()
    if not _is_whole(tensor):
        strides = torch.empty(tensor.shape, device="meta").stride()
    return tuple(tensor.shape), tuple(strides)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Collection[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found
