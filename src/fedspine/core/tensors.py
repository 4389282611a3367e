"""Pure functions over `Tensors`, dictionaries of tensors by parameter name."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, device

from fedspine.core.message import Tensors


def half(tensors: Tensors) -> Tensors:
    """The same tensors in fp16, as they cross the wire."""
    return {name: tensor.half() for name, tensor in tensors.items()}


def single(tensors: Tensors) -> Tensors:
    """The same tensors in fp32, as they are trained."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def moved(tensors: Tensors, to: device) -> Tensors:
    """The same tensors on another device."""
    return {name: tensor.to(to) for name, tensor in tensors.items()}


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of the same number of dimensions, stacked along a new first one, with zeros after the
    smaller ones.

    >>> import torch
    >>> padded([torch.ones(1), torch.ones(2)])
    tensor([[1., 0.],
            [1., 1.]])
    """
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for place, tensor in zip(stacked, tensors, strict=True):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


def average(weighted: Iterable[tuple[int | float, Mapping[str, Tensor]]]) -> Tensors:
    """The weighted mean of dictionaries with equal names and shapes; raises ValueError for none.

    >>> import torch
    >>> average([(1, {"x": torch.tensor([0.0])}), (3, {"x": torch.tensor([4.0])})])
    {'x': tensor([3.])}
    """
    total, sums = 0.0, {}
    for weight, tensors in weighted:
        total += weight
        for name, tensor in tensors.items():
            sums[name] = (
                sums[name] + weight * tensor.float() if name in sums else weight * tensor.float()
            )
    if total <= 0:
        raise ValueError("an average needs at least one positive weight")
    return {name: tensor / total for name, tensor in sums.items()}


def rebased(came: Tensors, sent: Tensors, today: Tensors) -> Tensors:
    """`today` plus the change from `sent` to `came`, fp32.

    Names that `today` lacks are returned as they came.

    >>> import torch
    >>> came, sent, today = ({"x": torch.tensor([value])} for value in (3.0, 1.0, 5.0))
    >>> rebased(came, sent, today)
    {'x': tensor([7.])}
    """
    return {
        name: today[name] + tensor.float() - sent[name].float() if name in today else tensor
        for name, tensor in came.items()
    }


def is_tensors(value: object) -> bool:
    """Whether this is a dictionary whose values are all tensors; true for an empty one."""
    return isinstance(value, dict) and all(isinstance(entry, Tensor) for entry in value.values())


def finite(tensors: Tensors) -> bool:
    """Whether no entry is NaN or infinite."""
    # both show in the extremes, which take one pass and no memory
    return all(
        math.isfinite(end)
        for tensor in tensors.values()
        if tensor.numel()
        for end in extremes(tensor)
    )


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry of a tensor that is not empty; NaN if any entry is NaN.

    >>> import torch
    >>> extremes(torch.tensor([2.0, -3.0, 1.0]))
    (-3.0, 2.0)
    """
    lowest, highest = tensor.aminmax()
    return float(lowest), float(highest)
