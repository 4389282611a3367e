"""fedspine-plus: FedSpine with plans for a deadline, shared importance, a quorum and a head start.

A method of our own on the frame of FedSpine (Yao et al. 2025, arXiv:2501.02438):
docs/methods/fedspine_plus.md.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedspine.control.controllers import Controller, Deadline
from fedspine.control.plan import Plan
from fedspine.core.device import DeviceId
from fedspine.core.errors import check_ranges
from fedspine.core.fleet import Fleet
from fedspine.core.message import message
from fedspine.core.method import method, usable
from fedspine.core.task import Task
from fedspine.lm.base import Model
from fedspine.lm.importance import on_wire
from fedspine.lm.importance_sources import Blend, Importance
from fedspine.methods.fedspine import FedSpine, SpineState, no_memory
from fedspine.pruning.device import SpineOrder
from fedspine.pruning.head_start import Start, check_head_start, started
from fedspine.pruning.semi_async import (
    PendingOrder,
    awaited,
    collect,
    on_todays_head,
    still_pending,
)


@message
class PlusState:
    spine: SpineState
    pending: dict[str, PendingOrder]  # orders that rounds did not wait for, by device

    @property
    def round(self) -> int:
        return self.spine.round


@method("fedspine-plus")
@dataclass(frozen=True)
class FedSpinePlus(FedSpine):
    """FedSpine with a deadline for all devices, shared importance, a quorum, and a head from class
    means.

    >>> from fedspine import FedSpinePlus, Recipe
    >>> Recipe(method=FedSpinePlus(quorum=1.0), rounds=20).method.controller.name
    'deadline'
    """

    controller: Controller = Deadline()
    importance: Importance = Blend()
    # of the fleet's average importance in what a device drops
    global_importance_weight: float = 0.9
    head_start: Start = "auto"  # what the task head begins as
    quorum: float = 0.7  # share of a round's replies that it waits for

    @classmethod
    def toy(cls) -> Self:
        """FedSpine's; the few rounds of a toy task wait for all devices."""
        return replace(super().toy(), quorum=1.0)

    def check(self, task: Task) -> None:
        super().check(task)
        check_ranges(self, {"global_importance_weight": (0, 1), "quorum": (0.01, 1)})
        check_head_start(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> PlusState:
        return PlusState(spine=super().start(task, rng), pending={})

    def round(self, state: PlusState, fleet: Fleet) -> PlusState:
        spine = state.spine
        if spine.round == 0:
            rows = self.steps * self.batch
            spine = replace(spine, head=started(self, spine.head, fleet, rows=rows))
        late = awaited(state.pending, spine.round)
        plans = self._plans(spine, fleet, busy=late)
        asked = {
            id: PendingOrder(order=self._order(spine, id, plan), rank=plan.rank)
            for id, plan in plans.items()
        }
        sent = late | asked
        if not sent:
            raise no_memory()
        came = collect(fleet, sent, asked, self.quorum)
        replies = [
            on_todays_head(spine.head, spine.round, sent[reply.device].order, reply)
            for reply in usable(came, fleet)
        ]
        plans = {id: each.plan for id, each in late.items()} | plans
        orders = {id: each.order for id, each in sent.items()}
        return PlusState(
            spine=self._merged(spine, fleet, plans, orders, replies),
            pending=still_pending(sent, came, self.quorum),
        )

    def deploy(self, state: PlusState, device: DeviceId | None = None) -> Model:
        """As FedSpine's: the device's own structure and the common adapter, or the fleet's
        structure for None.
        """
        return super().deploy(state.spine, device)

    def unpruned(self, state: PlusState) -> Model:
        return super().unpruned(state.spine)

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
