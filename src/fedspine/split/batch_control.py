"""Batch sizes of mergesfl-plus, planned again within a round from the times of the round's own
exchanges. Ours.

A round is planned from the rounds before it, but a device's link has another speed in each round.
So batches are planned again after 1, 2, 4, 8 and so on iterations, and when a device joins late.
The same times say when a device has to leave to finish with the others. `control/batch_timing.py`
has the arithmetic.

Texts differ in length, so a few rows may take much or little time. Batches of texts are therefore
so many tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from jaxtyping import Float, Int

from fedspine.control.batch_timing import early, fitted
from fedspine.control.split_plan import Goal, planned_again
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Cost
from fedspine.split.batches import Budget
from fedspine.split.messages import Resized, Step
from fedspine.split.protocol import Progress, Staggered
from fedspine.split.trainable_half import Optimising

USUAL_ROWS = 8  # weight, in rows, of the fleet's bytes per row beside a device's own
FIRST = 4  # divides a round's first batches: few rows are enough to measure its links
SECOND = 2  # divides the second ones, which rest on one exchange of weights and features
PROBED = 8  # the fewest iterations of a round in which measuring its links pays
QUORUM = 0.5  # share of the devices with which a round starts and ends, if others join late
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


@dataclass(frozen=True)
class BatchControl:
    """What a round's batches are planned from; one entry for each device chosen."""

    devices: Sequence[DeviceId]
    goal: Goal  # of the plan; its costs are those known before the round
    tune: bool
    steps: int  # of the round
    weight_bytes: int  # of the client model
    late: bool  # whether devices may begin and end at their own times
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
            rows = self._part(rows, SECOND)
        batches: list[int | Budget] = rows.tolist()
        if self.room is not None:
            headers = np.array([_header(progress[device], self.token_bytes) for device in devices])
            batches = self._budgets(
                rows, goal.seconds(rows).max(), found, headers, self.room[places]
            )
        return {
            device: Resized(
                step=steps[device],
                batch=batch,
                optimising=self._changed(progress[device].batch, own),
            )
            for device, batch, own in zip(devices, batches, rows.tolist(), strict=True)
        }

    def first(self, rows: Int[np.ndarray, " devices"]) -> Int[np.ndarray, " devices"]:
        """The first batches of a round for which these are planned."""
        return self._part(rows, FIRST)

    def _part(self, rows: np.ndarray, divisor: int) -> np.ndarray:
        return np.maximum(rows // divisor, 1) if self.steps >= PROBED else rows

    @property
    def staggered(self) -> Staggered | None:
        """How devices begin and end at their own times, if they may."""
        return Staggered(QUORUM, self._leaving) if self.late and self.steps >= PROBED else None

    def _leaving(self, done: int, progress: Mapping[DeviceId, Progress]) -> Collection[DeviceId]:
        """Devices that end the round after `done` iterations, since their links need long for the
        client model.
        """
        if 2 * done < self.steps:
            return ()
        own = list(progress.values())
        found = row_costs(own, self.goal.fixed)
        rows = np.array([each.batch for each in own])
        # the last gradient goes down, the client model up
        ends = found.fixed + found.cost * (rows / 2 + self.weight_bytes / found.row_bytes)
        before = early(
            ends, max(each.costs[-1].seconds for each in own), ceil(QUORUM * len(self.devices))
        )
        return [
            device
            for device, steps in zip(progress, before, strict=True)
            if steps >= self.steps - done
        ]

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

    def _changed(self, before: int, now: int) -> Optimising | None:
        """How client models are trained from now on; None where that does not change."""
        optimising = self.optimising(now)
        same = optimising.learning_rate == self.optimising(before).learning_rate
        return None if same else optimising


def row_costs(progress: Sequence[Progress], fixed: float, *, ended: bool = False) -> RowCosts:
    """What rows cost by a round's exchanges so far, or by all of them once it has `ended`.

    Exchanges are compared by their bytes, which the server knows and which count a text's tokens.
    The first exchange carries weights and has no backward pass, so it counts only where a device
    has no other. `fixed` is as in `fitted`.
    """
    inner = [own.costs[1:-1] if ended else own.costs[1:] for own in progress]
    received = [costs or own.costs[:1] for costs, own in zip(inner, progress, strict=True)]
    loads, seconds = [_bytes(costs) for costs in received], [_seconds(costs) for costs in received]
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

    The fewer rows these had, the nearer it is to the fleet's mean.
    """
    exchanges = np.maximum([len(costs) for costs in inner], 1)
    rows = exchanges * np.array([np.mean(own.rows) for own in progress])
    # of the first exchange only what went up were features; their gradient is as large
    pairs = zip(inner, progress, strict=True)
    sent = np.array(
        [_bytes(costs).sum() if costs else 2 * own.costs[0].bytes_up for costs, own in pairs]
    )
    if not any(inner):
        return sent / rows
    return (sent + USUAL_ROWS * sent.sum() / rows.sum()) / (rows + USUAL_ROWS)


def _header(progress: Progress, token_bytes: float) -> float:
    """Bytes of an exchange both ways that are no features: the mean of the exchanges so far.

    An exchange sends the gradient of one batch and the features of the next; the first one no
    gradient.
    """
    tokens = np.array(progress.tokens)
    if len(tokens) == 1:
        return max(0.0, 2 * (progress.costs[0].bytes_up - token_bytes * tokens[0]))
    return max(
        0.0, float(np.mean(_bytes(progress.costs[1:]) - token_bytes * (tokens[1:] + tokens[:-1])))
    )


def _bytes(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.array([cost.bytes_down + cost.bytes_up for cost in costs], float)


def _seconds(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.maximum([cost.seconds for cost in costs], SHORTEST)
