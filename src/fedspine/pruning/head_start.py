"""A task head that starts from the class means of frozen features instead of at random.

Before the first round the devices asked send, for each class, the mean of the features that enter
the head and how many rows it comes from; the server turns their means into a linear classifier, the
nearest mean under one spherical covariance. It takes one forward pass over each device's rows and
one small message. Prototypes as a head are those of prototypical networks (Snell et al. 2017,
arXiv:1703.05175); class means over clients are FedNCM's (Legate et al. 2023, arXiv:2302.09088).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedspine.core.aggregation import Aggregation, Mean
from fedspine.core.checks import Asked, need, tensor_of, tensors_of
from fedspine.core.device import Device, on_device, priced_by
from fedspine.core.errors import BadInput, unknown
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import bounded, trimmed, trims
from fedspine.core.message import Tensors, message
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half, moved, single
from fedspine.lm.base import Base, Model
from fedspine.lm.cost import Extent, forward_flops, frozen_bytes
from fedspine.lm.pooling import mean_of_tokens
from fedspine.lm.prefix import BATCH
from fedspine.lm.structure import full

# mean logit of a class mean for its own class over that of the mid; docs/methods/fedlora.md
MARGIN = 1.25
LINEAR = ("mean", "bi-encoder")  # readouts whose head is one linear layer


@message
class MeansOrder:
    rows: int  # of the device, at most

    @property
    def reads(self) -> Reads:
        return Reads(batch=self.rows)

    def check(self, asked: Asked) -> None:
        need(self.rows >= 1, f"rows is {self.rows}, but at least 1 is needed")
        need(len(asked.base.head) == 1, "class means are asked of a model without one linear head")


@message
class ClassMeans:
    means: Tensors  # fp16 [classes, width] as "means": of the rows of a class, zeros where too few
    counts: Int[Tensor, " classes"]  # int64, rows of a class, 0 where too few

    def check(self, asked: Asked) -> None:
        """No more rows than were asked for, and a mean for each class."""
        classes, width = asked.base.head[0].weight.shape
        tensors_of("means", self.means, {"means": (torch.float16, (classes, width))})
        tensor_of("counts", self.counts, torch.int64, (classes,))
        most = asked.rows if asked.order is None else min(asked.rows, asked.order.rows)
        each = self.counts.tolist()  # whose sum, unlike that of a tensor, does not overflow
        need(min(each) >= 0 and sum(each) <= most, f"counts are not of {most} rows at most")


Start: TypeAlias = Literal["random", "class-means", "auto"]


HeadWeights: TypeAlias = Literal["rows", "labels"]


class HeadStart(Protocol):
    """The hyper-parameters of methods whose devices may be asked for class means."""

    head_start: Start  # "auto": class means where the head can start from them
    head_weights: HeadWeights  # by what devices count in the classifier: rows, or rows of its class
    steps: int
    batch: int


class HeadState(Protocol):
    """What a state says of the head."""

    round: int
    head: Tensors


def check_head_start(fields: HeadStart, task: Task) -> None:
    """Raise BadInput where the head is not one linear layer over the mean of the tokens."""
    if fields.head_weights not in get_args(HeadWeights):
        raise unknown("method.head_weights", fields.head_weights, get_args(HeadWeights))
    if fields.head_weights == "labels":
        _check_labels(task)
    if fields.head_start not in get_args(Start):
        raise unknown("method.head_start", fields.head_start, get_args(Start))
    if fields.head_start != "random" and task.privacy is not None:
        raise BadInput(
            f'method.head_start is "{fields.head_start}", but class means of rows have no noise, '
            'which [privacy] needs; set it to "random"'
        )
    if fields.head_start == "class-means" and getattr(task.base, "pooling", None) not in LINEAR:
        raise BadInput(
            'method.head_start is "class-means", which needs a head over the mean of the tokens; '
            'set task.pooling = "mean" (for pairs "bi-encoder" too), or leave method.head_start out'
        )


def _check_labels(task: Task) -> None:
    if getattr(task.base, "pooling", None) not in LINEAR:
        raise BadInput(
            'method.head_weights is "labels", which needs a head over the mean of the tokens; set '
            'task.pooling = "mean" (for pairs "bi-encoder" too), or leave it out'
        )
    if task.privacy is not None:
        raise BadInput(
            'method.head_weights is "labels", but counts of rows have no noise, which [privacy] '
            "needs; leave it out"
        )


def prepared_head(fields: HeadStart, state: HeadState, fleet: Fleet) -> Tensors:
    """The head that a round begins with, after what `started` and `know_classes` ask of devices, of
    as many rows as they train on in it.
    """
    rows = fields.steps * fields.batch
    head = started(fields, state.head, fleet, rows=rows) if state.round == 0 else state.head
    know_classes(fields, fleet, rows=rows)
    return head


def started(fields: HeadStart, head: Tensors, fleet: Fleet, *, rows: int) -> Tensors:
    """The head that the first round begins with: `head` itself, or the one of the devices' class
    means.
    """
    if fields.head_start == "random" or not _reads_the_mean(head):
        return head
    orders = {profile.id: MeansOrder(rows=rows) for profile in fleet.devices}
    replies = fleet.ask(class_means, orders)
    if fields.head_weights == "labels":
        _remember_class_shares(fleet, replies)
    if len(replies) < fleet.aggregation.fewest(len(replies)):
        return head
    shares = bounded(
        fleet,
        "class means",
        [reply.device for reply in replies],
        (_by_class(reply.value) for reply in replies),
    )
    return head_of(
        head,
        [_shortened_reply(reply, share) for reply, share in zip(replies, shares, strict=True)],
        fleet.aggregation,
    )


def know_classes(fields: HeadStart, fleet: Fleet, *, rows: int) -> None:
    """Where the classifier is weighed by labels, ask the round's devices of which it is not known
    how many of at most so many `rows` have each class; `fleet.server` remembers it for all rounds.

    From then on a class's row of the classifier is averaged over devices by how many rows of the
    class each has: a device without any has learnt of it only that it is never right.
    """
    if fields.head_weights != "labels":
        return
    new = [each.id for each in fleet.devices if each.id not in fleet.server.row_shares]
    if new:
        _remember_class_shares(
            fleet, fleet.ask(class_means, dict.fromkeys(new, MeansOrder(rows=rows)))
        )


def _remember_class_shares(fleet: Fleet, replies: Sequence[Reply[ClassMeans]]) -> None:
    (layer,) = fleet.base.head
    found = {}
    for reply in replies:
        counts = reply.value.counts.float()
        shares = counts / counts.sum() if counts.any() else torch.ones_like(counts) / len(counts)
        found[reply.device] = dict.fromkeys(layer.tensors, shares)
    fleet.server.row_shares = fleet.server.row_shares | found


def _by_class(found: ClassMeans) -> Tensors:
    """The means of the classes that a device has rows of."""
    return {str(each): found.means["means"][each] for each in found.counts.nonzero()[:, 0].tolist()}


def _shortened_reply(reply: Reply[ClassMeans], share: float) -> Reply[ClassMeans]:
    """The reply with a share of its means; of none, it has no rows either."""
    if share == 1:
        return reply
    means = {name: share * mean for name, mean in single(reply.value.means).items()}
    counts = reply.value.counts if share else torch.zeros_like(reply.value.counts)
    shortened = replace(reply.value, means=means, counts=counts)  # type: ignore[type-var]
    return replace(reply, value=shortened)


def _reads_the_mean(head: Tensors) -> bool:
    """Whether a head is one linear layer with a bias, which only readers of the mean of the tokens
    have.
    """
    return len(head) == 2


def _priced_means(device: Device, order: MeansOrder) -> ClassMeans:
    """What class means cost, and means of no row."""
    data = device.data.take(np.arange(min(order.rows, len(device.data))))
    _charge_pass(device, [(rows, data.width(rows)) for rows in data.batches_by_length(BATCH)])
    classes, width = device.base.head[0].weight.shape
    means = {"means": torch.zeros(classes, width)}
    return ClassMeans(means=half(means), counts=torch.zeros(classes, dtype=torch.int64))


def _charge_pass(device: Device, batches: Sequence[tuple[np.ndarray, int]]) -> None:
    """One forward pass over these batches of rows, each padded to a width."""
    extent = Extent(
        tokens=sum(len(rows) * width for rows, width in batches),
        squared_tokens=sum(len(rows) * width**2 for rows, width in batches),
    )
    base = device.base
    device.spend(
        flops=forward_flops(base.layout, extent),
        memory_bytes=int(frozen_bytes(base.layout, full(base.layout), base.embeddings)),
    )


@priced_by(_priced_means)
@on_device
def class_means(device: Device, order: MeansOrder) -> ClassMeans:
    base, chosen = device.base, device.rng.permutation(len(device.data))[: order.rows]
    device.uses(chosen)
    data = device.data.take(chosen)
    classes, width = base.head[0].weight.shape
    sums, counts = torch.zeros(classes, width), torch.zeros(classes, dtype=torch.int64)
    squares = 0.0
    batches = [(rows, data.width(rows)) for rows in data.batches_by_length(BATCH)]
    for rows, _ in batches:
        inputs = moved(data.batch(rows), base.device)
        labels = inputs.pop("labels").cpu()
        found = features(base, inputs).cpu()
        sums.index_add_(0, labels, found)
        squares += float(found.square().sum())
        counts += torch.bincount(labels, minlength=classes)
    _charge_pass(device, batches)
    reported, rows = device.counts_beside(counts), len(chosen)
    spread = max(0.0, squares / rows - float((sums.sum(0) / rows).square().sum())) / width
    each = counts.clamp_min(1)[:, None]
    # one row more or less moves the mean of its class by its distance over their number
    means = device.beside(sums * (reported > 0)[:, None] / each, sqrt(spread) / each)
    means = torch.where((reported > 0)[:, None], means, 0.0)
    return ClassMeans(means=half({"means": means}), counts=reported)


def features(base: Base, inputs: Tensors) -> Float[Tensor, "rows width"]:
    """What the linear layer of the frozen base's readout is given of each row, fp32: the mean over
    the tokens of what enters it, where it reads every token.
    """
    head = {name: tensor for layer in base.head for name, tensor in layer.tensors.items()}
    model = Model(structure=full(base.layout), adapter={}, head=head, scale=1.0)
    seen: list[Tensor] = []
    with torch.inference_mode():
        module = base.fit(model.to(base.device))
        layer = base.skeleton.get_submodule(base.head[0].path)
        hook = layer.register_forward_pre_hook(lambda _, entering: seen.append(entering[0]))
        try:
            module(**inputs)
        finally:
            hook.remove()
        entered = seen[0].float()
        return entered if entered.dim() == 2 else mean_of_tokens(entered, inputs["attention_mask"])


def head_of(
    head: Tensors, replies: Sequence[Reply[ClassMeans]], how: Aggregation = Mean()
) -> Tensors:
    """The classifier of the nearest class mean in the shapes of `head`, a weight [classes, width]
    and a bias.

    Each class's mean is that over its rows, or what `how` says in its place. A class of which
    nobody has rows, or too few devices have, is as likely as the mid of all; with fewer than two
    classes `head` stays.
    """
    counts = sum((reply.value.counts for reply in replies), torch.zeros(1, dtype=torch.int64))
    sums = sum(
        (single(r.value.means)["means"] * r.value.counts[:, None] for r in replies), torch.zeros(1)
    )
    means, known = sums / counts.clamp_min(1)[:, None], counts > 0
    if trims(how):
        rows = torch.stack([reply.value.counts for reply in replies])[:, :, None]
        values = torch.stack([single(reply.value.means)["means"] for reply in replies])
        means, settled = trimmed(how, values, rows, (rows > 0).expand_as(values))
        known = settled.all(1)
    if int(known.sum()) < 2:
        return head
    mid = means[known].mean(0)
    away = torch.where(known[:, None], means - mid, 0.0)
    squares = away.square().sum(1)
    weight = MARGIN / squares[known].mean() * away
    # half the distance of a mean from the mid lies between the two
    bias = -(weight @ mid) - (weight * away).sum(1) / 2
    (weight_name, bias_name) = sorted(head, key=lambda name: name.endswith(".bias"))
    return {weight_name: weight, bias_name: bias}
