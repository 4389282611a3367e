"""MergeSFL-plus: MergeSFL with less label skew in client models and less waiting. Ours.

The base is Liao et al. 2024 (arXiv:2311.13348), which is `mergesfl`. Most of what is added are
parts that other split methods can switch on, too (`split/composed.py`); here they are on by
default. What each is worth: docs/methods/mergesfl_plus.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedspine.control.split_parts import Batches, LeastWaiting, Selection, WithinRound
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.logit_adjustment import LabelSkew, LogitAdjustment, Unadjusted
from fedspine.core.method import method
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.methods.mergesfl import MergeSfl, server_of
from fedspine.split.averaging import Averaging, RoundsMean
from fedspine.split.baseline import RoundSetup, SplitState, weighted_mean
from fedspine.split.composed import Known, check_composed
from fedspine.split.composed_round import RoundPlan, next_state, note_round, plan_round, train
from fedspine.split.joining import AtOnce, Joining, Late
from fedspine.split.protocol import RoundResult
from fedspine.split.trainable_half import Optimising
from fedspine.split.u_shape import MergedMiddle, run_u_shape_round


@method("mergesfl-plus")
@dataclass(frozen=True)
class MergeSflPlus(MergeSfl):
    """MergeSFL with what we added to it: logit adjustment, averaged rounds, and batches and devices
    that wait less.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    renamed: ClassVar[dict[str, str]] = MergeSfl.renamed | {
        "calibrate": "logit_adjustment.share",
        "bottom_rate": "client_lr_multiplier",
        "bottom_weights": "client_weights",
        "average": 'averaging.name = "last" for false',
        "weigh_waiting": 'selection.name = "genetic" for false',
        "regulate_within": 'batches.name = "regulated" for false',
        "fill_tokens": "batches.fill_tokens",
        "join_late": 'joining.name = "at-once" for false',
    }

    selection: Selection = LeastWaiting()
    batches: Batches = WithinRound()
    joining: Joining = Late()
    logit_adjustment: LogitAdjustment = LabelSkew()
    averaging: Averaging = RoundsMean()
    client_lr_multiplier: float = 0.4
    # other forms of the paper's rules
    rescale: bool = True  # a device's gradient is that of its own mean loss; else of the merged
    client_weights: Literal["batch", "uniform"] = "batch"  # of the average of the client models
    lr_scaling: Literal["none", "linear"] = "none"  # a device's rate in proportion to its batch
    labels_stay: bool = False  # U-shape: labels and the task head stay on the devices

    def check(self, task: Task) -> None:
        check_composed(self, task)
        if self.labels_stay and self.merging != "merged":
            raise BadInput(
                f"method.labels_stay needs merged features; method.merging is {self.merging!r}"
            )

    def predicted_reads(self, base: Any) -> Reads:
        return replace(super().predicted_reads(base), labels=not self.labels_stay)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        if self.labels_stay:
            return self._without_labels()._round_in_u_shape(state, fleet)
        plan = plan_round(self, state, fleet, optimising=self._client_optimising)
        server = server_of(self.merging, plan, rescale=self.rescale)
        result = train(plan, fleet, server, self.steps)
        return self._state_after(
            state, fleet, plan, result, server.finish(self._averaging_weights(result))
        )

    # --- labels that stay ---

    def _without_labels(self) -> Self:
        """The parts that know no labels, at most two exchanges of a step, and whole rows: an
        exchange of the U-shape says too little of what a token takes.
        """
        batches = self.batches
        if isinstance(batches, WithinRound):
            batches = replace(batches, fill_tokens=False)
        return replace(self, batches=batches, joining=AtOnce(), logit_adjustment=Unadjusted())

    def _round_in_u_shape(self, state: SplitState, fleet: Fleet) -> SplitState:
        """The server trains the middle, each device its own copy of the last part; nobody knows
        label distributions, so all devices count as alike.
        """
        alike = {profile.id: np.ones(1) for profile in fleet.devices}
        plan = plan_round(
            self,
            state,
            fleet,
            labels={**Known.of(state).labels, **alike},
            optimising=self._client_optimising,
        )
        now = plan.now
        ending = {
            name: tensor
            for name, tensor in now.server_model.items()
            if name in now.split_model.ends
        }
        orders = {
            device: now.with_ending(order, ending)
            for device, order in plan.orders(self.steps).items()
        }
        middle = {name: tensor for name, tensor in now.server_model.items() if name not in ending}
        server = MergedMiddle(
            now.split_model,
            middle,
            now.optimising,
            rescale=self.rescale,
            gradients=bool(now.client_model),
        )
        result = run_u_shape_round(fleet, orders, self.steps, server, now.seed, plan.control)
        trained = server.finish() | weighted_mean(result.endings, self._averaging_weights(result))
        return self._state_after(state, fleet, plan, result, trained)

    # --- what both forms share ---

    def _state_after(
        self,
        state: SplitState,
        fleet: Fleet,
        plan: RoundPlan,
        result: RoundResult,
        server_model: Mapping[str, Any],
    ) -> SplitState:
        note_round(fleet, result, plan.labels)
        client_model = weighted_mean(result.client_models, self._averaging_weights(result))
        model = plan.now.split_model.join(client_model, server_model)
        return next_state(self, plan, state, result, model)

    def _client_optimising(self, now: RoundSetup, rows: int) -> Optimising:
        """How a client model is trained with batches of so many rows."""
        share = self.client_lr_multiplier * (
            rows / self.batch if self.lr_scaling == "linear" else 1.0
        )
        return replace(now.optimising, learning_rate=now.optimising.learning_rate * share)

    def _averaging_weights(self, result: RoundResult) -> dict[DeviceId, float]:
        """How much each client model counts: by the labels it was trained on (Eq. 17), or all
        alike.
        """
        if self.client_weights == "uniform":
            return dict.fromkeys(result.progress, 1.0)
        return {device: float(counted) for device, counted in result.counted.items()}
