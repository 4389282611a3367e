"""Rounds that do not wait for everybody: orders under way, and what becomes of replies that come later; no method."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import ceil

from fedspine.control.plan import Plan
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet, Idle, Reply
from fedspine.core.message import Tensors, message
from fedspine.pruning.device import SpineOrder, SpineResult, prune_and_tune

GIVEN_UP = 3  # rounds after which a late reply is not waited for, and its device may be asked again


@message
class UnderWay:
    """An order whose reply has not come."""

    order: SpineOrder
    rank: int


def hoped_for(late: Mapping[DeviceId, UnderWay], round: int) -> dict[DeviceId, UnderWay]:
    """The late orders whose replies may still come; their devices are busy."""
    return {id: each for id, each in late.items() if round - each.order.round < GIVEN_UP}


def gathered(
    fleet: Fleet,
    sent: Mapping[DeviceId, UnderWay],
    asked: Mapping[DeviceId, UnderWay],
    enough: float,
) -> list[Reply[SpineResult]]:
    """Replies of a share `enough` of those asked now (of all, where nobody is), and what came of the others in `sent`."""
    orders = {id: each.order for id, each in asked.items()}
    if enough == 1:
        return fleet.ask(prune_and_tune, orders)
    fleet.send(prune_and_tune, orders)
    came: list[Reply[SpineResult]] = []
    counted = asked or sent
    with suppress(Idle):  # too many were lost
        while sum(reply.device in counted for reply in came) < ceil(enough * len(counted)):
            reply = fleet.next()
            if reply.device in sent and reply.value.round == sent[reply.device].order.round:
                came.append(reply)
            else:
                fleet.note(device=reply.device, left_out="its reply came too late")
    return came


def still_late(
    sent: Mapping[DeviceId, UnderWay], came: Sequence[Reply[SpineResult]], enough: float
) -> dict[DeviceId, UnderWay]:
    """The orders without a reply, which may still come; a round that waits for all knows them to be lost."""
    replied = {reply.device for reply in came}
    return {id: each for id, each in sent.items() if id not in replied} if enough < 1 else {}


def head_today(head: Tensors, round: int, order: SpineOrder, result: SpineResult) -> Tensors:
    """A device's head; of a late one what it changed, on today's `head`."""
    if order.round == round:
        return result.head
    return {
        name: head[name] + came.float() - order.head[name].float()
        for name, came in result.head.items()
    }


def late_plan(late: UnderWay) -> Plan:
    """What is left of a plan when its reply is late: nobody is credited for it."""
    return Plan(reached=late.order.reached, rank=late.rank, action=None, progress=0.0)
