"""MergeSFL-plus: MergeSFL with less label skew in client models and less waiting. Ours.

The base is Liao et al. 2024 (arXiv:2311.13348), which is `mergesfl`. What is added, and what each
part is worth: docs/methods/mergesfl_plus.md. Every addition can be switched off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from fedspine.control.labels import reference
from fedspine.control.split_plan import Goal, SplitControl, SplitPlan, plan_split
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.reads import Reads
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
from fedspine.split.baseline import (
    RoundSetup,
    batch_caps,
    running_mean,
    set_up_round,
    updated_workers,
    weighted_mean,
)
from fedspine.split.batch_control import BatchControl, row_costs
from fedspine.split.label_distribution import logit_adjustments
from fedspine.split.messages import Begin
from fedspine.split.protocol import RoundResult, run_round
from fedspine.split.server import LogitAdjustments
from fedspine.split.trainable_half import Optimising
from fedspine.split.u_shape import MergedMiddle, run_u_shape_round

# of the search that weighs waiting; with the usual 20 and 20 a few devices that wait are left in
POPULATION, GENERATIONS = 50, 80
LIGHT = 0.25  # bytes of a client model over those of a batch's features, below which it is light
SHORT = 2  # times `batch`: the most rows of a batch of short texts


@message
class MergeSflPlusState(MergeSflState):
    mean: Any  # of the models of all rounds, if they are averaged; else the last round's
    fixed_seconds: float = 0.0  # of an exchange whatever its rows, as the last round showed it


@method("mergesfl-plus")
@dataclass(frozen=True)
class MergeSflPlus(MergeSfl):
    """MergeSFL with what we added to it: logit adjustment, averaged rounds, and batches and devices
    that wait less.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    renamed: ClassVar[dict[str, str]] = {  # settings of old recipes
        "calibrate": "logit_adjustment",
        "bottom_rate": "client_lr_multiplier",
        "bottom_weights": "client_weights",
    }

    # what the client models learn, and what is deployed
    logit_adjustment: float = 0.95  # share of a device's label skew that its gradient leaves out
    client_lr_multiplier: float = 0.4  # learning rate of the client models over the server model's
    average: bool = True  # deploy the mean of the rounds' models; else the last round's
    # how devices wait less
    weigh_waiting: bool = True  # devices are chosen for little waiting too; else for labels alone
    regulate_within: bool = True  # batches are planned again within a round, from its exchanges
    fill_tokens: bool = True  # then batches of texts are so many tokens; else so many rows
    join_late: bool = True  # and devices with slow links begin later and end earlier
    # other forms of the paper's rules
    rescale: bool = True  # a device's gradient is that of its own mean loss; else of the merged
    client_weights: Literal["batch", "uniform"] = "batch"  # of the average of the client models
    lr_scaling: Literal["none", "linear"] = "none"  # a device's rate in proportion to its batch
    labels_stay: bool = False  # U-shape: labels and the task head stay on the devices

    def check(self, task: Task) -> None:
        super().check(task)
        if self.labels_stay and self.merging != "merged":
            raise BadInput(
                f"method.labels_stay needs merged features; method.merging is {self.merging!r}"
            )
        if not 0 <= self.logit_adjustment < 1 or not self.client_lr_multiplier > 0:
            raise BadInput(
                "method.logit_adjustment from 0 to below 1 and a method.client_lr_multiplier above "
                f"0 were expected, {self.logit_adjustment} and {self.client_lr_multiplier} came"
            )

    def foretold(self, base: Any) -> Reads:
        return replace(super().foretold(base), labels=not self.labels_stay)

    def start(self, task: Task, rng: np.random.Generator) -> MergeSflPlusState:
        first = super().start(task, rng)
        return MergeSflPlusState(**vars(first), mean=first.model)

    def round(self, state: MergeSflPlusState, fleet: Fleet) -> MergeSflPlusState:
        now = set_up_round(self, state, fleet)
        labels = self._labels(state, fleet)
        batches, control = self._planned(state, labels, now, fleet)
        orders = {device: self._order(now, rows) for device, rows in batches.items()}
        adjustments = self._adjustments(state, labels)
        result, server_model = self._trained(now, fleet, orders, control, adjustments)
        note_round(fleet, result, labels)
        client_model = weighted_mean(result.client_models, self._weights(result))
        model, done = now.split_model.join(client_model, server_model), state.round + 1
        mean = running_mean(now.split_model, state.mean, model, done) if self.average else model
        after = self._measured(state, result)
        return replace(after, round=done, model=model, mean=mean, labels=labels)

    def deploy(self, state: MergeSflPlusState, device: DeviceId | None = None) -> Any:
        return state.mean

    def unpruned(self, state: MergeSflPlusState) -> Any:
        return state.mean

    # --- the control ---

    def _labels(self, state: MergeSflPlusState, fleet: Fleet) -> dict[str, np.ndarray]:
        """V_i of all devices known; where labels stay, all devices count as alike."""
        if self.labels_stay:
            return state.labels | {profile.id: np.ones(1) for profile in fleet.devices}
        return known_labels(state, fleet)

    def _adjustments(
        self, state: MergeSflPlusState, labels: Mapping[DeviceId, np.ndarray]
    ) -> LogitAdjustments:
        """What is added to each device's logits; None where label distributions are not known."""
        if not self.logit_adjustment or not state.classes or self.labels_stay:
            return None
        return logit_adjustments(labels, self.logit_adjustment)

    @property
    def _within(self) -> bool:
        return self.regulate and self.regulate_within

    def _planned(
        self,
        state: MergeSflPlusState,
        labels: Mapping[DeviceId, np.ndarray],
        now: RoundSetup,
        fleet: Fleet,
    ) -> tuple[dict[DeviceId, int], BatchControl | None]:
        """Devices with the rows of each, and how batches are planned again within the round, if
        they are.
        """
        room = batch_caps(fleet, now.split_model, SHORT * self.batch, state.longest)
        devices, candidates = candidates_of(state, labels, room, self.batch)
        if self._within:
            candidates = replace(candidates, fixed=state.fixed_seconds)
        else:
            candidates = new_as_slowest(state, devices, candidates)
        limits = limits_of(self, now.split_model, state.longest)
        parts = SplitControl(select=self.selection, regulate=self.regulate, tune=self.fine_tune)
        if self.regulate and self.weigh_waiting:
            # a row sends features up and their gradient down, a round the client model down and up
            exchange = candidates.cost * (weight_bytes(now) / limits.feature_bytes / self.steps)
            candidates = replace(candidates, weights=exchange)
            parts = replace(parts, population=POPULATION, generations=GENERATIONS)
        plan = plan_split(candidates, limits, np.random.default_rng([now.seed, PLANNING]), parts)
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
        batch_control = self._batch_control(
            now, {device: room[device] for device in chosen}, goal, plan
        )
        return dict(
            zip(chosen, batch_control.first(plan.batches).tolist(), strict=True)
        ), batch_control

    def _batch_control(
        self, now: RoundSetup, room: Mapping[DeviceId, int], goal: Goal, plan: SplitPlan
    ) -> BatchControl:
        """How batches are planned again within the round; `room` is the rows that fit each device
        chosen.
        """
        longest, feature_bytes = now.longest, goal.limits.feature_bytes
        # a light client model lets all devices begin at once
        late = weight_bytes(now) > LIGHT * plan.batches.mean() * feature_bytes
        # in the U-shape an exchange says too little of what a token takes
        by_tokens = self.fill_tokens and longest > 1 and not self.labels_stay
        return BatchControl(
            devices=list(room),
            goal=goal,
            tune=self.fine_tune,
            steps=self.steps,
            weight_bytes=weight_bytes(now),
            late=self.join_late and late,
            optimising=lambda rows: self._optimising(now, rows),
            room=np.array(list(room.values())) if by_tokens else None,
            token_bytes=feature_bytes / longest,
        )

    def _measured(self, state: MergeSflPlusState, result: RoundResult) -> MergeSflPlusState:
        """The state with the speed of the devices that stayed to the end, whose round counts."""
        cost, fixed = row_seconds(result, self.regulate), state.fixed_seconds
        if self._within:
            found = row_costs(list(result.progress.values()), fixed, ended=True)
            cost = dict(zip(result.progress, found.cost.tolist(), strict=True))
            fixed = found.fixed
        workers = state.workers | updated_workers(state.workers, cost, self.keep)
        return replace(state, workers=workers, fixed_seconds=fixed)

    # --- the training ---

    def _order(self, now: RoundSetup, rows: int) -> Begin:
        return replace(now.begin(rows), optimising=self._optimising(now, rows))

    def _optimising(self, now: RoundSetup, rows: int) -> Optimising:
        """How a client model is trained with batches of so many rows."""
        share = self.client_lr_multiplier * (
            rows / self.batch if self.lr_scaling == "linear" else 1.0
        )
        return replace(now.optimising, learning_rate=now.optimising.learning_rate * share)

    def _trained(
        self,
        now: RoundSetup,
        fleet: Fleet,
        orders: Mapping[DeviceId, Begin],
        control: BatchControl | None,
        adjustments: LogitAdjustments,
    ) -> tuple[RoundResult, Any]:
        """The round, and the server model that came of it."""
        if self.labels_stay:
            return self._trained_u_shape(now, fleet, orders, control)
        server = server_of(self, now, rescale=self.rescale, adjustments=adjustments)
        staggered = control and control.staggered
        result = run_round(
            fleet, orders, self.steps, server, now.seed, resizing=control, staggered=staggered
        )
        return result, server.finish(self._weights(result))

    def _trained_u_shape(
        self,
        now: RoundSetup,
        fleet: Fleet,
        orders: Mapping[DeviceId, Begin],
        control: BatchControl | None,
    ) -> tuple[RoundResult, Any]:
        """The U-shape: the server trains the middle, each device its own copy of the last part."""
        ending = {
            name: tensor
            for name, tensor in now.server_model.items()
            if name in now.split_model.ends
        }
        orders = {device: now.with_ending(order, ending) for device, order in orders.items()}
        middle = {name: tensor for name, tensor in now.server_model.items() if name not in ending}
        server = MergedMiddle(
            now.split_model,
            middle,
            now.optimising,
            rescale=self.rescale,
            gradients=bool(now.client_model),
        )
        result = run_u_shape_round(fleet, orders, self.steps, server, now.seed, control)
        return result, server.finish() | weighted_mean(result.endings, self._weights(result))

    def _weights(self, result: RoundResult) -> dict[DeviceId, float]:
        """How much each client model counts: by the labels it was trained on (Eq. 17), or all
        alike.
        """
        if self.client_weights == "uniform":
            return dict.fromkeys(result.progress, 1.0)
        return {device: float(counted) for device, counted in result.counted.items()}


def weight_bytes(now: RoundSetup) -> int:
    """Bytes of the client model as it is sent."""
    return sum(tensor.nbytes for tensor in now.begin(1).weights.values())
