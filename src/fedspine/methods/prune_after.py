"""Prune after training: FedLoRA on the whole model, which every device prunes once, by the
importance that it gathered.

The control without a paper of its own that each published comparison runs: train, prune, deploy.
The criterion is LoRAPrune's (Zhang et al. 2023, arXiv:2305.18403). Departures and choices:
docs/methods/prune_after.md.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.importance import Scores, mixed
from fedspine.lm.importance_sources import Gradient, Magnitude, RandomImportance
from fedspine.lm.tuning import TOY
from fedspine.pruning.device import deployed, prune_and_tune
from fedspine.pruning.scheduled import (
    PruningState,
    ScheduledPruning,
    begin,
    check_pruning,
    dense,
    prune_and_average,
)


@message
class AfterState:
    training: PruningState
    ballots: dict[str, Scores]  # fp16, each device's own importance as it last sent it

    @property
    def round(self) -> int:
        return self.training.round


@method("prune_after", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class PruneAfter(ScheduledPruning):
    """FedAvg of LoRA factors at one rank on the whole model, pruned when it is deployed."""

    recover: int = 0  # last rounds in which devices tune what they have pruned
    # where a unit's importance comes from
    importance: Gradient | Magnitude | RandomImportance = Gradient()

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        # a model so small does not survive more without recovery
        return cls(**TOY, sparsity=0.15, rank=4)

    def check(self, task: Task) -> None:
        check_pruning(self, task)
        self.importance.check()
        if not 0 <= self.recover < task.rounds:
            raise BadInput(
                f"method.recover is {self.recover}, but 0 to {task.rounds - 1} was expected: "
                "at least one of run.rounds must come before the pruning"
            )

    def start(self, task: Task, rng: np.random.Generator) -> AfterState:
        return AfterState(training=begin(self, task, rng), ballots={})

    def round(self, state: AfterState, fleet: Fleet) -> AfterState:
        training = state.training
        target = self.planned_sparsity(training.round, training.rounds)
        after, replies = prune_and_average(
            self, training, fleet, target=target, scoring=self.importance.order
        )
        return AfterState(
            training=after, ballots=state.ballots | {r.device: r.value.scores for r in replies}
        )

    def planned_sparsity(self, round: int, rounds: int) -> float:
        return self.sparsity if round >= rounds - self.recover else 0.0

    def deploy(self, state: AfterState, device: DeviceId | None = None) -> Model:
        """What the device would run if training ended now: pruned to the target, by its own scores
        where it has any.
        """
        votes = state.training.scores
        if device in state.ballots and votes is not None:
            votes = mixed(state.ballots[device], votes, self.global_importance_weight)
        return deployed(self, state.training, device, due=self.sparsity, votes=votes)

    def unpruned(self, state: AfterState) -> Model:
        return dense(self, state.training)
