"""The learning rate of a run whose recipe leaves it open (`learning_rate = "auto"`).

Before the first round's own exchanges its devices train a plain adapter from the same start at each
of `RATES`, on four fifths of their rows. The server averages what came of each rate, and every
device says how well the averages do on its last fifth. The rate with the lowest loss is that of the
run; what was trained is thrown away. *Ours*; docs/optimisation.md has its cost and what it is
worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspine.core.checks import Asked, need, tensors_like, within
from fedspine.core.device import Device, on_device
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.message import Tensors, message
from fedspine.core.method import usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import average, half, single
from fedspine.lm.base import Model
from fedspine.lm.lora import fresh
from fedspine.lm.received import check_adapter, check_head
from fedspine.lm.score import score
from fedspine.lm.structure import full
from fedspine.lm.tune import tune
from fedspine.lm.tuning import AUTO, RATES, LocalTraining, Tuning, tuning_at
from fedspine.pruning.head_start import spend_forward

RANK = 8  # of the adapter that is tried, where the model is wide enough
SCALE = 2.0  # alpha / rank of it
# nats: what one device can say against a rate at most, so that none decides alone
MOST_WORSE = 1.0
HELD = 5  # one row in so many is not trained on
SPLIT = 20261129  # seed of which these are: both exchanges have to know them
MOST_LOSS = 100.0  # nats that a device says at most
TIE = 0.01  # of a loss: a higher rate has to be better by more


@message
class RatesOrder:
    adapter: Tensors  # fp16
    head: Tensors  # fp16
    scale: float
    tunings: tuple[Tuning, ...]  # alike but for their rates

    @property
    def reads(self) -> Reads:
        return Reads(scale=self.scale)

    def check(self, asked: Asked) -> None:
        check_adapter(self.adapter, asked.base.layout)
        check_head(self.head, asked)
        _check_number(len(self.tunings))


@message
class TunedAtRates:
    adapters: tuple[Tensors, ...]  # fp16, one for each rate
    heads: tuple[Tensors, ...]  # fp16
    finite: tuple[
        bool, ...
    ]  # whether the loss at this rate stayed finite; else nothing was changed
    examples: int

    def check(self, asked: Asked) -> None:
        """A whole model for each rate, of the order's shapes."""
        asked.examples(self.examples)
        number = len(self.adapters) if asked.order is None else len(asked.order.tunings)
        _check_lengths(number, self.adapters, self.heads, self.finite)
        if asked.order is not None:
            for adapter, head in zip(self.adapters, self.heads, strict=True):
                tensors_like("adapter", adapter, asked.order.adapter)
                tensors_like("head", head, asked.order.head)


@message
class AveragesOrder:
    adapters: tuple[Tensors, ...]  # fp16, one for each rate
    heads: tuple[Tensors, ...]  # fp16
    scale: float
    rows: int  # of the device, at most

    @property
    def reads(self) -> Reads:
        return Reads(batch=self.rows, scale=self.scale)

    def check(self, asked: Asked) -> None:
        _check_number(len(self.adapters))
        _check_lengths(len(self.adapters), self.adapters, self.heads)
        for adapter, head in zip(self.adapters, self.heads, strict=True):
            check_adapter(adapter, asked.base.layout)
            check_head(head, asked)
        need(self.rows >= 1, f"rows is {self.rows}, but at least 1 is needed")


@message
class LossesAtRates:
    losses: tuple[float, ...]  # nats per label, of the average at each rate, `MOST_LOSS` at most
    rows: int  # that they are over

    def check(self, asked: Asked) -> None:
        """A loss for each rate, over no more rows than were asked for."""
        if asked.order is not None:
            _check_lengths(len(asked.order.adapters), self.losses)
        for loss in self.losses:
            within("a loss", loss, 0, MOST_LOSS)
        most = asked.rows if asked.order is None else min(asked.rows, asked.order.rows)
        within("rows", self.rows, 1, most)


@on_device
def tune_at_rates(device: Device, order: RatesOrder) -> TunedAtRates:
    """Train the same start at each rate, on the same batches."""
    examples, (trained, _) = len(device.data), _parts(len(device.data))
    device.data = device.data.take(trained)
    start = _model(device, order.adapter, order.head, order.scale)
    drawn = device.rng.bit_generator.state
    models, finite = [], []
    for tuning in order.tunings:
        device.rng.bit_generator.state = drawn
        result = tune(device, start, tuning)
        finite.append(result.loss is not None and bool(np.isfinite(result.loss)))
        models.append(result.model if finite[-1] else start)
    return TunedAtRates(
        adapters=tuple(half(model.adapter) for model in models),
        heads=tuple(half(model.head) for model in models),
        finite=tuple(finite),
        examples=examples,
    )


@on_device
def losses_at_rates(device: Device, order: AveragesOrder) -> LossesAtRates:
    """Score each average on the same rows of the device, none of which it was trained on."""
    base, (_, held) = device.base, _parts(len(device.data))
    chosen = held[: order.rows]
    device.uses(chosen)
    data = device.data.take(chosen)
    losses = []
    for adapter, head in zip(order.adapters, order.heads, strict=True):
        loss = score(base, _model(device, adapter, head, order.scale), data).mean_loss
        losses.append(float(min(loss, MOST_LOSS)) if np.isfinite(loss) else MOST_LOSS)
        spend_forward(device, data)
    return LossesAtRates(losses=tuple(losses), rows=len(chosen))


@dataclass(frozen=True)
class Probe:
    """What a probe found."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]  # nats per label, over all devices that answered
    rate: float  # the one that is taken

    @property
    def line(self) -> str:
        """In one line what was chosen and why."""
        losses = ", ".join(f"{loss:.3f}" for loss in self.losses)
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        return (
            f"learning rate: {self.rate:g}; after one round at {rates} the loss on rows that it "
            f"had not seen was {losses}"
        )


def is_open(method: object) -> bool:
    """Whether a method's learning rate is to be chosen by a probe."""
    return isinstance(method, LocalTraining) and method.learning_rate == AUTO


def probe(
    method: LocalTraining, task: Task, fleet: Fleet, rng: np.random.Generator
) -> Probe | None:
    """Choose among `RATES` on the devices of the first round; the fleet's clock pays for it.

    None where it cannot be told: no device answered, or all rates diverged.
    """
    layout = task.base.layout
    narrowest = min(min(site.rows, site.columns) for site in layout.sites)
    adapter = half(fresh(layout.sites, min(RANK, narrowest), rng))
    head = half(task.base.initial_head(rng))
    tunings = tuple(
        tuning_at(replace(method, learning_rate=rate), 0, task.rounds, task.turns) for rate in RATES
    )
    order = RatesOrder(adapter=adapter, head=head, scale=SCALE, tunings=tunings)
    tuned = fleet.ask(tune_at_rates, {device.id: order for device in fleet.devices})
    if not tuned:
        return None
    tuned = usable(tuned, fleet)
    finite = [i for i in range(len(RATES)) if all(reply.value.finite[i] for reply in tuned)]
    if not finite:
        return None
    averages = AveragesOrder(
        adapters=tuple(_averaged(tuned, "adapters", index) for index in finite),
        heads=tuple(_averaged(tuned, "heads", index) for index in finite),
        scale=SCALE,
        rows=method.steps * method.batch,
    )
    replies = fleet.ask(losses_at_rates, {reply.device: averages for reply in tuned})
    return _lowest(tuple(RATES[index] for index in finite), replies)


def _averaged(replies: Sequence[Reply[TunedAtRates]], field: str, index: int) -> Tensors:
    parts = [(reply.weight, single(getattr(reply.value, field)[index])) for reply in replies]
    return half(average(parts))


def _parts(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are trained on and those that are not, at random but the same whenever it is
    asked; all are both where there are fewer than `HELD`.
    """
    order = np.random.default_rng(SPLIT).permutation(rows)
    held = rows // HELD
    return (order[held:], order[:held]) if held else (order, order)


def _lowest(rates: tuple[float, ...], replies: Sequence[Reply[LossesAtRates]]) -> Probe | None:
    """The rate with the lowest loss, each device's differences bounded; of those that are about as
    good the lowest.
    """
    if not replies:
        return None
    losses = np.array([reply.value.losses for reply in replies])
    rows = np.array([float(reply.value.rows) for reply in replies])
    worse = np.minimum(losses - losses.min(axis=1, keepdims=True), MOST_WORSE)
    means = np.average(losses, axis=0, weights=rows)
    behind = np.average(worse, axis=0, weights=rows)
    behind -= behind.min()
    chosen = int(np.argmax(behind <= TIE * means[int(np.argmin(behind))]))
    return Probe(rates=rates, losses=tuple(map(float, means)), rate=rates[chosen])


def _model(device: Device, adapter: Tensors, head: Tensors, scale: float) -> Model:
    return Model(
        structure=full(device.base.layout),
        adapter=single(adapter),
        head=single(head),
        scale=scale,
    )


def _check_number(rates: int) -> None:
    need(1 <= rates <= len(RATES), f"{rates} rates are asked, but 1 to {len(RATES)} were expected")


def _check_lengths(number: int, *values: tuple[object, ...]) -> None:
    for value in values:
        need(len(value) == number, f"{len(value)} values came where {number} were expected")
