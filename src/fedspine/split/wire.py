"""Features, their gradients and weights as they cross the wire: without padding, in fp32, fp16 or
int8.

Section 12 of the MergeSFL reconstruction: a split costs bytes, and this file saves them. int8 is
symmetric with one scale per token (per row for arrays). fp16 has one power of two per message,
because gradients are far below fp16's normal numbers. Values that are not finite stay so, and the
server detects them.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedspine.core.checks import Asked, Unusable, need, tensor_of
from fedspine.core.message import Tensors, message
from fedspine.core.tensors import extremes, half
from fedspine.split.interface import Features

WirePrecision: TypeAlias = Literal["fp32", "fp16", "int8"]
BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}  # of one number
DTYPES = (torch.float32, torch.float16, torch.int8)
STEPS = 127  # of int8 on each side of zero
LARGEST_EXPONENT = 15  # values are brought below 2^15, fp16 holds those below 2^16
SMALL = 2**15  # labels below it fit int16


@message
class Wired:
    """Features [rows, ...], or only the tokens of [rows, tokens, width], one after another."""

    values: Tensor  # fp32, fp16 or int8 [tokens, width] or [rows, ...]
    # fp32 factor of the values: [1] for fp16, one for each of `values` for int8
    scale: Tensor | None
    # bool [rows, tokens] where `values` holds tokens; None for arrays, and on the way back
    mask: Tensor | None

    def check(self, asked: Asked) -> None:
        """The parts fit each other."""
        need(self.values.dtype in DTYPES, f"values are of {self.values.dtype}")
        need(self.values.dim() >= 2, f"values are of {self.values.dim()} dimensions")
        if self.values.dtype == torch.float32:
            need(self.scale is None, "values of fp32 have a scale")
        else:
            steps = 1 if self.values.dtype == torch.float16 else len(self.values)
            _check_scale(self.scale, steps)
        if self.mask is not None:
            _check_mask(self.mask, len(self.values))


def _check_scale(scale: Tensor | None, steps: int) -> None:
    if scale is None:
        raise Unusable("values have no scale")
    tensor_of("scale", scale, torch.float32, (steps,))
    need(bool((scale >= 0).all()), "scale has a negative one")


def _check_mask(mask: Tensor, tokens: int) -> None:
    need(mask.dtype == torch.bool and mask.dim() == 2, "mask is not one bit for each token")
    inside = int(mask.sum())
    need(inside == tokens, f"mask has {inside} tokens, values have {tokens}")
    holes = mask.shape[1] > 1 and bool((mask[:, 1:] & ~mask[:, :-1]).any())
    need(not holes, "mask has padding before a token")


def wired(features: Features, precision: WirePrecision) -> Wired:
    """Features as they are sent."""
    values = features.values.detach().float()
    flat = values if features.mask is None else values[features.mask.to(values.device)]
    return _rounded(flat, precision, features.mask)


def unwired(sent: Wired, mask: Tensor | None = None) -> Features:
    """Features as they arrive, in fp32, with zeros as padding; `mask` says where the tokens of a
    gradient belong.
    """
    values = sent.values.float()
    if sent.scale is not None:
        values = values * sent.scale.view(-1, *[1] * (values.dim() - 1))
    mask = sent.mask if sent.mask is not None else mask
    if mask is None:
        return Features(values=values)
    mask = mask.to(values.device)
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    padded[mask] = values
    return Features(values=padded, mask=mask)


def gradient_wired(gradient: Features, precision: WirePrecision) -> Wired:
    """A gradient as it is sent: the device knows which tokens it sent."""
    sent = wired(gradient, precision)
    return Wired(values=sent.values, scale=sent.scale, mask=None)


def weights_wired(weights: Tensors, precision: str) -> Tensors:
    """Weights as they are sent beside features of this precision, or alone: in fp32 or fp16."""
    return weights if precision == "fp32" else half(weights)


def row_bytes(shape: tuple[int, ...], precision: WirePrecision) -> int:
    """Bytes of one row's features of this shape, [tokens, width] for text; the mask's bits and the
    header apart.

    >>> row_bytes((128, 768), "fp16"), row_bytes((128, 768), "int8"), row_bytes((256, 4, 4), "fp32")
    (196608, 98816, 16384)
    """
    scales = 4 * (shape[0] if len(shape) == 2 else 1) if precision == "int8" else 0
    return math.prod(shape) * BYTES[precision] + scales


def labels_wired(labels: Tensor) -> Tensor:
    """Labels as they are sent, [rows] or [rows, tokens]: in int16 where they fit, as in the
    authors' count of bytes.
    """
    return labels.to(torch.int16 if int(labels.max()) < SMALL else torch.int32)


def labels_unwired(sent: Tensor) -> Tensor:
    """Labels as a loss wants them."""
    return sent.long()


def _rounded(flat: Tensor, precision: WirePrecision, mask: Tensor | None) -> Wired:
    match precision:
        case "fp32":
            return Wired(values=flat, scale=None, mask=mask)
        case "fp16":
            # a power of two, so that nothing but the rounding to fp16 is lost
            exponent = math.frexp(_finite_or(max(map(abs, extremes(flat))), 1.0))[1]
            scale = 2.0 ** max(exponent - LARGEST_EXPONENT, -126)
            return Wired(values=(flat / scale).half(), scale=flat.new_full((1,), scale), mask=mask)
        case "int8":
            # per token or row; a row of zeros keeps them at any step
            scale = flat.flatten(1).abs().amax(1) / STEPS
            steps = torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (flat.dim() - 1))
            values = (flat / steps).nan_to_num().round().to(torch.int8)
            return Wired(values=values, scale=scale, mask=mask)


def _finite_or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
