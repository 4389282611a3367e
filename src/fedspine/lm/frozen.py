"""Frozen weights in 8 or 4 bits, expanded one layer at a time for each product.

They are torchao's affine codes. Weights that share a scale and a zero point, a group, lie along the
side of a layer that pruning never cuts, that of the residual stream. So each row or column of a
head or a channel has groups of its own, and codes are cut like weights: what is cut and then
expanded has the bits of what is expanded and then cut.

The only file that imports torchao.
"""

import importlib.util
import logging
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fedspine.core.errors import BadInput
from fedspine.lm.prunable_layout import PrunableSite, QuantisedLayout

EXTRA = "pip install 'fedspine[quantised]'"


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of one prunable layer; a line is a row of it, or a column where these are cut."""

    codes: UInt8[Tensor, "lines bytes"]  # of 4 bits: two in a byte
    scale: Float[Tensor, "lines groups"]  # bf16
    zero: UInt8[Tensor, "lines groups"]
    bits: int
    columns: bool  # whether its lines are columns
    dtype: torch.dtype  # to which it is expanded

    @property
    def bytes(self) -> int:
        """What it takes."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero))

    def expanded(self) -> Float[Tensor, "rows columns"]:
        """The weight as a tensor of its own."""
        codes = unpacked(self.codes) if self.bits == 4 else self.codes
        lines = torchao().quant_primitives.dequantize_affine(
            codes,
            (1, codes.shape[1] // self.scale.shape[1]),
            self.scale,
            self.zero,
            torch.uint8,
            0,
            2**self.bits - 1,
            output_dtype=self.dtype,
        )
        return lines.T if self.columns else lines

    def cut(self, lines: Int[Tensor, " kept"] | None) -> "QuantisedWeight":
        """Only these lines; all where None is given."""
        if lines is None or len(lines) == len(self.codes):
            return self
        at = lines.to(self.codes.device)
        return replace(self, codes=self.codes[at], scale=self.scale[at], zero=self.zero[at])

    def to(self, device: torch.device) -> "QuantisedWeight":
        codes, scale, zero = (part.to(device) for part in (self.codes, self.scale, self.zero))
        return replace(self, codes=codes, scale=scale, zero=zero)


Frozen: TypeAlias = Tensor | QuantisedWeight


def expanded(weight: Frozen) -> Tensor:
    """The weight as a tensor: a new one where it is quantised."""
    return weight.expanded() if isinstance(weight, QuantisedWeight) else weight


def quantised(
    weight: Float[Tensor, "rows columns"],
    site: PrunableSite,
    layout: QuantisedLayout,
    dtype: torch.dtype,
) -> QuantisedWeight:
    """The weight of this layer in the bits of its layout, to be expanded to `dtype`; a number goes
    to the nearest of its group's codes.
    """
    needs_torchao(layout.bits)
    primitives, columns = torchao().quant_primitives, site.column_units is not None
    lines = (weight.T if columns else weight).contiguous().float()
    group, most = (1, layout.group), 2**layout.bits - 1
    scale, zero = primitives.choose_qparams_affine(
        lines,
        primitives.MappingType.ASYMMETRIC,
        group,
        torch.uint8,
        0,
        most,
        scale_dtype=torch.bfloat16,  # as wide a range as the weights
        zero_point_dtype=torch.uint8,
    )
    codes = primitives.quantize_affine(lines, group, scale, zero, torch.uint8, 0, most)
    return QuantisedWeight(
        codes=packed(codes) if layout.bits == 4 else codes,
        scale=scale.view(len(lines), -1),
        zero=zero.view(len(lines), -1),
        bits=layout.bits,
        columns=columns,
        dtype=dtype,
    )


def packed(codes: UInt8[Tensor, "lines codes"]) -> UInt8[Tensor, "lines bytes"]:
    """Codes of 4 bits, two in a byte; their number must be even.

    >>> packed(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist()
    [[33]]
    """
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpacked(codes: UInt8[Tensor, "lines bytes"]) -> UInt8[Tensor, "lines codes"]:
    """The reverse of `packed`."""
    return torch.stack([codes & 15, codes >> 4], 2).flatten(1)


def needs_torchao(bits: int | None) -> None:
    """Raise BadInput where weights are to have so many bits and it is not installed."""
    if bits is not None and importlib.util.find_spec("torchao") is None:
        raise BadInput(f"run.frozen_bits = {bits} needs torchao; {EXTRA}, or leave it out")


@cache
def torchao() -> Any:
    """Its package `quantization`, imported without warnings about kernels for GPUs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import quantization
    finally:
        logging.disable(before)
    return quantization
