"""SplitFed V2: one server model, which takes a step for each device in turn, in random order.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI (arXiv:2004.12088). Departures: docs/methods/splitfed_v2.md.
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
from fedspine.split.server import InTurn


@method("splitfed_v2")
@dataclass(frozen=True)
class SplitFedV2(SplitTraining):
    """Split learning with one server model, which sees the devices one after another; only the
    client models are averaged.
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
            lambda now: InTurn(
                now.split_model, now.server_model, now.optimising, gradients=bool(now.client_model)
            ),
        )

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model
