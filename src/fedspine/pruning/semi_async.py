"""Rounds that end at a quorum: orders whose replies are awaited, and how a late reply counts; no
method.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil

from fedspine.control.plan import Plan
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Idle, Reply
from fedspine.core.message import Tensors, message
from fedspine.pruning.device import SpineOrder, SpineResult, prune_and_tune

GIVEN_UP = 3  # rounds after which a late reply is not waited for, and its device may be asked again


@message
class PendingOrder:
    """An order whose reply has not come."""

    order: SpineOrder
    rank: int

    @property
    def plan(self) -> Plan:
        """What is left of its plan when the reply is late: nobody is credited for it."""
        return Plan(self.order.sparsity, self.rank, action=None, progress=0.0)


def awaited(pending: Mapping[DeviceId, PendingOrder], round: int) -> dict[DeviceId, PendingOrder]:
    """The orders whose late replies may still come; their devices are busy."""
    return {id: each for id, each in pending.items() if round - each.order.round < GIVEN_UP}


def collect(
    fleet: Fleet,
    sent: Mapping[DeviceId, PendingOrder],
    asked: Mapping[DeviceId, PendingOrder],
    quorum: float,
) -> list[Reply[SpineResult]]:
    """Replies of a share `quorum` of those asked now (of all, where nobody is), and the others'
    that came meanwhile.
    """
    orders = {id: each.order for id, each in asked.items()}
    if quorum == 1:
        return fleet.ask(prune_and_tune, orders)
    fleet.send(prune_and_tune, orders)
    came: list[Reply[SpineResult]] = []
    counted = asked or sent
    with suppress(Idle):  # too many were lost
        while sum(reply.device in counted for reply in came) < ceil(quorum * len(counted)):
            reply = fleet.next()
            if reply.device in sent and reply.value.round == sent[reply.device].order.round:
                came.append(reply)
            else:
                fleet.note(device=reply.device, left_out="its reply came too late")
    return came


def still_pending(
    sent: Mapping[DeviceId, PendingOrder], came: Sequence[Reply[SpineResult]], quorum: float
) -> dict[DeviceId, PendingOrder]:
    """The orders without a reply, which may still come; a round that waits for all knows them to be
    lost.
    """
    replied = {reply.device for reply in came}
    return {id: each for id, each in sent.items() if id not in replied} if quorum < 1 else {}


def on_todays_head(
    head: Tensors, round: int, order: SpineOrder, reply: Reply[SpineResult]
) -> Reply[SpineResult]:
    """The reply; of a late one the head is what the device changed, on today's `head`."""
    if order.round == round:
        return reply
    moved = {
        name: head[name] + came.float() - order.head[name].float()
        for name, came in reply.value.head.items()
    }
    return replace(reply, value=replace(reply.value, head=moved))
