"""What the server knows of the devices of a split model: each device's seconds per row, and the
number of rounds in which it took part.

MergeSFL (Liao et al. 2024, arXiv:2311.13348), Eq. 5, 6 and 13, as reconstructed.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from fedspine.core.message import message


@message
class WorkerState:
    """A device's speed, and the number of rounds in which it took part.

    >>> WorkerState(compute_seconds=0.2, transfer_seconds=0.1).cost_seconds > 0.29
    True
    """

    compute_seconds: float  # mu: of a row forward and backward
    transfer_seconds: float = 0.0  # beta: of a row's features up and their gradient down
    rounds: int = 0  # K: in which it has taken part

    @property
    def cost_seconds(self) -> float:
        """Seconds that one row takes."""
        return self.compute_seconds + self.transfer_seconds


def observed(
    before: WorkerState | None,
    *,
    compute_seconds: float,
    transfer_seconds: float = 0.0,
    keep: float = 0.8,
) -> WorkerState:
    """The state after one more measurement, in seconds per row: moving averages, Eq. 5 and 6.

    The first measurement starts them. If only the sum of both times is known, pass it as
    `compute_seconds`. Raises ValueError for times that are negative, not finite, or both 0.

    >>> first = observed(None, compute_seconds=1.0)
    >>> round(observed(first, compute_seconds=2.0).compute_seconds, 9)
    1.2
    """
    if not (
        0 <= compute_seconds < np.inf
        and 0 <= transfer_seconds < np.inf
        and compute_seconds + transfer_seconds
    ):
        raise ValueError(
            "finite seconds per row were expected, none below "
            f"0, got {compute_seconds} and {transfer_seconds}"
        )
    if before is None:
        return WorkerState(compute_seconds=compute_seconds, transfer_seconds=transfer_seconds)
    return replace(
        before,
        compute_seconds=keep * before.compute_seconds + (1 - keep) * compute_seconds,
        transfer_seconds=keep * before.transfer_seconds + (1 - keep) * transfer_seconds,
    )


def took_part(state: WorkerState) -> WorkerState:
    """The state after one more round that the device completed."""
    return replace(state, rounds=state.rounds + 1)


def costs(states: Sequence[WorkerState | None]) -> Float[np.ndarray, " workers"]:
    """Seconds per row of each worker, [workers]; the median of the others, or 1, for those not
    measured yet.

    >>> costs([WorkerState(compute_seconds=3.0), None]).tolist()
    [3.0, 3.0]
    """
    known = [state.cost_seconds for state in states if state is not None]
    usual = float(np.median(known)) if known else 1.0
    return np.array([usual if state is None else state.cost_seconds for state in states])


def priorities(rounds: Int[np.ndarray, " workers"]) -> Float[np.ndarray, " workers"]:
    """The priority of each worker from the rounds K_i in which it took part, Eq. 13: the sum of
    K + 1 over all workers, divided by K_i + 1.

    >>> priorities(np.array([0, 1, 3])).tolist()
    [7.0, 3.5, 1.75]
    """
    turns = np.asarray(rounds, float) + 1
    return turns.sum() / turns
