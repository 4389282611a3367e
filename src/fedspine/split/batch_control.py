"""Batch sizes of a split round, replanned within the round from the times of its own exchanges: the
part `within-round`. Ours.

A round is planned from the rounds before it, but a link's speed changes from round to round. So
batches are replanned after 1, 2, 4, 8 and so on iterations, and when a device joins late.
`control/batch_timing.py` has the arithmetic.

Texts differ in length, so the same number of rows may take more or less time. So a batch of texts
is a number of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from fedspine.control.split_plan import Goal, planned_again
from fedspine.core.device import DeviceId
from fedspine.split.batches import Budget
from fedspine.split.exchange_costs import RowCosts, exchange_bytes, row_costs
from fedspine.split.messages import Resized, Step
from fedspine.split.protocol import Progress
from fedspine.split.trainable_half import Optimising

FIRST = 4  # divides a round's first batches: few rows are enough to measure its links
SECOND = 2  # divides the second ones, which rest on one exchange of weights and features
PROBED = 8  # the fewest iterations of a round in which measuring its links pays


@dataclass(frozen=True)
class BatchControl:
    """The data from which a round's batches are planned; one entry for each device chosen."""

    devices: Sequence[DeviceId]
    goal: Goal  # of the plan; its costs are those known before the round
    tune: bool
    steps: int  # of the round
    optimising: Callable[[int], Optimising]  # for a batch of so many rows
    # texts: the most rows that data and memory allow; None: batches of rows, not of tokens
    room: Int[np.ndarray, " devices"] | None = None
    token_bytes: float = 0.0  # of the features of one token

    def __call__(
        self, done: int, progress: Mapping[DeviceId, Progress], steps: Mapping[DeviceId, Step]
    ) -> Mapping[DeviceId, Resized] | None:
        """The steps with new batch sizes after `done` iterations; None where batches stay as they
        are.
        """
        joined = done > 1 and any(len(progress[device].rows) == 1 for device in steps)
        if done & (done - 1) and not joined:
            return None
        devices = [device for device in self.devices if device in steps]
        places = [self.devices.index(device) for device in devices]
        found = row_costs([progress[device] for device in devices], self.goal.fixed)
        goal = replace(
            self.goal,
            cost=found.cost,
            labels=self.goal.labels[places],
            most=self.goal.most[places],
            fixed=found.fixed,
        )
        rows = planned_again(goal, tune=self.tune)
        if done == 1:
            rows = self._reduced_rows(rows, SECOND)
        batches: list[int | Budget] = rows.tolist()
        if self.room is not None:
            headers = np.array(
                [_header_bytes(progress[device], self.token_bytes) for device in devices]
            )
            batches = self._budgets(
                rows, goal.seconds(rows).max(), found, headers, self.room[places]
            )
        return {
            device: Resized(
                step=steps[device],
                batch=batch,
                optimising=self._new_optimising(progress[device].batch, own),
            )
            for device, batch, own in zip(devices, batches, rows.tolist(), strict=True)
        }

    def first(self, rows: Int[np.ndarray, " devices"]) -> Int[np.ndarray, " devices"]:
        """The first batches of a round for which these are planned."""
        return self._reduced_rows(rows, FIRST)

    def _reduced_rows(self, rows: np.ndarray, divisor: int) -> np.ndarray:
        return np.maximum(rows // divisor, 1) if self.steps >= PROBED else rows

    def _budgets(
        self,
        rows: np.ndarray,
        longest: float,
        found: RowCosts,
        headers: np.ndarray,
        room: np.ndarray,
    ) -> list[Budget]:
        """Tokens for the time of the longest iteration: those of `rows`, and of less than a row
        more.
        """
        exact = np.clip((longest - found.fixed) / found.cost, rows, rows + 1)
        tokens = np.maximum((exact * found.row_bytes - headers) / (2 * self.token_bytes), 1)
        tokens *= min(1.0, self.goal.limits.budget_bytes / self.token_bytes / tokens.sum())
        return [
            Budget(tokens=int(own), rows=int(most)) for own, most in zip(tokens, room, strict=True)
        ]

    def _new_optimising(self, before: int, now: int) -> Optimising | None:
        """How client models are trained from now on; None where that does not change."""
        optimising = self.optimising(now)
        same = optimising.learning_rate == self.optimising(before).learning_rate
        return None if same else optimising


def _header_bytes(progress: Progress, token_bytes: float) -> float:
    """Bytes of an exchange, both ways, other than features: the mean of the exchanges so far.

    An exchange sends the gradient of one batch and the features of the next; the first one has no
    gradient.
    """
    tokens = np.array(progress.tokens)
    if len(tokens) == 1:
        return max(0.0, 2 * (progress.costs[0].bytes_up - token_bytes * tokens[0]))
    return max(
        0.0,
        float(
            np.mean(exchange_bytes(progress.costs[1:]) - token_bytes * (tokens[1:] + tokens[:-1]))
        ),
    )
