"""A round of a composed split method: its plan, its training, and the state after it.

`plan_round` turns the settings and what is known of devices into a plan with the batches; `train`
runs it with the method's server step, once or several times per round; `next_state` is the state
after the round.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fedspine.control.labels import divergence, merged, reference
from fedspine.control.split_parts import (
    Batches,
    Equal,
    Everyone,
    LeastWaiting,
    Regulated,
    WithinRound,
    control_of,
    kept_share,
    limits_of,
    measures_speed,
)
from fedspine.control.split_plan import Candidates, Goal, plan_split
from fedspine.control.worker_state import costs
from fedspine.core.device import DeviceId
from fedspine.core.fleet import AllLost, Fleet, weights_of
from fedspine.core.logit_adjustment import LabelSkew
from fedspine.core.message import Tensors
from fedspine.split.averaging import mean_after
from fedspine.split.baseline import (
    RoundSetup,
    SplitState,
    batch_caps,
    note_devices,
    set_up_round,
    updated_workers,
    weighted_mean,
)
from fedspine.split.batch_control import BatchControl
from fedspine.split.composed import ComposedTraining, Known, asks_labels
from fedspine.split.exchange_costs import row_costs
from fedspine.split.joining import AtOnce, Late, LateJoining
from fedspine.split.label_distribution import known_labels, logit_adjustments
from fedspine.split.messages import Begin
from fedspine.split.protocol import RoundResult, run_round
from fedspine.split.server import LogitAdjustments, ServerStep
from fedspine.split.trainable_half import Optimising
from fedspine.split.wire import row_bytes

PLANNING = 601  # the purpose of a random stream
SHORT = 2  # times `batch`: the largest batch of short texts, in rows

S = TypeVar("S", bound=SplitState)
Labels = Mapping[DeviceId, np.ndarray]


@dataclass(frozen=True)
class RoundPlan:
    """The plan of a round."""

    now: RoundSetup
    labels: dict[DeviceId, np.ndarray]  # V_i of the known devices; empty if none was asked
    rows: dict[DeviceId, int]  # of each chosen device, per iteration
    optimising: Callable[[int], Optimising]  # of a client model, by the rows of its batches
    control: BatchControl | None  # replans batches within the round
    joining: LateJoining | None
    adjustments: LogitAdjustments

    @property
    def server_arguments(self) -> dict[str, Any]:
        """The arguments of a server step."""
        return {
            "split_model": self.now.split_model,
            "server_model": self.now.server_model,
            "optimising": self.now.optimising,
            "gradients": bool(self.now.client_model),
            "adjustments": self.adjustments,
        }

    def orders(
        self,
        steps: int,
        client_model: "Tensors | None" = None,
        devices: Collection[DeviceId] | None = None,
    ) -> dict[DeviceId, Begin]:
        """The first orders of a round of `steps` steps, for all chosen devices or for `devices`."""
        rows = {
            device: own for device, own in self.rows.items() if devices is None or device in devices
        }
        if self.control is not None:
            first = replace(self.control, steps=steps).first(np.array(list(rows.values())))
            rows = dict(zip(rows, first.tolist(), strict=True))
        return {
            device: replace(self.now.begin(own, client_model), optimising=self.optimising(own))
            for device, own in rows.items()
        }


def composed_round(
    method: ComposedTraining,
    state: S,
    fleet: Fleet,
    server_of: Callable[[RoundPlan], ServerStep],
) -> S:
    """One round with averages weighted by rows; without parts, it is SplitFed's.

    `server_of` makes the step that trains the server model in this round.
    """
    plan = plan_round(method, state, fleet)
    server = server_of(plan)
    result = train(plan, fleet, server, method.steps)
    note_round(fleet, result, plan.labels)
    stayed = weights_of(fleet, result.client_models)
    model = plan.now.split_model.join(
        weighted_mean(result.client_models, stayed), server.finish(stayed)
    )
    return next_state(method, plan, state, result, model)


def plan_round(
    method: ComposedTraining,
    state: SplitState,
    fleet: Fleet,
    *,
    labels: dict[DeviceId, np.ndarray] | None = None,
    optimising: Callable[[RoundSetup, int], Optimising] | None = None,
) -> RoundPlan:
    """The round's devices and batches, and how client models are trained.

    `labels` are used instead of asking the devices for theirs; `optimising` gives the optimiser
    settings of client models by the rows of their batches, instead of `client_lr_multiplier`.
    Raises AllLost if no device can take part.
    """
    now, known = set_up_round(method, state, fleet), Known.of(state)
    asked = labels is None and asks_labels(method)
    if asked:
        labels = known_labels(known.labels, fleet, classes=known.classes, longest=state.longest)
    own = {} if labels is None else labels

    def of_rows(rows: int) -> Optimising:
        return _client_optimising(method, now) if optimising is None else optimising(now, rows)

    within = isinstance(method.batches, WithinRound)
    most = SHORT * method.batch if within else method.batch
    room = batch_caps(fleet, now.split_model, most, state.longest)
    if labels is not None:
        room = _with_known_labels(room, labels)
    rows, control = _plan_batches(method, known, own, now, fleet, room, of_rows)
    return RoundPlan(
        now=now,
        labels=own,
        rows=rows,
        optimising=of_rows,
        control=control,
        joining=_late_joining(method, now, known, rows),
        adjustments=_adjustments(method, known, own) if asked else None,
    )


def train(
    plan: RoundPlan,
    fleet: Fleet,
    server: ServerStep,
    steps: int,
    *,
    seed: int | None = None,
    orders: Mapping[DeviceId, Begin] | None = None,
) -> RoundResult:
    """Train for `steps` steps, with the planned devices or with those in `orders`."""
    orders = plan.orders(steps) if orders is None else orders
    return run_round(
        fleet,
        orders,
        steps,
        server,
        plan.now.seed if seed is None else seed,
        resizing=plan.control and replace(plan.control, steps=steps),
        staggered=plan.joining and plan.joining.staggered(steps),
    )


def next_state(
    method: ComposedTraining, plan: RoundPlan, state: S, result: RoundResult, model: Any
) -> S:
    """The state after the round, with the speed of the devices that stayed to its end."""
    known, done = Known.of(state), state.round + 1
    cost, fixed = row_seconds(method, result), known.fixed_seconds
    if plan.control is not None:
        found = row_costs(list(result.progress.values()), fixed, ended=True)
        cost = dict(zip(result.progress, found.cost.tolist(), strict=True))
        fixed = found.fixed
    after = replace(
        known,
        labels=plan.labels,
        workers={**known.workers}
        | updated_workers(known.workers, cost, kept_share(method.batches)),
        fixed_seconds=fixed,
        mean=mean_after(method.averaging, plan.now.split_model, known.mean, model, done),
    )
    return after.put_into(replace(state, round=done, model=model))


def row_seconds(method: ComposedTraining, result: RoundResult) -> dict[DeviceId, float]:
    """Seconds per row of each device that stayed to the end.

    1 if no part uses speed: unused times would make the states of equal runs differ.
    """
    measured = measures_speed(method.selection, method.batches)
    return {device: own.row_seconds if measured else 1.0 for device, own in result.progress.items()}


def note_round(fleet: Fleet, result: RoundResult, labels: Labels) -> None:
    """Record each device's batch and loss; if labels are known, also the round's loss, and the KL
    divergence in nats of the merged rows' labels from the fleet's.
    """
    if not labels:
        return note_devices(fleet, result)
    counted = np.array(list(result.counted.values()))
    of_round = merged(counted, np.stack([labels[device] for device in result.progress]))
    everywhere = [labels[profile.id] for profile in fleet.devices if profile.id in labels]
    apart = float(divergence(of_round, reference(np.stack(everywhere))))
    note_devices(fleet, result)
    return fleet.note(loss=result.loss, stayed=len(result.client_models), round_kl=apart)


# --- the plan ---


def _plan_batches(
    method: ComposedTraining,
    known: Known,
    labels: Labels,
    now: RoundSetup,
    fleet: Fleet,
    room: dict[DeviceId, int],
    optimising: Callable[[int], Optimising],
) -> tuple[dict[DeviceId, int], BatchControl | None]:
    """The rows of each chosen device, and the control that replans batches within the round, if
    any.
    """
    selection, batches = method.selection, method.batches
    if isinstance(selection, Everyone) and isinstance(batches, Equal):
        return room, None
    devices = list(room)
    limits = limits_of(
        selection,
        batches,
        devices=len(devices),
        batch=method.batch,
        row_bytes=row_bytes(now.split_model.feature_shape(now.longest), method.precision),
    )
    candidates = _candidates(batches, known, labels, room, method.batch)
    if isinstance(selection, LeastWaiting):
        # each row costs features up and their gradient down, each round the client model both ways
        exchange = candidates.cost * (weight_bytes(now) / limits.feature_bytes / method.steps)
        candidates = replace(candidates, weights=exchange)
    rng = np.random.default_rng([now.seed, PLANNING])
    plan = plan_split(candidates, limits, rng, control_of(selection, batches))
    if labels:
        measured = measures_speed(selection, batches)
        waiting = {"waiting_planned": plan.waiting} if measured else {}
        fleet.note(merged_kl=plan.divergence, merged_rows=plan.rows, **waiting)
    chosen = [devices[i] for i in plan.chosen]
    rows = dict(zip(chosen, plan.batches.tolist(), strict=True))
    if not isinstance(batches, WithinRound):
        return rows, None
    goal = Goal(
        cost=candidates.cost[plan.chosen],
        labels=candidates.labels[plan.chosen],
        reference=reference(candidates.labels),
        most=candidates.most[plan.chosen],
        limits=limits,
        fixed=known.fixed_seconds,
    )
    by_tokens = batches.fill_tokens and now.longest > 1
    return rows, BatchControl(
        devices=chosen,
        goal=goal,
        tune=batches.tune,
        steps=method.steps,
        optimising=optimising,
        room=np.array([room[device] for device in chosen]) if by_tokens else None,
        token_bytes=limits.feature_bytes / now.longest,
    )


def _candidates(
    batches: Batches, known: Known, labels: Labels, room: Mapping[DeviceId, int], batch: int
) -> Candidates:
    """The devices that may take part, and what is known of each; `room` is the rows that fit each.

    If nobody was asked for labels, all devices count as having the same.
    """
    workers = [known.workers.get(device) for device in room]
    alike = np.ones(1)
    candidates = Candidates(
        cost=costs(workers),
        labels=np.stack([labels.get(device, alike) for device in room]),
        most=np.minimum(list(room.values()), batch),
        rounds=np.array([0 if worker is None else worker.rounds for worker in workers]),
    )
    match batches:
        case WithinRound():
            return replace(candidates, fixed=known.fixed_seconds)
        case Regulated(unmeasured="median"):
            return candidates
        case _:  # assumed slowest: all wait for a device slower than planned, none for a faster one
            new = np.array([worker is None for worker in workers])
            return replace(candidates, cost=np.where(new, candidates.cost.max(), candidates.cost))


def _with_known_labels(room: dict[DeviceId, int], labels: Labels) -> dict[DeviceId, int]:
    """The devices whose labels are known; raises AllLost if there are none."""
    able = {device: rows for device, rows in room.items() if device in labels}
    if not able:
        raise AllLost(
            f"none of the {len(room)} devices with memory for a row has sent its label distribution"
        )
    return able


def _late_joining(
    method: ComposedTraining, now: RoundSetup, known: Known, rows: Mapping[DeviceId, int]
) -> LateJoining | None:
    match method.joining:
        case AtOnce():
            return None
        case Late(quorum=quorum):
            bytes_of_row = row_bytes(now.split_model.feature_shape(now.longest), method.precision)
            return LateJoining(
                quorum=quorum,
                devices=len(rows),
                weight_bytes=weight_bytes(now),
                batch_bytes=float(np.mean(list(rows.values()))) * bytes_of_row,
                fixed=known.fixed_seconds,
            )


def _adjustments(method: ComposedTraining, known: Known, labels: Labels) -> LogitAdjustments:
    """The adjustment of each device's logits; None for tasks without classes."""
    match method.logit_adjustment:
        case LabelSkew(share=share) if share and known.classes:
            return logit_adjustments(labels, share)
        case _:
            return None


def _client_optimising(method: ComposedTraining, now: RoundSetup) -> Optimising:
    """The server model's settings, with the learning rate times `client_lr_multiplier`."""
    rate = now.optimising.learning_rate * method.client_lr_multiplier
    return replace(now.optimising, learning_rate=rate)


def weight_bytes(now: RoundSetup) -> int:
    """Bytes of the client model as it is sent."""
    return sum(tensor.nbytes for tensor in now.begin(1).weights.values())
