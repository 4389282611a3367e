"""Magnitude pruning with FedLoRA: every device prunes on one cubic schedule the units whose weights
are small.

Gradual magnitude pruning, Zhu & Gupta 2017 (arXiv:1710.01878), of whole heads and channels, after
Li et al. 2016 (arXiv:1608.08710) who drop whole filters by norm; under FedAvg of LoRA factors.
Departures: docs/methods/magnitude.md.
"""

from dataclasses import dataclass

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.importance_sources import ByMagnitude
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


@method("magnitude", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class MagnitudePruning(CubicPruning):
    """FedAvg of LoRA factors at one rank, pruned by the size of the tuned weights on a fixed
    schedule.
    """

    def check(self, task: Task) -> None:
        check_pruning(self, task)
        cubic(self, 0, 1)

    def start(self, task: Task, rng: np.random.Generator) -> PruningState:
        return begin(self, task, rng)

    def round(self, state: PruningState, fleet: Fleet) -> PruningState:
        due = cubic(self, state.round, state.rounds)
        after, _ = prune_and_average(self, state, fleet, target=due, scoring=ByMagnitude())
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
