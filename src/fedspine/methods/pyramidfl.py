"""PyramidFL: the server selects useful, fast devices; devices with slack train more; small updates
are thinned.

Li et al. 2022, "PyramidFL: A Fine-grained Client Selection Framework for Efficient Federated
Learning", MobiCom 2022 (10.1145/3495243.3517017), as reconstructed in section 13 of the MergeSFL
notes. Departures: docs/methods/pyramidfl.md.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fedspine.control import latency_model
from fedspine.control.plan import MOST_NATS
from fedspine.control.selection import (
    Seen,
    Selecting,
    Thinning,
    dropped,
    select,
    steps_with_slack,
)
from fedspine.core.checks import Asked, tensors_of, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Fleet, Profile, Reply
from fedspine.core.merging import Weighted, combined
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, usable
from fedspine.core.noise import MOST_LOSS
from fedspine.core.reads import largest_share
from fedspine.core.task import Task
from fedspine.core.tensors import single
from fedspine.lm.received import check_loss, check_settings
from fedspine.split.received import as_sent
from fedspine.split.whole_model import (
    TOY,
    LocalResult,
    Training,
    WholeModelTraining,
    check_sent,
    check_whole,
    cutting_of,
    model_of,
    no_memory,
    train_whole,
    training_at,
    weights_of,
    with_memory,
)
from fedspine.split.wire import weights_wired

MEMORY = 0.9  # what an old time still counts after a new one
CHOICE = 1  # the purpose of a random stream


@message
class PyramidOrder:
    weights: Tensors  # all that is trained
    training: Training
    precision: str  # of the update sent back
    drop: float  # share of each tensor of the update that stays on the device

    def check(self, asked: Asked) -> None:
        check_sent(self.weights, self.training.cutting, self.precision, asked)
        within("drop", self.drop, 0, 1)


@message
class PyramidResult:
    update: Tensors  # of each tensor's change the entries that `kept` names, one after another
    seed: int  # of `kept`
    loss: float  # mean over the last steps
    reward: float  # rows times the root of the mean squared loss
    norm: float  # of the whole change
    examples: int

    def check(self, asked: Asked) -> None:
        """The update has as many entries of each of the order's tensors as its seed keeps."""
        asked.examples(self.examples)
        check_loss(self.loss)
        check_settings(reward=self.reward, norm=self.norm)
        within("seed", self.seed, 0, 2**31 - 1)
        if (order := asked.order) is not None:
            dtype = as_sent(order.precision)
            entries = {
                name: (dtype, (int(kept(self.seed, name, tensor, order.drop).sum()),))
                for name, tensor in order.weights.items()
            }
            tensors_of("update", self.update, entries)


@on_device
def train_and_thin(device: Device, order: PyramidOrder) -> PyramidResult:
    before = single(order.weights)
    result = train_whole(device, before, order.training)
    change = {name: result.weights[name] - tensor for name, tensor in before.items()}
    seed = int(device.rng.integers(2**31))
    root = np.sqrt(_mean_squared_loss(device, result))
    update = {name: tensor[kept(seed, name, tensor, order.drop)] for name, tensor in change.items()}
    return PyramidResult(
        update=weights_wired(update, order.precision),
        seed=seed,
        loss=result.ended,
        reward=len(device.data) * float(root),
        norm=float(torch.stack([tensor.square().sum() for tensor in change.values()]).sum().sqrt()),
        examples=len(device.data),
    )


def _mean_squared_loss(device: Device, result: LocalResult) -> float:
    """Of all rows' losses, with the device's noise; of a root one row could change far more."""
    if not result.losses:  # no label counted
        return 0.0
    texts = np.concatenate(result.texts)
    one_row = MOST_LOSS**2 * largest_share([texts], [np.ones(len(texts))])
    return device.mean_beside(float(np.mean(np.concatenate(result.losses) ** 2)), one_row)


def kept(seed: int, name: str, tensor: torch.Tensor, drop: float) -> torch.Tensor:
    """Which entries of a tensor are sent, bool of its shape: each with the chance 1 - `drop`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *name.encode()])))
    return torch.from_numpy(rng.random(tuple(tensor.shape), dtype=np.float32) >= drop)


def whole_update(result: PyramidResult, like: Tensors, drop: float) -> Tensors:
    """The change as the server knows it, with zeros for what was not sent."""
    change = {}
    for name, tensor in like.items():
        change[name] = torch.zeros_like(tensor)
        change[name][kept(result.seed, name, tensor, drop)] = result.update[name].float()
    return change


@message
class PyramidState:
    round: int
    rounds: int
    seed: int
    max_tokens: int
    model: Any
    seen: dict[str, Seen]  # of every device that has replied
    times: dict[str, np.ndarray]  # what its rounds took, as `control.latency_model` keeps it


@method("pyramidfl", merges_late=train_and_thin, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class PyramidFL(WholeModelTraining):
    """Selection by loss and speed, more steps for devices with slack, and sparser updates if they
    are small.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    renamed: ClassVar[dict[str, str]] = {  # settings of old recipes
        "participants": "selection.participants",
        "explore": "selection.explore",
        "explore_keep": "selection.explore_keep",
        "explore_least": "selection.explore_least",
        "cut_off": "selection.cut_off",
        "reward_clip": "selection.clip",
        "patience": "selection.patience",
        "penalty": "selection.penalty",
        "drop_least": "thinning.least",
        "drop_most": "thinning.most",
    }

    selection: Selecting = Selecting()
    slack: bool = True  # whether fast devices train more
    thinning: Thinning = Thinning()

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY)

    def check(self, task: Task) -> None:
        check_whole(self, task)
        self.selection.check()
        self.thinning.check()

    def start(self, task: Task, rng: np.random.Generator) -> PyramidState:
        split_model = cutting_of(self, task.base).of(task.base)
        return PyramidState(
            round=0,
            rounds=task.rounds,
            max_tokens=task.max_tokens,
            model=split_model.join(
                *split_model.start(rng)
            ),  # before the seed, so that it is FedAvg's
            seed=int(rng.integers(2**31)),
            seen={},
            times={},
        )

    def round(self, state: PyramidState, fleet: Fleet) -> PyramidState:
        split_model = cutting_of(self, fleet.base).of(fleet.base)
        weights = single(weights_of(split_model, state.model))
        able = with_memory(fleet, split_model, self.batch, state.max_tokens)
        orders = self._orders(state, self._chosen_devices(state, able), weights, fleet.base)
        came = fleet.ask(train_and_thin, orders)
        if not (able or came):
            raise no_memory()
        replies = usable(came, fleet)
        for reply in replies:
            fleet.note(
                device=reply.device,
                loss=reply.value.loss,
                steps=reply.order.training.steps,
                dropped=reply.order.drop,
            )
        changes = [
            Weighted(
                reply.device,
                reply.weight,
                _change(reply, weights, split_model.statistics),
            )
            for reply in replies
        ]
        none = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        change = combined(fleet, "weights", changes, none, split_model.statistics)
        return replace(
            state,
            round=state.round + 1,
            model=model_of(
                split_model,
                state.model,
                {name: tensor + change[name] for name, tensor in weights.items()},
            ),
            seen=state.seen | {reply.device: _seen(reply, state.round + 1) for reply in replies},
            times=state.times
            | {reply.device: self._times_after(state, reply) for reply in replies},
        )

    def deploy(self, state: PyramidState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: PyramidState) -> Any:
        return state.model

    # --- who does what ---

    def _chosen_devices(self, state: PyramidState, able: Sequence[Profile]) -> list[Profile]:
        forecast = Forecast(state.times, state.seen)
        names = select(
            {device.id: device.examples for device in able},
            state.seen,
            {
                device: forecast.seconds(device, work=1.0, drop=self.thinning.least)
                for device in state.seen
            },
            state.round + 1,
            self.selection,
            np.random.default_rng([state.seed, CHOICE, state.round]),
        )
        return [device for device in able if device.id in names]

    def _orders(
        self, state: PyramidState, chosen: Sequence[Profile], weights: Tensors, base: Any
    ) -> dict[DeviceId, PyramidOrder]:
        usual = training_at(self, base, state.round, state.rounds)
        forecast = Forecast(state.times, [device.id for device in chosen])
        norms = [
            state.seen[device.id].norm if device.id in state.seen else None for device in chosen
        ]
        drops = dropped(norms, self.thinning.least, self.thinning.most)
        seconds = [
            forecast.seconds(device.id, work=1.0, drop=drop)
            for device, drop in zip(chosen, drops, strict=True)
        ]
        orders = {}
        for device, drop, needed in zip(chosen, drops, seconds, strict=True):
            steps = self.steps
            if self.slack:
                passes = -(-device.examples // self.batch)
                taken = forecast.work_seconds(device.id) * passes / self.steps
                steps = steps_with_slack(self.steps, max(seconds) - needed, taken, passes)
            orders[device.id] = PyramidOrder(
                weights=weights_wired(weights, self.precision),
                training=replace(usual, steps=steps),
                precision=self.precision,
                drop=drop,
            )
        return orders

    def _times_after(self, state: PyramidState, reply: Reply[PyramidResult]) -> np.ndarray:
        before, order = state.times.get(reply.device, latency_model.no_evidence()), reply.order
        work, traffic = order.training.steps / self.steps, _traffic(order.drop)
        return latency_model.observe(
            before,
            sparsity=1 - work,
            rank=traffic,
            seconds=reply.cost.seconds,
            compute_seconds=reply.cost.compute_seconds,
            bytes=reply.cost.bytes_down + reply.cost.bytes_up,
            discount=MEMORY,
        )


def _change(reply: Reply[PyramidResult], weights: Tensors, statistics: Collection[str]) -> Tensors:
    """The change that a reply adds to today's weights.

    Of a late one, statistics of batches, such as a variance, count as they came: a sum of changes
    of these could be negative.
    """
    change = whole_update(reply.value, weights, reply.order.drop)
    if reply.late:
        sent = single(reply.order.weights)
        for name in (name for name in change if name in statistics):
            change[name] = change[name] + sent[name] - weights[name]
    return change


def _seen(reply: Reply[PyramidResult], round: int) -> Seen:
    result = reply.value
    reward = min(result.reward, MOST_NATS * result.examples)
    return Seen(reward=reward, norm=result.norm, round=round)


def _traffic(drop: float) -> float:
    """Bytes of an exchange over those of one that drops nothing."""
    return 1 - drop / 2


class Forecast:
    """What a round will take each device: a * work + b * traffic + c seconds, fitted by
    `control.latency_model`.

    The model's features stand for other quantities here: `1 - sparsity` for the work, in usual
    rounds, and `rank` for the traffic.
    """

    def __init__(self, times: Mapping[str, np.ndarray], devices: Iterable[DeviceId]) -> None:
        self._coefficients = latency_model.coefficients_of(times, devices)

    def seconds(self, device: DeviceId, *, work: float, drop: float) -> float:
        """Of a round of `work` usual rounds' steps; 0 where nothing is known of any device."""
        return latency_model.predicted(
            self._coefficients[device], sparsity=1 - work, rank=_traffic(drop)
        )

    def work_seconds(self, device: DeviceId) -> float:
        """Of a usual round's steps alone."""
        return float(self._coefficients[device][0])
