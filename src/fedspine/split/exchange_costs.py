"""Time and bytes of a row, estimated from a split round's exchanges. Ours.

Seconds of an exchange = fixed + each * bytes, with one fixed part for the fleet
(`control/batch_timing.py` fits it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedspine.control.batch_timing import fitted
from fedspine.core.fleet import Cost
from fedspine.split.protocol import Progress

USUAL_ROWS = 8  # weight, in rows, of the fleet's bytes per row beside a device's own
SHORTEST = 1e-9  # seconds of an exchange, so that none is free


@dataclass(frozen=True)
class RowCosts:
    """What an iteration costs: `fixed` seconds, and the seconds and the bytes of each device's
    rows.
    """

    fixed: float
    cost: Float[np.ndarray, " devices"]
    # both ways, with a row's part of what else an exchange sends
    row_bytes: Float[np.ndarray, " devices"]


def row_costs(progress: Sequence[Progress], fixed: float, *, ended: bool = False) -> RowCosts:
    """The cost of rows, from a round's exchanges so far, or from all of them once it has `ended`.

    Exchanges are compared by their bytes, which the server knows and which count a text's tokens.
    The first exchange carries weights and has no backward pass, so it counts only if a device has
    no other. `fixed` is as in `fitted`.
    """
    inner = [own.costs[1:-1] if ended else own.costs[1:] for own in progress]
    received = [costs or own.costs[:1] for costs, own in zip(inner, progress, strict=True)]
    loads, seconds = (
        [exchange_bytes(costs) for costs in received],
        [_seconds(costs) for costs in received],
    )
    row_bytes = _row_bytes(progress, inner)
    if any(inner):
        fixed, each = fitted(loads, seconds, fixed)
    else:
        _, each = fitted(loads, seconds)
    return RowCosts(fixed, each * row_bytes, row_bytes)


def _row_bytes(
    progress: Sequence[Progress], inner: Sequence[Sequence[Cost]]
) -> Float[np.ndarray, " devices"]:
    """Bytes of a row of each device both ways, from its exchanges without weights.

    The fewer rows they had, the closer it is to the fleet's mean.
    """
    exchanges = np.maximum([len(costs) for costs in inner], 1)
    rows = exchanges * np.array([np.mean(own.rows) for own in progress])
    # the first exchange has features only on the way up; their gradient is as large
    pairs = zip(inner, progress, strict=True)
    sent = np.array(
        [
            exchange_bytes(costs).sum() if costs else 2 * own.costs[0].bytes_up
            for costs, own in pairs
        ]
    )
    if not any(inner):
        return sent / rows
    return (sent + USUAL_ROWS * sent.sum() / rows.sum()) / (rows + USUAL_ROWS)


def exchange_bytes(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.array([cost.bytes_down + cost.bytes_up for cost in costs], float)


def _seconds(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.maximum([cost.seconds for cost in costs], SHORTEST)
