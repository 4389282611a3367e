"""SplitFed V1: a server model for each device; both halves are averaged at the round's end.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI (arXiv:2004.12088). Departures: docs/methods/splitfed_v1.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.baseline import (
    SplitState,
    SplitTraining,
    check_split,
    first_state,
    splitfed_round,
)
from fedspine.split.server import Copies


@method("splitfed_v1")
@dataclass(frozen=True)
class SplitFedV1(SplitTraining):
    """Split learning with a copy of the server model for each device: FedAvg of models that are
    trained in two places.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=3, batch=16, optimiser="adamw", learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_split(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return first_state(self, task, rng)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        return splitfed_round(
            self,
            state,
            fleet,
            lambda now: Copies(
                now.split_model,
                now.server_model,
                now.optimising,
                every_iteration=False,
                gradients=bool(now.client_model),
            ),
        )

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model
