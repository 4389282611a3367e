"""MergeSFL: split learning in which the server trains one top on all devices' features merged into one batch.

Liao, Xu, Xu, Yao, Wang and Qiao 2024, "MergeSFL: Split Federated Learning with Feature Merging and Batch Size
Regulation", ICDE (arXiv:2311.13348). Batches are regulated to the devices' pace, devices chosen for the labels that the
merged batch will hold. Departures, and what it becomes for transformers with LoRA: docs/methods/mergesfl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedspine.control.labels import divergence, merged, reference
from fedspine.control.split_plan import (
    Candidates,
    Selection,
    SplitControl,
    SplitLimits,
    plan_split,
)
from fedspine.control.worker_state import WorkerState, costs
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost, Fleet, none_left
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.rates import AUTO, Optimiser, Rate
from fedspine.core.task import Task
from fedspine.split.baseline import (
    MODEL_CUT,
    Opened,
    averaged,
    check_split,
    cutting_of,
    first_state,
    noted,
    opened,
    paced,
    rooms,
    with_newest,
)
from fedspine.split.batch_control import Planned, Regulating, paces
from fedspine.split.device import Begin
from fedspine.split.interface import Halves
from fedspine.split.label_distribution import Look, calibrating, look
from fedspine.split.protocol import Played, play
from fedspine.split.server import Copies, InTurn, Merged, ServerStep, Shifts
from fedspine.split.trainable_half import Optimising
from fedspine.split.u_shape import MergedBody, play_around
from fedspine.split.wire import Precision, row_bytes

FULL_BATCHES = 10  # that the server takes in one iteration, where no budget is set
POPULATION, GENERATIONS = (
    50,
    80,
)  # of the search that weighs waiting: the usual 20 and 20 leave a few devices that wait
LIGHT = 0.25  # of what a batch's features take: where a bottom takes less, nobody has to begin a round late
SHORT = 2  # times as many rows as usual a batch of short texts may have
PLANNING, SERVER = 601, 602  # purposes of random streams


@message
class MergeSflState:
    round: int
    rounds: int
    seed: int
    model: Any  # as `Halves.join` gives it
    mean: Any  # of the models of all rounds, if they are averaged; else the same
    classes: int
    longest: int  # tokens of a text, 1 for arrays
    labels: dict[str, np.ndarray]  # V_i of the devices that were ever asked
    workers: dict[str, WorkerState]  # of the devices that ever completed a round
    fixed_seconds: float = 0.0  # of an exchange beside its rows', as the last round showed it


@method("mergesfl")
@dataclass(frozen=True)
class MergeSfl:
    """One top, one step per iteration on the merged features; the control is the paper's, each part can be left out."""

    models: ClassVar = ("transformer", "net")
    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says
    rank: int = 8  # of the adapters; nets train all weights
    scale: float = 2.0  # alpha / rank
    steps: int = 20  # tau: iterations of a round, one optimiser step in each half
    batch: int = 32  # D: rows of the fastest device in one of them
    fewest: int = 5  # m_min: devices of a round
    most: int = 20  # m_max
    budget_rows: int = 0  # features that the server takes in one iteration; 0: ten full batches
    budget_bytes: float = 0.0  # the same in bytes, if above 0
    divergence: float = 0.05  # eps: nats between the merged labels and the fleet's
    keep: float = 0.8  # a: share of the old average when a device's pace is measured again
    merging: Literal["merged", "in-turn", "copies"] = (
        "merged"  # without: a step per device, or averaged tops
    )
    selection: Selection = "genetic"  # or "random"
    weigh_waiting: bool = (
        True  # of choices alike in labels what waits least; else labels alone, as in the paper
    )
    regulate: bool = True  # batches in proportion to pace; else equal ones
    regulate_within: bool = (
        True  # and again within a round, to the pace it shows; else once before it, as in the paper
    )
    fill_tokens: bool = (
        True  # then texts' batches are so many tokens, whatever the rows; else so many rows
    )
    join_late: bool = True  # and devices with slow links begin later and end earlier; else all at once, as in the paper
    fine_tune: bool = True  # batches for the labels' sake
    rescale: bool = True  # gradients as of a device's own mean loss
    calibrate: float = 0.95  # share of what tells which labels a device holds that bottoms do not learn; 0 in the paper
    bottom_weights: Literal["batch", "uniform"] = "batch"
    lr_scaling: Literal["none", "linear"] = "none"  # a device's rate in proportion to its batch
    average: bool = (
        True  # deploy the mean of the rounds' models; else the last round's, as in the paper
    )
    labels_stay: bool = False  # U-shape: labels and the task head stay on the devices
    optimiser: Optimiser = AUTO
    learning_rate: Rate = AUTO
    bottom_rate: float = 0.4  # share of the rate that bottoms are trained with; 1 in the paper
    decay: float = (
        0.0  # factor on the rate after each round; 0: it falls linearly to zero over the rounds
    )
    lowest: float = 0.0  # below which it does not fall
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm in each half; 0: never
    precision: Precision = "fp16"  # of features and gradients on the wire

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=4, batch=16, optimiser="adamw", learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_split(self, task)
        if min(self.budget_rows, self.budget_bytes) < 0 or not 0 <= self.keep < 1:
            raise BadInput(
                "method.budget_rows and budget_bytes of at least 0 and method.keep from 0 to below 1 were expected, "
                f"{self.budget_rows}, {self.budget_bytes} and {self.keep} came"
            )
        if self.labels_stay and self.merging != "merged":
            raise BadInput(
                f"method.labels_stay needs merged features; method.merging is {self.merging!r}"
            )
        if not 0 <= self.calibrate < 1 or not self.bottom_rate > 0:
            raise BadInput(
                "method.calibrate from 0 to below 1 and a method.bottom_rate above 0 were expected, "
                f"{self.calibrate} and {self.bottom_rate} came"
            )
        self._limits(cutting_of(self, task.base).of(task.base), task.max_tokens)

    def start(self, task: Task, rng: np.random.Generator) -> MergeSflState:
        first = first_state(self, task, rng)
        return MergeSflState(
            **vars(first), mean=first.model, classes=len(task.label_names), labels={}, workers={}
        )

    def round(self, state: MergeSflState, fleet: Fleet) -> MergeSflState:
        now = opened(self, state, fleet)
        labels = self._labels(state, fleet)
        plan = self._planned(replace(state, labels=labels), now, fleet)
        orders = {device: self._order(now, rows) for device, rows in plan.batches.items()}
        # otherwise `labels` says nothing of the classes that a device holds
        told = state.classes > 0 and not self.labels_stay
        shifts = calibrating(labels, self.calibrate) if self.calibrate and told else None
        played, top = self._played(now, fleet, orders, plan.again, shifts)
        noted(fleet, played)
        fleet.note(
            loss=played.loss,
            stayed=len(played.bottoms),
            round_kl=self._apart(labels, fleet, played),
        )
        model = now.halves.join(averaged(played.bottoms, self._weights(played)), top)
        return replace(
            self._measured(state, played),
            round=state.round + 1,
            model=model,
            mean=with_newest(now.halves, state.mean, model, state.round + 1)
            if self.average
            else model,
            labels=labels,
        )

    def deploy(self, state: MergeSflState, device: DeviceId | None = None) -> Any:
        return state.mean

    def unpruned(self, state: MergeSflState) -> Any:
        return state.mean

    # --- the control ---

    def _labels(self, state: MergeSflState, fleet: Fleet) -> dict[str, np.ndarray]:
        """V_i of all devices known, those asked now for the first time among them."""
        if self.labels_stay:  # then nobody may know them: all count as alike
            return state.labels | {profile.id: np.ones(1) for profile in fleet.devices}
        unknown = [profile.id for profile in fleet.devices if profile.id not in state.labels]
        order = Look(classes=state.classes, longest=state.longest)
        replies = fleet.ask(look, dict.fromkeys(unknown, order)) if unknown else []
        labels = state.labels | {reply.device: reply.value.shares for reply in replies}
        if not any(profile.id in labels for profile in fleet.devices):
            raise none_left(len(unknown), [])
        return labels

    def _planned(self, state: MergeSflState, now: Opened, fleet: Fleet) -> Planned:
        """Which devices take part, and with how many rows in each iteration."""
        room = rooms(fleet, now.halves, SHORT * self.batch, state.longest)
        able = [device for device in room if device in state.labels]
        if not able:
            raise AllLost(
                f"of {len(room)} devices with memory for a row none has said what labels it holds"
            )
        known = [state.workers.get(device) for device in able]
        cost = costs(known)
        if (
            not self._within
        ):  # everybody waits for one that is slower than thought, nobody for one that is faster
            cost[[worker is None for worker in known]] = cost.max()
        candidates = Candidates(
            cost=cost,
            labels=np.stack([state.labels[device] for device in able]),
            most=np.minimum([room[device] for device in able], self.batch),
            rounds=np.array([0 if worker is None else worker.rounds for worker in known]),
            fixed=state.fixed_seconds if self._within else None,
        )
        limits = self._limits(now.halves, state.longest)
        control = SplitControl(select=self.selection, regulate=self.regulate, tune=self.fine_tune)
        weights = sum(tensor.nbytes for tensor in now.begin(1).weights.values())
        if self.regulate and self.weigh_waiting:
            # a row sends features up and their gradient down, as a round sends a bottom down and up
            candidates = replace(
                candidates, weights=cost * (weights / limits.feature_bytes / self.steps)
            )
            control = replace(control, population=POPULATION, generations=GENERATIONS)
        plan = plan_split(candidates, limits, np.random.default_rng([now.seed, PLANNING]), control)
        waiting = (
            {"waiting_planned": plan.waiting} if self.regulate else {}
        )  # else no pace is known
        fleet.note(merged_kl=plan.divergence, merged_rows=plan.rows, **waiting)
        devices = [able[i] for i in plan.chosen]
        # in the U-shape an exchange says too little of what a token takes
        by_tokens = self.fill_tokens and state.longest > 1 and not self.labels_stay
        again = Regulating(
            devices=devices,
            labels=candidates.labels[plan.chosen],
            reference=reference(candidates.labels),
            most=candidates.most[plan.chosen],
            limits=limits,
            tune=self.fine_tune,
            fixed=state.fixed_seconds,
            steps=self.steps,
            weight_bytes=weights,
            late=self.join_late and weights > LIGHT * plan.batches.mean() * limits.feature_bytes,
            optimising=lambda rows: self._optimising(now, rows),
            room=np.array([room[device] for device in devices]) if by_tokens else None,
            token_bytes=limits.feature_bytes / state.longest,
        )
        rows = again.first(plan.batches) if self._within else plan.batches
        return Planned(
            dict(zip(devices, rows.tolist(), strict=True)), again if self._within else None
        )

    def _limits(self, halves: Halves, longest: int) -> SplitLimits:
        feature_bytes = row_bytes(halves.feature_shape(longest), self.precision)
        rows = self.budget_rows or FULL_BATCHES * self.batch
        return SplitLimits(
            largest_batch=self.batch,
            fewest=self.fewest,
            most=self.most,
            feature_bytes=feature_bytes,
            budget_bytes=self.budget_bytes or rows * feature_bytes,
            divergence=self.divergence,
        )

    @property
    def _within(self) -> bool:
        return self.regulate and self.regulate_within

    def _measured(self, state: MergeSflState, played: Played) -> MergeSflState:
        """The state with the pace of the devices that stayed to the end, whose round counts."""
        progress, fixed = played.progress, state.fixed_seconds
        # paces that nothing uses stay out of the state, which a clock would else make another one each time
        cost = [own.row_seconds if self.regulate else 1.0 for own in progress.values()]
        if self._within:
            found = paces(list(progress.values()), fixed, ended=True)
            cost, fixed = found.cost.tolist(), found.fixed
        measured = paced(state.workers, dict(zip(progress, cost, strict=True)), self.keep)
        return replace(state, workers=state.workers | measured, fixed_seconds=fixed)

    def _apart(self, labels: Mapping[DeviceId, np.ndarray], fleet: Fleet, played: Played) -> float:
        """Nats between the labels of all that was merged in the round and the fleet's."""
        counted = np.array(list(played.counted.values()))
        of_round = merged(counted, np.stack([labels[device] for device in played.progress]))
        everywhere = [labels[profile.id] for profile in fleet.devices if profile.id in labels]
        return float(divergence(of_round, reference(np.stack(everywhere))))

    # --- the training ---

    def _order(self, now: Opened, rows: int) -> Begin:
        return replace(now.begin(rows), optimising=self._optimising(now, rows))

    def _optimising(self, now: Opened, rows: int) -> Optimising:
        """How a bottom is trained with batches of so many rows."""
        share = self.bottom_rate * (rows / self.batch if self.lr_scaling == "linear" else 1.0)
        return replace(now.optimising, learning_rate=now.optimising.learning_rate * share)

    def _played(
        self,
        now: Opened,
        fleet: Fleet,
        orders: Mapping[DeviceId, Begin],
        again: Regulating | None,
        shifts: Shifts,
    ) -> tuple[Played, Any]:
        """The round, and the top that came of it."""
        if self.labels_stay:
            return self._played_around(now, fleet, orders, again)
        server = self._server(now, shifts)
        played = play(
            fleet,
            orders,
            self.steps,
            server,
            now.seed,
            resizing=again,
            staggered=again and again.staggered,
        )
        return played, server.finish(self._weights(played))

    def _played_around(
        self, now: Opened, fleet: Fleet, orders: Mapping[DeviceId, Begin], again: Regulating | None
    ) -> tuple[Played, Any]:
        """The U-shape: the server trains the middle, each device its own copy of the end."""
        ending = {name: tensor for name, tensor in now.top.items() if name in now.halves.ends}
        orders = {device: now.with_ending(order, ending) for device, order in orders.items()}
        body = {name: tensor for name, tensor in now.top.items() if name not in ending}
        server = MergedBody(
            now.halves, body, now.optimising, rescale=self.rescale, gradients=bool(now.bottom)
        )
        played = play_around(fleet, orders, self.steps, server, now.seed, again)
        return played, server.finish() | averaged(played.endings, self._weights(played))

    def _server(self, now: Opened, shifts: Shifts) -> ServerStep:
        given = {"gradients": bool(now.bottom), "shifts": shifts}
        match self.merging:
            case "merged":
                return Merged(now.halves, now.top, now.optimising, rescale=self.rescale, **given)
            case "in-turn":
                return InTurn(now.halves, now.top, now.optimising, **given)
            case "copies":
                return Copies(now.halves, now.top, now.optimising, every_iteration=True, **given)

    def _weights(self, played: Played) -> dict[DeviceId, float]:
        """How much each bottom counts: by the labels it was trained on, d_i/Q of Eq. 17, or all alike."""
        if self.bottom_weights == "uniform":
            return dict.fromkeys(played.progress, 1.0)
        return {device: float(counted) for device, counted in played.counted.items()}
