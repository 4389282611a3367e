"""A net for given arrays, and the arrays as it reads them."""

import numpy as np
from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Arrays
from fedspine.nets.choice import CHANNELS
from fedspine.nets.models import blocks_of, design_of
from fedspine.nets.net import Net, NetModel


def load(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
) -> tuple[Net, Arrays, Arrays]:
    """The net called `name`, and both splits, rows [rows, ...] and labels [rows] each, as it reads
    them.

    Floats are standardised by the mean and deviation of each channel of the training rows; uint8
    stays as it is. Raises BadInput for an unknown net or rows that it cannot read.
    """
    rows, others = (_arranged(name, x) for x, _ in (train, test))
    if (scale := scale_of(rows)) is not None:
        mean, deviation = scale
        rows, others = (rows - mean) / deviation, (others - mean) / deviation
    net = Net(name, rows.shape[1:], classes)
    return net, Arrays(x=rows, labels=train[1]), Arrays(x=others, labels=test[1])


def stored(model: NetModel, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A stock module with the weights of a model that was trained on rows of `shape`, to evaluate.

    It reads rows as `load` gives them: channels first, floats standardised, uint8 as 0 to 1.
    """
    module = empty(model.net, shape, classes)
    module.load_state_dict(model.weights)
    return module.eval().requires_grad_(False)


def empty(name: str, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """The net called `name` for rows of `shape`, with arbitrary weights."""
    return nn.Sequential(blocks_of(name, arranged_shape(name, shape), classes))


def arranged_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a row, [channels, ...], as the net called `name` reads it."""
    return _arranged(name, np.empty((0, *shape))).shape[1:]


def scale_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation, float32 [1, channels, 1, ...], of training rows of floats,
    [rows, channels, ...]; None for uint8, which is not standardised.
    """
    if rows.dtype == np.uint8:
        return None
    others = (0, *range(2, rows.ndim))
    mean = rows.mean(others, dtype=np.float64, keepdims=True)
    deviation = rows.std(others, dtype=np.float64, keepdims=True)
    deviation[deviation == 0] = 1  # a constant channel carries no information
    return mean.astype(np.float32), deviation.astype(np.float32)


def channels_at(name: str, shape: tuple[int, ...]) -> int | None:
    """Which dimension of [rows, *shape] holds the channels for the net called `name`; None where
    rows have none.

    Raises BadInput for rows that it cannot read.
    """
    layout = design_of(name).layout
    match layout, len(shape):
        case ("series", 1) | ("image", 2):
            return None
        case "series", 2 if shape[0] <= shape[1]:
            return 1
        case "image", 3 if shape[0] in CHANNELS:
            return 1
        case "image", 3 if shape[2] in CHANNELS:
            return 3
    wanted = {
        "series": "[time] or [channels, time] with no more channels than times",
        "image": "[height, width], or with 1, 3 or 4 channels before or after",
    }[layout]
    raise BadInput(
        f"{name} reads rows of {wanted}, got rows of shape {list(shape)}; transpose them, or "
        "choose another task.model"
    )


def _arranged(name: str, x: np.ndarray) -> np.ndarray:
    """[rows, channels, time] or [rows, channels, height, width]."""
    match channels_at(name, x.shape[1:]):
        case None:
            return x[:, None]
        case 1:
            return x
        case place:
            return np.ascontiguousarray(np.moveaxis(x, place, 1))
