"""AdaSFL: slow devices get smaller batches, and how many iterations a round has follows the loss.

Liao, Xu, Xu, Yao, Wang and Qiao 2024, "Accelerating Federated Learning With Data and Model
Parallelism in Edge Computing", IEEE/ACM Transactions on Networking. No merging and no selection: in
every iteration the features of each device train a copy of the server model, and the copies are
averaged. Departures: docs/methods/adasfl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from fedspine.control.batch_sizes import regulate
from fedspine.control.worker_state import WorkerState, costs
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.baseline import (
    SplitTraining,
    batch_caps,
    check_split,
    first_state,
    note_devices,
    set_up_round,
    updated_workers,
    weighted_mean,
)
from fedspine.split.protocol import run_round
from fedspine.split.server import Copies


@message
class AdaSflState:
    round: int
    rounds: int
    seed: int
    longest: int  # tokens of a text, 1 for arrays
    model: Any  # as `SplitModel.join` gives it
    workers: dict[str, WorkerState]  # every device that completed a round
    loss: float | None  # of the last round
    first_loss: float | None  # of the first one


@method("adasfl")
@dataclass(frozen=True)
class AdaSfl(SplitTraining):
    """Split learning with batches that suit the devices' speed and rounds that suit the loss.

    `steps` is tau of the first round, `batch` the rows of the fastest device in an iteration.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    fewest: float = 0.5  # of `steps`: the shortest round
    most: float = 3.0  # of `steps`: the longest one; both 1: all rounds are alike
    keep: float = 0.8  # of a device's old speed at each measurement

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=3, batch=16, optimiser="adamw", learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_split(self, task)
        if not 0 < self.fewest <= 1 <= self.most < np.inf:
            raise BadInput(
                f"method.fewest and method.most are {self.fewest} and {self.most}, but shares of "
                "method.steps were expected, the one up to 1 and the other from 1 on"
            )
        if not 0 <= self.keep < 1:
            raise BadInput(f"method.keep is {self.keep}, but 0 to below 1 was expected")

    def start(self, task: Task, rng: np.random.Generator) -> AdaSflState:
        first = first_state(self, task, rng)
        return AdaSflState(**vars(first), workers={}, loss=None, first_loss=None)

    def round(self, state: AdaSflState, fleet: Fleet) -> AdaSflState:
        now = set_up_round(self, state, fleet)
        batches = self._batches(
            state, batch_caps(fleet, now.split_model, self.batch, state.longest)
        )
        server_model = Copies(
            now.split_model,
            now.server_model,
            now.optimising,
            every_iteration=True,
            gradients=bool(now.client_model),
        )
        orders = {device: now.begin(batch) for device, batch in batches.items()}
        result = run_round(fleet, orders, self._steps(state), server_model, now.seed)
        note_devices(fleet, result)
        alike = dict.fromkeys(result.client_models, 1)
        took = {device: progress.row_seconds for device, progress in result.progress.items()}
        return replace(
            state,
            round=state.round + 1,
            model=now.split_model.join(
                weighted_mean(result.client_models, alike), server_model.finish(alike)
            ),
            workers=state.workers | updated_workers(state.workers, took, self.keep),
            loss=result.loss,
            first_loss=result.loss if state.first_loss is None else state.first_loss,
        )

    def deploy(self, state: AdaSflState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: AdaSflState) -> Any:
        return state.model

    def _batches(self, state: AdaSflState, most: Mapping[DeviceId, int]) -> dict[DeviceId, int]:
        """The largest batch for the fastest device; the others get what they manage meanwhile."""
        cost = costs([state.workers.get(device) for device in most])
        batches = regulate(cost, self.batch, np.array(list(most.values())))
        return {device: int(batch) for device, batch in zip(most, batches, strict=True)}

    def _steps(self, state: AdaSflState) -> int:
        """tau = tau_0 * sqrt(loss / first loss), within limits: fewer local steps as training
        settles.
        """
        known = state.loss is not None and state.first_loss
        share = np.sqrt(state.loss / state.first_loss) if known else 1.0
        return max(1, round(self.steps * float(np.clip(share, self.fewest, self.most))))
