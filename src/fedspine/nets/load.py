"""A net for given arrays, and the arrays as it reads them."""

import numpy as np
from torch import nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Arrays
from fedspine.nets.choice import CHANNELS
from fedspine.nets.models import Layout, blocks_of, design_of
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
    layout = design_of(name).layout
    rows, others = (_arranged(name, layout, x) for x, _ in (train, test))
    if rows.dtype != np.uint8:
        rows, others = _standardised(rows, others)
    net = Net(name, rows.shape[1:], classes)
    return net, Arrays(x=rows, labels=train[1]), Arrays(x=others, labels=test[1])


def stored(model: NetModel, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A stock module with the weights of a model that was trained on rows of `shape`, to evaluate.

    It reads rows as `load` gives them: channels first, floats standardised, uint8 as 0 to 1.
    """
    rows = _arranged(model.net, design_of(model.net).layout, np.empty((0, *shape)))
    module = nn.Sequential(blocks_of(model.net, rows.shape[1:], classes))
    module.load_state_dict(model.weights)
    return module.eval().requires_grad_(False)


def _arranged(name: str, layout: Layout, x: np.ndarray) -> np.ndarray:
    """[rows, channels, time] or [rows, channels, height, width]."""
    match layout, x.ndim:
        case "series", 2:
            return x[:, None]
        case "series", 3 if x.shape[1] <= x.shape[2]:
            return x
        case "image", 3:
            return x[:, None]
        case "image", 4 if x.shape[1] in CHANNELS:
            return x
        case "image", 4 if x.shape[3] in CHANNELS:
            return np.ascontiguousarray(np.moveaxis(x, 3, 1))
    wanted = {
        "series": "[time] or [channels, time] with no more channels than times",
        "image": "[height, width], or with 1, 3 or 4 channels before or after",
    }[layout]
    raise BadInput(
        f"{name} reads rows of {wanted}, rows of shape {list(x.shape[1:])} "
        "came; transpose them, or choose another task.model"
    )


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    others = (0, *range(2, train.ndim))
    mean = train.mean(others, dtype=np.float64, keepdims=True)
    deviation = train.std(others, dtype=np.float64, keepdims=True)
    deviation[deviation == 0] = 1  # a channel that never changes says nothing
    mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)
    return (train - mean) / deviation, (test - mean) / deviation
