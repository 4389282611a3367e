"""The nets of the split-learning papers, as lists of named blocks, so that a cut may lie between
any two.

Shapes and default cuts follow section 4 of the MergeSFL reconstruction (arXiv:2311.13348), whose
authors' code trains CNN-H on UCI-HAR, CNN-S (the M5 of Dai et al. 2016, arXiv:1610.00087) on
speech, AlexNet on CIFAR-10 and VGG16-BN (Simonyan and Zisserman 2014, arXiv:1409.1556) on images
of 144 x 144. The small ones are ours, for small images. Each is sized for the rows that come.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedspine.core.errors import BadInput, unknown
from fedspine.nets.choice import LONG_ENOUGH, SMALLEST

Layout = Literal["series", "image"]  # rows of [channels, time], or of [channels, height, width]
Shape = tuple[int, ...]
Blocks = Callable[[Shape, int], Sequence[nn.Module]]  # from the shape of a row and the classes


@dataclass(frozen=True)
class Design:
    """A kind of net: what it reads, its blocks, and its default cut."""

    layout: Layout
    blocks: Blocks
    cut: int  # blocks of the client model
    # whether weights start as He et al. 2015 (arXiv:1502.01852), larger than torch's own
    he: bool = False


def design_of(name: str) -> Design:
    """The net called `name`; BadInput names the nearest one otherwise."""
    if name not in DESIGNS:
        raise unknown("net for arrays", name, DESIGNS)
    return DESIGNS[name]


def blocks_of(name: str, shape: Shape, classes: int) -> "OrderedDict[str, nn.Module]":
    """The blocks of a net for rows of `shape` [channels, ...], by name; their weights are drawn by
    torch's generator.

    Raises BadInput where the rows are too small for it.
    """
    design = design_of(name)
    _check(name, design.layout, shape)
    return OrderedDict(
        (f"block{i}", block) for i, block in enumerate(design.blocks(shape, classes), start=1)
    )


def _check(name: str, layout: Layout, shape: Shape) -> None:
    wanted = {"series": ("channels", "time"), "image": ("channels", "height", "width")}[layout]
    if len(shape) != len(wanted):
        raise BadInput(
            f"{name} reads rows of [{', '.join(wanted)}], got rows of "
            f"shape {list(shape)}; choose another task.model"
        )
    short = {"series": LONG_ENOUGH.get(name, 1), "image": SMALLEST}[layout]
    if min(shape[1:]) < short:
        what = "samples in time" if layout == "series" else "pixels each way"
        raise BadInput(
            f"{name} needs at least {short} {what}, got rows of "
            f"shape {list(shape)}; choose another net"
        )


# --- blocks ---


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class BatchNorm(nn.Module):
    """Batch normalisation over all dimensions but the second, as torch's, without its count of
    batches.

    A batch with one value per channel has no variance, and a device that is slow may be given one
    row: it is then normalised by the running statistics.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        by_batch = self.training and x.numel() > x.shape[1]
        return nn.functional.batch_norm(
            x,
            mean,
            variance,
            self.weight,
            self.bias,
            by_batch,
            self.momentum if by_batch else 0.0,
            self.eps,
        )


class AsPicture(nn.Module):
    """[rows, channels, time] as images of one channel, [rows, 1, time, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unsqueeze(1)


class MeanPooling(nn.Module):
    """The mean over everything but rows and channels: [rows, channels]. Its gradient is the same on
    every run.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _conv(
    inputs: int, outputs: int, *, norm: bool = False, pool: nn.Module | None = None
) -> nn.Sequential:
    """A 3 x 3 convolution that keeps the size, and the layers after it."""
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(inputs, outputs, 3, padding=1)}
    if norm:
        layers["norm"] = BatchNorm(outputs)
    layers["relu"] = nn.ReLU()
    if pool is not None:
        layers["pool"] = pool
    return _named(**layers)


def _hidden(inputs: int, outputs: int, dropout: float = 0.5) -> nn.Sequential:
    return _named(
        flat=nn.Flatten(),
        linear=nn.Linear(inputs, outputs),
        relu=nn.ReLU(),
        dropout=nn.Dropout(dropout),
    )


def _flat(blocks: Sequence[nn.Module], shape: Shape) -> int:
    """The number of outputs of the blocks for one row, from copies on the meta device."""
    with torch.no_grad():
        return (
            copy.deepcopy(nn.Sequential(*blocks))
            .to("meta")
            .eval()(torch.empty(1, *shape, device="meta"))
            .numel()
        )


# --- the nets ---


def _cnn_h(shape: Shape, classes: int) -> list[nn.Module]:
    def pool(
        width: int,
    ) -> nn.MaxPool2d:  # sensors of one or two channels have nothing left to pool over
        return nn.MaxPool2d((2, 2 if width > 1 else 1))

    first = _conv(1, 12, pool=pool(shape[0]))
    convs = [
        nn.Sequential(OrderedDict([("picture", AsPicture()), *first.named_children()])),
        _conv(12, 32, pool=pool(max(shape[0] // 2, 1))),
        _conv(32, 64),
    ]
    return [*convs, _hidden(_flat(convs, shape), 1024), nn.Linear(1024, classes)]


def _cnn_s(shape: Shape, classes: int) -> list[nn.Module]:
    def conv(inputs: int, outputs: int, width: int = 3, stride: int = 1) -> nn.Sequential:
        made = nn.Conv1d(inputs, outputs, width, stride)
        return _named(conv=made, norm=BatchNorm(outputs), relu=nn.ReLU(), pool=nn.MaxPool1d(4))

    last = nn.Sequential(OrderedDict([*conv(64, 64).named_children(), ("mean", MeanPooling())]))
    return [conv(shape[0], 32, 80, 16), conv(32, 32), conv(32, 64), last, nn.Linear(64, classes)]


def _alexnet(widths: tuple[int, int, int, int, int], hidden: int) -> Blocks:
    def blocks(shape: Shape, classes: int) -> list[nn.Module]:
        inputs, convs = shape[0], []
        for i, outputs in enumerate(widths):
            convs.append(_conv(inputs, outputs, pool=nn.MaxPool2d(2) if i in (0, 1, 4) else None))
            inputs = outputs
        return [
            *convs,
            _hidden(_flat(convs, shape), hidden),
            _hidden(hidden, hidden),
            nn.Linear(hidden, classes),
        ]

    return blocks


def _vgg16(shape: Shape, classes: int) -> list[nn.Module]:
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    inputs, convs = shape[0], []
    for stage, widths in enumerate(stages):
        for place, outputs in enumerate(widths):
            # the fourth is padded, which makes 5 x 5 of 144 x 144 as in the authors' code
            pool = nn.MaxPool2d(2, padding=int(stage == 3)) if place + 1 == len(widths) else None
            convs.append(_conv(inputs, outputs, norm=True, pool=pool))
            inputs = outputs
    return [
        *convs,
        _hidden(_flat(convs, shape), 4096),
        _hidden(4096, 4096),
        nn.Linear(4096, classes),
    ]


def _vgg_small(shape: Shape, classes: int) -> list[nn.Module]:
    inputs, convs = shape[0], []
    for outputs, pooled in ((32, False), (32, True), (64, False), (64, True), (128, False)):
        convs.append(_conv(inputs, outputs, norm=True, pool=nn.MaxPool2d(2) if pooled else None))
        inputs = outputs
    last = nn.Sequential(
        OrderedDict([*_conv(128, 128, norm=True).named_children(), ("mean", MeanPooling())])
    )
    return [*convs, last, nn.Linear(128, classes)]


DESIGNS: dict[str, Design] = {
    "cnn-h": Design("series", _cnn_h, cut=2),
    "cnn-s": Design("series", _cnn_s, cut=3),
    "alexnet": Design("image", _alexnet((64, 192, 384, 256, 256), 4096), cut=5, he=True),
    "alexnet-small": Design("image", _alexnet((16, 48, 96, 64, 64), 256), cut=5, he=True),
    "vgg16": Design("image", _vgg16, cut=13),
    "vgg-small": Design("image", _vgg_small, cut=4),
}
