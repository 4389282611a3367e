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
from fedspine.split.baseline import TOY, SplitState, first_state
from fedspine.split.composed import ComposedTraining, check_composed, composed_state, deployed
from fedspine.split.composed_round import RoundPlan, composed_round
from fedspine.split.server import InTurn


@method("splitfed_v2")
@dataclass(frozen=True)
class SplitFedV2(ComposedTraining):
    """Split learning with one server model, which sees the devices one after another; only the
    client models are averaged.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY)

    def check(self, task: Task) -> None:
        check_composed(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return composed_state(self, first_state(self, task, rng), task)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        return composed_round(self, state, fleet, _server_step)

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return deployed(self, state)

    def unpruned(self, state: SplitState) -> Any:
        return deployed(self, state)


def _server_step(plan: RoundPlan) -> InTurn:
    return InTurn(**plan.server_arguments)
