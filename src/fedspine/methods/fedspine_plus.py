"""fedspine-plus: FedSpine with plans for a deadline, shared importance, and a head start.

Our own method, on the frame of FedSpine (Yao et al. 2025, arXiv:2501.02438):
docs/methods/fedspine_plus.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspine.control.controllers import Controller, Deadline
from fedspine.control.depth import AllBlocks, DepthPlanner, Depths, Lcd
from fedspine.control.device_times import DeviceTimes, timed
from fedspine.control.plan import Plan
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput, check_ranges, listed
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.parts import quiet
from fedspine.core.task import Task
from fedspine.lm.distillation import NoTeacher
from fedspine.lm.forecast import depth_traffic
from fedspine.lm.importance import on_wire
from fedspine.lm.importance_sources import Blend, Importance
from fedspine.lm.merge import FACTORS, RankMerging
from fedspine.methods.fedspine import FedSpine, SpineState
from fedspine.pruning.device import (
    DepthSpineOrder,
    SpineOrder,
    SpineResult,
    prune_and_tune,
)
from fedspine.pruning.head_start import HeadWeights, Start, check_head_start, prepared_head


@message
class DepthSpineState(SpineState):
    """The state of a run in which devices differ in depth."""

    times: dict[str, DeviceTimes]  # what exchanges took
    depths: dict[str, int]  # of every device that has replied
    planned: dict[str, int]  # of the devices of this round


@method("fedspine-plus", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedSpinePlus(FedSpine):
    """FedSpine with plans for a deadline, shared importance, a head from class means, and averaged
    factors.

    >>> from fedspine import FedSpinePlus, Recipe
    >>> Recipe(method=FedSpinePlus(sparsity=0.4), quorum=0.7).method.controller.name
    'deadline'
    """

    controller: Controller = Deadline()
    importance: Importance = Blend()
    aggregation: RankMerging = "zeropad"
    # weight of the fleet's average importance when a device prunes
    global_importance_weight: float = 0.9
    head_start: Start = "auto"  # the initial task head
    head_weights: HeadWeights = quiet("rows")  # what devices count by in the classifier
    depths: Depths = quiet(AllBlocks())  # number of upper blocks on which a device trains adapters

    def check(self, task: Task) -> None:
        super().check(task)
        self.depths.check(task.base.layout.layers)
        if isinstance(self.depths, Lcd):
            self._check_with_depths()
        check_ranges(self, {"global_importance_weight": (0, 1)})
        check_head_start(self, task)

    def _check_with_depths(self) -> None:
        """Raise BadInput for settings that need a gradient or a change of every block, or their own
        orders.
        """
        for field, named, able in (
            ("importance", self.importance.name, ("activation", "magnitude", "random")),
            ("aggregation", self.aggregation, FACTORS),
            ("teacher", self.teacher.name, (NoTeacher.name,)),
            ("structure", self.structure, ("free",)),
        ):
            if named not in able:
                raise BadInput(
                    f"method.{field} is {named}, which does not go with method.depths = lcd; "
                    f"choose one of {listed(able)}"
                )

    def start(self, task: Task, rng: np.random.Generator) -> SpineState:
        state = super().start(task, rng)
        if isinstance(self.depths, AllBlocks):
            return state
        return DepthSpineState(**vars(state), times={}, depths={}, planned={})

    def round(self, state: SpineState, fleet: Fleet) -> SpineState:
        if isinstance(state, DepthSpineState):
            most = {profile.id: state.layout.layers for profile in fleet.devices}
            state = replace(
                state, planned=self._planner(state).plan(state.times, state.depths, most).depths
            )
        state = replace(state, head=prepared_head(self, state, fleet))
        return super().round(state, fleet)

    def _knows_units(self, state: SpineState, device: DeviceId) -> bool:
        """A new device prunes by the fleet's scores, if these are shared."""
        shared = self.global_importance_weight > 0 and state.scores is not None
        return shared or super()._knows_units(state, device)

    def _order(self, state: SpineState, device: DeviceId, plan: Plan) -> SpineOrder:
        shared = self.global_importance_weight > 0 and state.scores is not None
        order = replace(
            super()._order(state, device, plan),
            scores=on_wire(state.scores) if shared else None,
            global_importance_weight=self.global_importance_weight,
        )
        if not isinstance(state, DepthSpineState):
            return order
        layers = state.layout.layers
        lowest = layers - state.planned.get(device, layers)
        return DepthSpineOrder(**vars(order), lowest=lowest)

    # --- depth, which is independent of pruning ---

    def _state_after(
        self,
        state: SpineState,
        fleet: Fleet,
        plans: dict[DeviceId, Plan],
        replies: Sequence[Reply[SpineResult]],
    ) -> SpineState:
        after = super()._state_after(state, fleet, plans, replies)
        if not isinstance(after, DepthSpineState):
            return after
        times, depths, layers = dict(after.times), dict(after.depths), after.layout.layers
        full_bytes = self._planner(after).traffic[-1]
        for reply in replies:
            depth = depths[reply.device] = layers - reply.order.lowest
            times[reply.device] = timed(
                times.get(reply.device),
                reply.cost,
                depth=depth,
                layers=layers,
                full_bytes=full_bytes,
                discount=self.depths.discount,
            )
        fleet.note(depths={reply.device: depths[reply.device] for reply in replies})
        return replace(after, times=times, depths=depths)

    def _planner(self, state: SpineState) -> DepthPlanner:
        """Times count as those of the unpruned model at the largest rank, with forgetting: what
        pruning saves shows in later reports.
        """
        how, layers, rank = self.depths, state.layout.layers, self.ranks[-1]
        return DepthPlanner(
            rule=how.rule,
            ranks=(rank,) * layers,
            traffic=depth_traffic(state.layout, rank, state.head, all_down=True),
            least=how.least,
            coverage=how.coverage,
            fixed=how.fixed or layers,
        )
