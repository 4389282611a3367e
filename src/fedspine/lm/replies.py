"""What becomes of the adapters that devices send back, for methods that average factors."""

from collections.abc import Callable, Sequence
from typing import Any

from fedspine.core.fleet import Reply
from fedspine.core.message import Tensors
from fedspine.core.tensors import single
from fedspine.lm.aggregate import Contribution, average_factors, bounded
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full


def average_replies(
    fleet: Any,  # a `Fleet`, which the checks of this package's annotations cannot check
    layout: PrunableLayout,
    before: Tensors,
    replies: Sequence[Reply[Any]],
    weight: Callable[[Reply[Any]], float] = lambda reply: float(reply.weight),
) -> Tensors:
    """Every site's factors averaged over the devices that sent them, as `fleet.aggregation` and
    `fleet.server` say; a site that nobody trained keeps those of `before`. So do the directions
    that a device of a lower rank did not train, as far as it counts.
    """
    parts = [
        Contribution(
            single(reply.order.adapter),
            single(reply.value.adapter),
            full(layout),
            weight(reply),
            late=reply.late > 0,
        )
        for reply in replies
    ]
    parts = bounded(fleet, layout, replies, parts)
    mean = average_factors(layout, before, parts, fleet.aggregation, padding="before")
    return fleet.server.step("adapter", before, mean)
