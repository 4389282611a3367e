"""MergeSFL's batches regulated again within a round, from the times that the round's own exchanges took. Ours.

A device's link and pace differ from those of the rounds before, by which a round is planned. After 1, 2, 4, 8 and so on
iterations all that were heard so far say how long the next ones will take; `planning/within.py` has the arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fedspine.device import DeviceId
from fedspine.fleet import Cost
from fedspine.planning.split_plan import Goal, SplitLimits, planned_again
from fedspine.planning.within import fitted
from fedspine.split.device import Resized, Step
from fedspine.split.rounds import Progress
from fedspine.split.trained import Optimising

USUAL_ROWS = 8  # as which the fleet's bytes per row count beside a device's own
SHORTEST = 1e-9  # seconds of an exchange, so that none is free


@dataclass(frozen=True)
class Paces:
    """Seconds of an iteration: `fixed`, and those of a row of each device."""

    fixed: float
    cost: Float[np.ndarray, " devices"]


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
        return {
            device: Resized(step=told[device], batch=own, optimising=self._changed(progress[device].batch, own))
            for device, own in zip(devices, rows.tolist(), strict=True)
        }

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
        return Paces(fixed, each * per_row)
    first = [own.costs[:1] for own in progress]
    _, each = fitted([_bytes(costs) for costs in first], [_seconds(costs) for costs in first])
    back_and_forth = [2 * own.costs[0].bytes_up / own.rows[0] for own in progress]
    return Paces(fixed, each * np.array(back_and_forth))


def _bytes(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.array([cost.bytes_down + cost.bytes_up for cost in costs], float)


def _seconds(costs: Sequence[Cost]) -> Float[np.ndarray, " exchanges"]:
    return np.maximum([cost.seconds for cost in costs], SHORTEST)
