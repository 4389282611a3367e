"""fedspine-plus: FedSpine with plans for a deadline, shared importance, and a head start.

A method of our own on the frame of FedSpine (Yao et al. 2025, arXiv:2501.02438):
docs/methods/fedspine_plus.md.
"""

from dataclasses import dataclass, replace

from fedspine.control.controllers import Controller, Deadline
from fedspine.control.plan import Plan
from fedspine.core.device import DeviceId
from fedspine.core.errors import check_ranges
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.parts import quiet
from fedspine.core.task import Task
from fedspine.lm.importance import on_wire
from fedspine.lm.importance_sources import Blend, Importance
from fedspine.lm.merge import RankMerging
from fedspine.methods.fedspine import FedSpine, SpineState
from fedspine.pruning.device import SpineOrder, prune_and_tune
from fedspine.pruning.head_start import (
    HeadWeights,
    Start,
    check_head_start,
    know_classes,
    started,
)


@method("fedspine-plus", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedSpinePlus(FedSpine):
    """FedSpine with a deadline for all devices, shared importance, a head from class means, and
    factors averaged.

    >>> from fedspine import FedSpinePlus, Recipe
    >>> Recipe(method=FedSpinePlus(sparsity=0.4), quorum=0.7).method.controller.name
    'deadline'
    """

    controller: Controller = Deadline()
    importance: Importance = Blend()
    aggregation: RankMerging = "zeropad"
    # of the fleet's average importance in what a device drops
    global_importance_weight: float = 0.9
    head_start: Start = "auto"  # what the task head begins as
    head_weights: HeadWeights = quiet("rows")  # what devices count by in the classifier

    def check(self, task: Task) -> None:
        super().check(task)
        check_ranges(self, {"global_importance_weight": (0, 1)})
        check_head_start(self, task)

    def round(self, state: SpineState, fleet: Fleet) -> SpineState:
        if state.round == 0:
            rows = self.steps * self.batch
            state = replace(state, head=started(self, state.head, fleet, rows=rows))
        know_classes(self, fleet, rows=self.steps * self.batch)
        return super().round(state, fleet)

    def _knows_units(self, state: SpineState, device: DeviceId) -> bool:
        """A newcomer prunes by the fleet's scores, where these have a say."""
        shared = self.global_importance_weight > 0 and state.scores is not None
        return shared or super()._knows_units(state, device)

    def _order(self, state: SpineState, device: DeviceId, plan: Plan) -> SpineOrder:
        shared = self.global_importance_weight > 0 and state.scores is not None
        return replace(
            super()._order(state, device, plan),
            scores=on_wire(state.scores) if shared else None,
            global_importance_weight=self.global_importance_weight,
        )
