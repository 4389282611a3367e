"""LoRAPrune with FedLoRA: every device prunes on one cubic schedule, by importance read from its
LoRA gradients.

Zhang et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
arXiv:2305.18403 (Findings of ACL 2024), a method for one machine, put under FedAvg of the adapters.
It is FedSpine without a choice of when to prune and at which rank to tune. Departures:
docs/methods/loraprune.md.
"""

from dataclasses import dataclass

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.importance_sources import Gradient
from fedspine.pruning.device import deployed, prune_and_tune
from fedspine.pruning.scheduled import (
    CubicPruning,
    PruningState,
    begin,
    check_pruning,
    cubic,
    cubic_reached,
    dense,
    prune_and_average,
)


@method("loraprune", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class LoraPrune(CubicPruning):
    """FedAvg of LoRA factors at one rank, pruned by LoRA gradients on a fixed schedule."""

    # the paper squares, its released code has cross 1.0 and normalises
    importance: Gradient = Gradient()

    def check(self, task: Task) -> None:
        check_pruning(self, task)
        self.importance.check()
        cubic(self, 0, 1)

    def start(self, task: Task, rng: np.random.Generator) -> PruningState:
        return begin(self, task, rng)

    def round(self, state: PruningState, fleet: Fleet) -> PruningState:
        due = cubic(self, state.round, state.rounds)
        after, _ = prune_and_average(self, state, fleet, target=due, scoring=self.importance.order)
        return after

    def planned_sparsity(self, round: int, rounds: int) -> float:
        return cubic(self, round, rounds)

    def deploy(self, state: PruningState, device: DeviceId | None = None) -> Model:
        """The device's own structure; a device that is behind the schedule is pruned to it by the
        fleet's average scores.
        """
        return deployed(self, state, device, due=cubic_reached(self, state), votes=state.scores)

    def unpruned(self, state: PruningState) -> Model:
        return dense(self, state)
