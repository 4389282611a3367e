"""Checks of the features, labels, gradients and client models in messages.

Most of a round's messages do not repeat what its first order fixed: the cut, the rows of a batch,
the precision on the wire. `Agreed` holds this for each device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspine.core.checks import (
    Asked,
    Unusable,
    need,
    short,
    tensor_of,
    tensors_of,
    within,
)
from fedspine.core.message import Tensors
from fedspine.core.task import IGNORED
from fedspine.core.tensors import extremes
from fedspine.lm.base import Base
from fedspine.lm.received import Specified, adapter_shapes, check_rank_of, float_of, head_shapes
from fedspine.nets.net import Net
from fedspine.split.batches import Budget
from fedspine.split.wire import Wired

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
# of an entry of features or of their gradients: such numbers still have squares, and sums of them
# over a batch, that fp32 holds
MOST_FEATURE = 2.0**40


@dataclass(frozen=True)
class Agreed:
    """What a device's messages of a round must match."""

    weights: Specified  # of the client model as it comes back
    ending: Specified | None  # U-shape: of the last part of the server model
    features: tuple[int, ...]  # shape of a row's features, of a token's for texts
    batch: int | Budget
    precision: str
    rows: int = 0  # of the last batch
    tokens: int = 0  # of the last batch, without padding; as many as rows for arrays

    def rows_in(self, declared: int) -> tuple[int, int]:
        """The smallest and the largest number of rows of a batch of a device that declared this
        many.
        """
        match self.batch:
            case Budget(rows=rows):
                return 1, min(rows, declared)
        return min(self.batch, declared), min(self.batch, declared)


def as_sent(precision: str) -> torch.dtype:
    """The type in which weights are sent where features have this precision."""
    return torch.float32 if precision == "fp32" else torch.float16


def model_shapes(base: Any, cut: int, rank: int, dtype: torch.dtype) -> tuple[Specified, Specified]:
    """Types and shapes of all that is trained below and above a cut, by name, without a
    transformer's head.
    """
    match base:
        case Net():
            halves: tuple[Specified, Specified] = ({}, {})
            for place, (name, block) in enumerate(base.blocks.named_children()):
                for key, tensor in block.state_dict().items():
                    halves[place >= cut][f"{name}.{key}"] = (dtype, tuple(tensor.shape))
            return halves
    whole = adapter_shapes(base.layout, rank, dtype=dtype)
    below = {f"{site.path}." for site in base.layout.sites if site.layer < cut}
    first = {name: each for name, each in whole.items() if f"{name.rpartition('.')[0]}." in below}
    return first, {name: each for name, each in whole.items() if name not in first}


def check_model(weights: Tensors, cut: int, rank: int, precision: str, asked: Asked) -> None:
    """Raise Unusable unless these are all weights that training a whole model changes."""
    need(precision in ("fp32", "fp16"), "precision is not one of fp32, fp16")
    dtype = float_of(weights)
    below, above = model_shapes(asked.base, cut, rank, dtype)
    head = head_shapes(asked, dtype) if isinstance(asked.base, Base) else {}
    tensors_of("weights", weights, below | above | head)


def check_cut(cut: int, rank: int, base: Any) -> None:
    """Raise Unusable for a cut or a rank that this model cannot have."""
    match base:
        case Net():
            within("cut", cut, 1, len(base.blocks) - 1)
        case Base():
            within("cut", cut, 0, base.layout.layers)
            check_rank_of(rank, base.layout)


def check_batch(batch: int | Budget) -> None:
    """Raise Unusable for batches of no row; a budget checks itself."""
    need(isinstance(batch, Budget) or batch >= 1, f"batch is {batch}, but at least 1 row is needed")


def ending_shapes(asked: Asked, dtype: torch.dtype) -> Specified:
    """Types and shapes of the last part of a model, which in the U-shape stays on devices."""
    match asked.base:
        case Net():
            name, block = list(asked.base.blocks.named_children())[-1]
            state = block.state_dict()
            return {f"{name}.{key}": (dtype, tuple(each.shape)) for key, each in state.items()}
    return head_shapes(asked, dtype)


def check_size(name: str, sent: Wired) -> None:
    """Raise Unusable for entries so large that computing with them overflows."""
    if not sent.values.numel():
        return
    low, high = extremes(sent.values.flatten())
    scale = 1.0 if sent.scale is None else float(sent.scale.max())
    largest = max(-low, high) * scale
    line = f"an entry of {name} is {short(largest)}, which counts as not finite"
    need(largest <= MOST_FEATURE, line)


def check_features(sent: Wired, labels: Tensor | None, asked: Asked) -> None:
    """Raise Unusable unless these are the features of a batch as the round agreed on, and its
    labels, unless they stay on the device.
    """
    agreed = agreed_in(asked)
    need(sent.values.dtype == DTYPES[agreed.precision], f"features are of {sent.values.dtype}")
    width = tuple(sent.values.shape[1:])
    need(width == agreed.features, f"features are {width} wide, but {agreed.features} was expected")
    texts = isinstance(asked.base, Base)
    need((sent.mask is not None) == texts, f"features have {'no' if texts else 'a'} mask")
    rows = len(sent.values) if sent.mask is None else len(sent.mask)
    within("the number of rows", rows, *agreed.rows_in(asked.rows))
    if sent.mask is not None:
        within("the length of texts", sent.mask.shape[1], 1, asked.terms.longest)
    check_size("features", sent)
    if agreed.ending is not None:
        need(labels is None, "got labels, but they stay on the device")
        return
    if labels is None:
        raise Unusable("labels are missing")
    need(labels.dtype in (torch.int16, torch.int32), f"labels are of {labels.dtype}")
    if asked.terms.classes:
        tensor_of("labels", labels, labels.dtype, (rows,))
        _labels_in(labels, asked.terms.classes)
    else:
        tensor_of("labels", labels, labels.dtype, sent.mask.shape)
        counted = labels != IGNORED
        need(not bool((counted & ~sent.mask).any()), "labels has one of padding")
        _labels_in(labels[counted], asked.base.config.vocab_size)


def check_returned(gradient: Wired, counted: int, asked: Asked) -> None:
    """Raise Unusable unless this is the gradient of the output that the device was sent, over no
    more labels than its batch has.
    """
    agreed, sent = agreed_in(asked), asked.order.features
    need(gradient.mask is None, "gradient has a mask")
    tensor_of("gradient", gradient.values, sent.values.dtype, sent.values.shape)
    check_size("gradient", gradient)
    fewest = agreed.rows if asked.terms.classes else 0
    within("counted", counted, fewest, agreed.rows if asked.terms.classes else agreed.tokens)


def check_ended(weights: Tensors, ending: "Tensors | None", asked: Asked) -> None:
    """Raise Unusable unless these are the models that the device was given, trained."""
    agreed = agreed_in(asked)
    tensors_of("weights", weights, agreed.weights)
    need(
        (ending is None) == (agreed.ending is None), "ending belongs to the U-shape, and only there"
    )
    if ending is not None and agreed.ending is not None:
        tensors_of("ending", ending, agreed.ending)


def agreed_in(asked: Asked) -> Agreed:
    """What the device's first order of the round fixed; raises Unusable if there was none."""
    match asked.agreed:
        case Agreed() as agreed:
            return agreed
    raise Unusable("it arrived before the first order of a round")


def batch_of(sent: Wired) -> tuple[int, int]:
    """Rows and tokens of features."""
    return len(sent.values) if sent.mask is None else len(sent.mask), len(sent.values)


def _labels_in(labels: Tensor, count: int) -> None:
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        worst = low if low < 0 else high
        need(low >= 0 and high < count, f"labels has {worst}, but 0 to {count - 1} was expected")
