"""MergeSFL's batches regulated again within a round, from the times that the round's own exchanges took. Ours.

A device's link and pace differ from those of the rounds before, by which a round is planned. After 1, 2, 4, 8 and so on
iterations all that were heard so far say how long the next ones will take; `planning/within.py` has the arithmetic.
Texts are of unequal length, so a few rows take now more, now less; their batches are then as many tokens as there is time
for, not as many rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fedspine.device import DeviceId
from fedspine.fleet import Cost
from fedspine.planning.split_plan import Goal, SplitLimits, planned_again
from fedspine.planning.within import fitted
from fedspine.split.batches import Budget
from fedspine.split.device import Resized, Step
from fedspine.split.rounds import Progress
from fedspine.split.trained import Optimising

USUAL_ROWS = 8  # as which the fleet's bytes per row count beside a device's own
SHORTEST = 1e-9  # seconds of an exchange, so that none is free


@dataclass(frozen=True)
class Paces:
    """Seconds of an iteration: `fixed`, and those of a row of each device; and how many bytes such a row takes."""

    fixed: float
    cost: Float[np.ndarray, " devices"]
    row_bytes: Float[np.ndarray, " devices"]  # both ways, with its part of what else an exchange sends


@dataclass(frozen=True)
class Regulating:
    """A round's plan as it may be made again: one entry for each device chosen."""

    devices: Sequence[DeviceId]
    labels: Float[np.ndarray, "devices classes"]
    reference: Float[np.ndarray, " classes"]
    most: Int[np.ndarray, " devices"]
    limits: SplitLimits
    tune: bool
    fixed: float  # seconds of an exchange beside its rows', as known before the round
    optimising: Callable[[int], Optimising]  # for a batch of so many rows
    # texts: rows that data and memory allow beyond `most`, where they are short; None: batches of rows, not of tokens
    room: Int[np.ndarray, " devices"] | None = None
    token_bytes: float = 0.0  # of the features of one token

    def __call__(
        self, done: int, progress: Mapping[DeviceId, Progress], told: Mapping[DeviceId, Step]
    ) -> Mapping[DeviceId, Resized] | None:
        """What devices are told after `done` iterations: their steps, and the batches that follow; None: as before."""
        if done & (done - 1):
            return None
        devices = [device for device in self.devices if device in told]
        places = [self.devices.index(device) for device in devices]
        found = paces([progress[device] for device in devices], self.fixed)
        goal = Goal(
            cost=found.cost,
            labels=self.labels[places],
            reference=self.reference,
            most=self.most[places],
            limits=self.limits,
            fixed=found.fixed,
        )
        rows = planned_again(goal, tune=self.tune)
        batches: list[int | Budget] = rows.tolist()
        if self.room is not None:
            headers = np.array([_header(progress[device], self.token_bytes) for device in devices])
            batches = self._budgets(rows, goal.seconds(rows).max(), found, headers, self.room[places])
        return {
            device: Resized(step=told[device], batch=batch, optimising=self._changed(progress[device].batch, own))
            for device, batch, own in zip(devices, batches, rows.tolist(), strict=True)
        }

    def _budgets(
        self, rows: np.ndarray, longest: float, found: Paces, headers: np.ndarray, room: np.ndarray
    ) -> list[Budget]:
        """Tokens for the time of the longest iteration: those of `rows`, and of less than a row more."""
        exact = np.clip((longest - found.fixed) / found.cost, rows, rows + 1)
        tokens = np.maximum((exact * found.row_bytes - headers) / (2 * self.token_bytes), 1)
        tokens *= min(1.0, self.limits.budget_bytes / self.token_bytes / tokens.sum())
        return [Budget(tokens=int(own), rows=int(most)) for own, most in zip(tokens, room, strict=True)]

    def _changed(self, before: int, now: int) -> Optimising | None:
        """How bottoms are trained from now on, None where that stays as it is."""
        optimising = self.optimising(now)
        same = optimising.learning_rate == self.optimising(before).learning_rate
        return None if same else optimising


def paces(progress: Sequence[Progress], fixed: float, *, ended: bool = False) -> Paces:
    """The paces that a round's exchanges show so far, or over the whole of it; one entry for each device.

    Exchanges are compared by their bytes, which the server knows and which count a text's tokens. The first one has
    weights among them and no backward pass: it counts only until there are others. `fixed` as `fitted` has it.
    """
    inner = [own.costs[1:-1] if ended else own.costs[1:] for own in progress]
    if all(inner):
        loads = [_bytes(costs) for costs in inner]
        sent = np.array([load.sum() for load in loads])
        rows = np.array([len(load) * np.mean(own.rows) for load, own in zip(loads, progress, strict=True)])
        per_row = (sent + USUAL_ROWS * sent.sum() / rows.sum()) / (rows + USUAL_ROWS)
        fixed, each = fitted(loads, [_seconds(costs) for costs in inner], fixed)
        return Paces(fixed, each * per_row, per_row)
    first = [own.costs[:1] for own in progress]
    _, each = fitted([_bytes(costs) for costs in first], [_seconds(costs) for costs in first])
    per_row = np.array([2 * own.costs[0].bytes_up / own.rows[0] for own in progress])  # back and forth
    return Paces(fixed, each * per_row, per_row)


def _header(progress: Progress, token_bytes: float) -> float:
    """Bytes of an exchange both ways that are no features: the mean of those heard so far.

    An exchange sends the gradient of one batch and the features of the next; the first one no gradient.
    """
    tokens = np.array(progress.tokens)
    if len(tokens) == 1:
        return max(0.0, 2 * (progress.costs[0].bytes_up - token_bytes * tokens[0]))
    return max(0.0, float(np.mean(_bytes(progress.costs[1:]) - token_bytes * (tokens[1:] + tokens[:-1]))))


def _bytes(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.array([cost.bytes_down + cost.bytes_up for cost in costs], float)


def _seconds(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.maximum([cost.seconds for cost in costs], SHORTEST)
