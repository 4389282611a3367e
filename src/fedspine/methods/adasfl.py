"""AdaSFL: slow devices get smaller batches, and the number of iterations of a round follows the
loss.

Liao, Xu, Xu, Yao, Wang and Qiao 2024, "Accelerating Federated Learning With Data and Model
Parallelism in Edge Computing", IEEE/ACM Transactions on Networking. No merging and no selection: in
every iteration the features of each device train a copy of the server model, and the copies are
averaged. Departures: docs/methods/adasfl.md.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from fedspine.control.split_parts import Batches, Regulated
from fedspine.control.worker_state import WorkerState
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.averaging import LastRound
from fedspine.split.baseline import TOY, SplitState, first_state, weighted_mean
from fedspine.split.composed import (
    ComposedState,
    ComposedTraining,
    asks_labels,
    check_composed,
    composed_state,
    deployed,
    learns_within,
)
from fedspine.split.composed_round import next_state, note_round, plan_round, train
from fedspine.split.server import Copies


@message
class AdaSflState(SplitState):
    workers: dict[str, WorkerState]  # every device that completed a round
    loss: float | None  # of the last round
    first_loss: float | None  # of the first one


@message
class AdaSflComposedState(ComposedState):
    """The state if parts are on that are not AdaSFL's."""

    loss: float | None
    first_loss: float | None


S = TypeVar("S", AdaSflState, AdaSflComposedState)


@method("adasfl")
@dataclass(frozen=True)
class AdaSfl(ComposedTraining):
    """Split learning with batches by the devices' speed and rounds whose length follows the loss.

    `steps` is tau of the first round, `batch` the rows of the fastest device in an iteration.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    renamed: ClassVar[dict[str, str]] = {"keep": "batches.keep"}  # settings of old recipes

    batches: Batches = Regulated(unmeasured="median", tune=False)
    fewest: float = 0.5  # of `steps`: the shortest round
    most: float = 3.0  # of `steps`: the longest one; both 1: all rounds are alike

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY)

    def check(self, task: Task) -> None:
        check_composed(self, task)
        if not 0 < self.fewest <= 1 <= self.most < np.inf:
            raise BadInput(
                f"method.fewest and method.most are {self.fewest} and {self.most}, but multiples "
                "of method.steps were expected: fewest above 0 and up to 1, most at least 1"
            )

    def start(self, task: Task, rng: np.random.Generator) -> AdaSflState | AdaSflComposedState:
        first = first_state(self, task, rng)
        if not (asks_labels(self) or learns_within(self) or self.averaging != LastRound()):
            return AdaSflState(**vars(first), workers={}, loss=None, first_loss=None)
        composed = composed_state(self, first, task)
        return AdaSflComposedState(**vars(composed), loss=None, first_loss=None)

    def round(self, state: S, fleet: Fleet) -> S:
        plan = plan_round(self, state, fleet)
        server_model = Copies(**plan.server_arguments, every_iteration=True)
        result = train(plan, fleet, server_model, self._steps(state))
        note_round(fleet, result, plan.labels)
        alike = dict.fromkeys(result.client_models, 1)
        model = plan.now.split_model.join(
            weighted_mean(result.client_models, alike), server_model.finish(alike)
        )
        first_loss = result.loss if state.first_loss is None else state.first_loss
        after = next_state(self, plan, state, result, model)
        return replace(after, loss=result.loss, first_loss=first_loss)

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return deployed(self, state)

    def unpruned(self, state: SplitState) -> Any:
        return deployed(self, state)

    def _steps(self, state: AdaSflState | AdaSflComposedState) -> int:
        """tau = tau_0 * sqrt(loss / first loss), within limits: fewer local steps as training
        settles.
        """
        known = state.loss is not None and state.first_loss
        share = np.sqrt(state.loss / state.first_loss) if known else 1.0
        return max(1, round(self.steps * float(np.clip(share, self.fewest, self.most))))
