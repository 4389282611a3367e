"""MergeSFL with our additions: client models that do not learn label skew, and less waiting within a round.

The base is Liao et al. 2024 (arXiv:2311.13348), which is `mergesfl`. What is added, and what each part is worth:
docs/methods/mergesfl_plus.md. Every addition can be switched off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from fedspine.control.labels import reference
from fedspine.control.split_plan import Goal, SplitControl, plan_split
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.methods.mergesfl import (
    PLANNING,
    MergeSfl,
    MergeSflState,
    candidates_of,
    known_labels,
    limits_of,
    new_as_slowest,
    note_plan,
    note_round,
    row_seconds,
    server_of,
)
from fedspine.split.baseline import Opened, averaged, opened, paced, rooms, with_newest
from fedspine.split.batch_control import Regulating, paces
from fedspine.split.device import Begin
from fedspine.split.label_distribution import calibrating
from fedspine.split.protocol import Played, play
from fedspine.split.server import Shifts
from fedspine.split.trainable_half import Optimising
from fedspine.split.u_shape import MergedBody, play_around

# of the search that weighs waiting; with the usual 20 and 20 a few devices that wait are left in
POPULATION, GENERATIONS = 50, 80
LIGHT = 0.25  # a client model below this share of a batch's features lets all devices begin at once
SHORT = 2  # times as many rows as usual a batch of short texts may have


@message
class MergeSflPlusState(MergeSflState):
    mean: Any  # of the models of all rounds, if they are averaged; else the last round's
    fixed_seconds: float = 0.0  # of an exchange whatever its rows, as the last round showed it


@method("mergesfl-plus")
@dataclass(frozen=True)
class MergeSflPlus(MergeSfl):
    """MergeSFL with what we added to it: logit adjustment, averaged rounds, and batches and devices that wait less."""

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    # what the client models learn, and what is deployed
    calibrate: float = 0.95  # share of a device's label skew taken out of its gradient; 0: none
    bottom_rate: float = 0.4  # learning rate of the client models over the server model's
    average: bool = True  # deploy the mean of the rounds' models; else the last round's
    # how devices wait less
    weigh_waiting: bool = True  # devices are chosen for little waiting too; else for labels alone
    regulate_within: bool = True  # batches are planned again within a round, from its exchanges
    fill_tokens: bool = True  # then batches of texts are so many tokens; else so many rows
    join_late: bool = True  # and devices with slow links begin later and end earlier
    # other forms of the paper's rules
    rescale: bool = True  # a device's gradient is that of its own mean loss; else of the merged
    bottom_weights: Literal["batch", "uniform"] = "batch"  # of the average of the client models
    lr_scaling: Literal["none", "linear"] = "none"  # a device's rate in proportion to its batch
    labels_stay: bool = False  # U-shape: labels and the task head stay on the devices

    def check(self, task: Task) -> None:
        super().check(task)
        if self.labels_stay and self.merging != "merged":
            raise BadInput(
                f"method.labels_stay needs merged features; method.merging is {self.merging!r}"
            )
        if not 0 <= self.calibrate < 1 or not self.bottom_rate > 0:
            raise BadInput(
                "method.calibrate from 0 to below 1 and a method.bottom_rate above 0 were expected, "
                f"{self.calibrate} and {self.bottom_rate} came"
            )

    def start(self, task: Task, rng: np.random.Generator) -> MergeSflPlusState:
        first = super().start(task, rng)
        return MergeSflPlusState(**vars(first), mean=first.model)

    def round(self, state: MergeSflPlusState, fleet: Fleet) -> MergeSflPlusState:
        now = opened(self, state, fleet)
        labels = self._labels(state, fleet)
        batches, control = self._planned(state, labels, now, fleet)
        orders = {device: self._order(now, rows) for device, rows in batches.items()}
        played, top = self._played(now, fleet, orders, control, self._shifts(state, labels))
        note_round(fleet, played, labels)
        model = now.halves.join(averaged(played.bottoms, self._weights(played)), top)
        before = state.mean
        return replace(
            self._measured(state, played),
            round=state.round + 1,
            model=model,
            mean=with_newest(now.halves, before, model, state.round + 1) if self.average else model,
            labels=labels,
        )

    def deploy(self, state: MergeSflPlusState, device: DeviceId | None = None) -> Any:
        return state.mean

    def unpruned(self, state: MergeSflPlusState) -> Any:
        return state.mean

    # --- the control ---

    def _labels(self, state: MergeSflPlusState, fleet: Fleet) -> dict[str, np.ndarray]:
        """V_i of all devices known; where labels stay nobody may know them, so all count as alike."""
        if self.labels_stay:
            return state.labels | {profile.id: np.ones(1) for profile in fleet.devices}
        return known_labels(state, fleet)

    def _shifts(self, state: MergeSflPlusState, labels: Mapping[DeviceId, np.ndarray]) -> Shifts:
        """What is added to each device's logits; None where classes or their shares are not known."""
        known = state.classes > 0 and not self.labels_stay
        return calibrating(labels, self.calibrate) if self.calibrate and known else None

    @property
    def _within(self) -> bool:
        return self.regulate and self.regulate_within

    def _planned(
        self,
        state: MergeSflPlusState,
        labels: Mapping[DeviceId, np.ndarray],
        now: Opened,
        fleet: Fleet,
    ) -> tuple[dict[DeviceId, int], Regulating | None]:
        """Devices with the rows of each, and how batches are planned again within the round, if they are."""
        room = rooms(fleet, now.halves, SHORT * self.batch, state.longest)
        devices, candidates = candidates_of(state, labels, room, self.batch)
        if self._within:
            candidates = replace(candidates, fixed=state.fixed_seconds)
        else:
            candidates = new_as_slowest(state, devices, candidates)
        limits = limits_of(self, now.halves, state.longest)
        control = SplitControl(select=self.selection, regulate=self.regulate, tune=self.fine_tune)
        weights = weight_bytes(now)
        if self.regulate and self.weigh_waiting:
            # a row sends features up and their gradient down, a round the client model down and up
            exchange = candidates.cost * (weights / limits.feature_bytes / self.steps)
            candidates = replace(candidates, weights=exchange)
            control = replace(control, population=POPULATION, generations=GENERATIONS)
        plan = plan_split(candidates, limits, np.random.default_rng([now.seed, PLANNING]), control)
        note_plan(fleet, plan, self.regulate)
        chosen = [devices[i] for i in plan.chosen]
        if not self._within:
            return dict(zip(chosen, plan.batches.tolist(), strict=True)), None
        goal = Goal(
            cost=candidates.cost[plan.chosen],
            labels=candidates.labels[plan.chosen],
            reference=reference(candidates.labels),
            most=candidates.most[plan.chosen],
            limits=limits,
            fixed=state.fixed_seconds,
        )
        # in the U-shape an exchange says too little of what a token takes
        by_tokens = self.fill_tokens and state.longest > 1 and not self.labels_stay
        again = Regulating(
            devices=chosen,
            goal=goal,
            tune=self.fine_tune,
            steps=self.steps,
            weight_bytes=weights,
            late=self.join_late and weights > LIGHT * plan.batches.mean() * limits.feature_bytes,
            optimising=lambda rows: self._optimising(now, rows),
            room=np.array([room[device] for device in chosen]) if by_tokens else None,
            token_bytes=limits.feature_bytes / state.longest,
        )
        return dict(zip(chosen, again.first(plan.batches).tolist(), strict=True)), again

    def _measured(self, state: MergeSflPlusState, played: Played) -> MergeSflPlusState:
        """The state with the speed of the devices that stayed to the end, whose round counts."""
        cost, fixed = row_seconds(played, self.regulate), state.fixed_seconds
        if self._within:
            found = paces(list(played.progress.values()), fixed, ended=True)
            cost = dict(zip(played.progress, found.cost.tolist(), strict=True))
            fixed = found.fixed
        workers = state.workers | paced(state.workers, cost, self.keep)
        return replace(state, workers=workers, fixed_seconds=fixed)

    # --- the training ---

    def _order(self, now: Opened, rows: int) -> Begin:
        return replace(now.begin(rows), optimising=self._optimising(now, rows))

    def _optimising(self, now: Opened, rows: int) -> Optimising:
        """How a client model is trained with batches of so many rows."""
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
        """The round, and the server model that came of it."""
        if self.labels_stay:
            return self._played_around(now, fleet, orders, again)
        server = server_of(self, now, rescale=self.rescale, shifts=shifts)
        staggered = again and again.staggered
        played = play(
            fleet, orders, self.steps, server, now.seed, resizing=again, staggered=staggered
        )
        return played, server.finish(self._weights(played))

    def _played_around(
        self, now: Opened, fleet: Fleet, orders: Mapping[DeviceId, Begin], again: Regulating | None
    ) -> tuple[Played, Any]:
        """The U-shape: the server trains the middle, each device its own copy of the last part."""
        ending = {name: tensor for name, tensor in now.top.items() if name in now.halves.ends}
        orders = {device: now.with_ending(order, ending) for device, order in orders.items()}
        body = {name: tensor for name, tensor in now.top.items() if name not in ending}
        server = MergedBody(
            now.halves, body, now.optimising, rescale=self.rescale, gradients=bool(now.bottom)
        )
        played = play_around(fleet, orders, self.steps, server, now.seed, again)
        return played, server.finish() | averaged(played.endings, self._weights(played))

    def _weights(self, played: Played) -> dict[DeviceId, float]:
        """How much each client model counts: by the labels it was trained on (Eq. 17), or all alike."""
        if self.bottom_weights == "uniform":
            return dict.fromkeys(played.progress, 1.0)
        return {device: float(counted) for device, counted in played.counted.items()}


def weight_bytes(now: Opened) -> int:
    """Bytes of the client model as it is sent."""
    return sum(tensor.nbytes for tensor in now.begin(1).weights.values())
