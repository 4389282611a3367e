"""MergeSFL: split learning on the features of all devices, merged into one batch.

Liao, Xu, Xu, Yao, Wang and Qiao 2024, "MergeSFL: Split Federated Learning with Feature Merging and
Batch Size Regulation", ICDE (arXiv:2311.13348). Batch sizes follow the devices' speed, and devices
are chosen for the labels that the merged batch will hold. This is the paper's form, for nets and
carried over to transformers with LoRA (docs/methods/mergesfl.md); with our additions it is
`mergesfl-plus`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedspine.control.labels import divergence, merged, reference
from fedspine.control.split_plan import (
    Candidates,
    Selection,
    SplitControl,
    SplitLimits,
    SplitPlan,
    plan_split,
)
from fedspine.control.worker_state import WorkerState, costs
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost, Fleet, none_left
from fedspine.core.message import message
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.baseline import (
    RoundSetup,
    SplitTraining,
    batch_caps,
    check_split,
    cutting_of,
    first_state,
    note_devices,
    set_up_round,
    updated_workers,
    weighted_mean,
)
from fedspine.split.interface import SplitModel
from fedspine.split.label_distribution import LabelQuery, label_distribution
from fedspine.split.protocol import RoundResult, run_round
from fedspine.split.server import Copies, InTurn, LogitAdjustments, Merged, ServerStep
from fedspine.split.wire import row_bytes

FULL_BATCHES = 10  # the budget of an iteration where none is set
PLANNING = 601  # the purpose of a random stream


@message
class MergeSflState:
    round: int
    rounds: int
    seed: int
    model: Any  # as `SplitModel.join` gives it
    classes: int
    longest: int  # tokens of a text, 1 for arrays
    labels: dict[str, np.ndarray]  # V_i of the devices that were ever asked
    workers: dict[str, WorkerState]  # of the devices that ever completed a round


@method("mergesfl")
@dataclass(frozen=True)
class MergeSfl(SplitTraining):
    """Feature merging and batch size regulation, as in the paper; `merging` and `regulate` are its
    two ablations.

    `steps` is tau, the iterations of a round; `batch` is D, the rows of the fastest device in one
    of them.

    >>> from fedspine import MergeSfl, Recipe
    >>> recipe = Recipe(method=MergeSfl(steps=10), data="signals.npz", model="cnn-h", per_round=20)
    >>> recipe.task.kind, recipe.method.steps
    ('array', 10)
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")

    fewest: int = 5  # m_min: devices of a round
    most: int = 20  # m_max
    budget_rows: int = 0  # features that the server takes in one iteration; 0: ten full batches
    divergence: float = 0.05  # eps: nats of KL between the merged labels and the fleet's
    keep: float = 0.8  # a: share of the old average when a device's speed is measured again
    # without merging: the server model makes a step for each device, or has a copy for each
    merging: Literal["merged", "in-turn", "copies"] = "merged"
    selection: Selection = "genetic"  # or "random"
    regulate: bool = True  # batches in proportion to the devices' speed; else equal batches
    fine_tune: bool = True  # batches are changed by single rows to bring the labels nearer

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=4, batch=16, optimiser="adamw", learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_split(self, task)
        if self.budget_rows < 0 or not 0 <= self.keep < 1:
            raise BadInput(
                "method.budget_rows of at least 0 and method.keep from 0 to below 1 were expected, "
                f"{self.budget_rows} and {self.keep} came"
            )
        limits_of(self, cutting_of(self, task.base).of(task.base), task.max_tokens)

    def start(self, task: Task, rng: np.random.Generator) -> MergeSflState:
        first = first_state(self, task, rng)
        return MergeSflState(**vars(first), classes=len(task.label_names), labels={}, workers={})

    def round(self, state: MergeSflState, fleet: Fleet) -> MergeSflState:
        now = set_up_round(self, state, fleet)
        labels = known_labels(state, fleet)
        batches = self._batches(state, labels, now, fleet)
        server = server_of(self, now)
        orders = {device: now.begin(rows) for device, rows in batches.items()}
        result = run_round(fleet, orders, self.steps, server, now.seed)
        note_round(fleet, result, labels)
        weights = result.counted  # d_i/Q of Eq. 17
        model = now.split_model.join(
            weighted_mean(result.client_models, weights), server.finish(weights)
        )
        return replace(
            state,
            round=state.round + 1,
            model=model,
            labels=labels,
            workers=state.workers
            | updated_workers(state.workers, row_seconds(result, self.regulate), self.keep),
        )

    def deploy(self, state: MergeSflState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: MergeSflState) -> Any:
        return state.model

    def _batches(
        self,
        state: MergeSflState,
        labels: Mapping[DeviceId, np.ndarray],
        now: RoundSetup,
        fleet: Fleet,
    ) -> dict[DeviceId, int]:
        """Which devices take part, and with how many rows in each iteration."""
        room = batch_caps(fleet, now.split_model, self.batch, state.longest)
        devices, candidates = candidates_of(state, labels, room, self.batch)
        plan = plan_split(
            new_as_slowest(state, devices, candidates),
            limits_of(self, now.split_model, state.longest),
            np.random.default_rng([now.seed, PLANNING]),
            SplitControl(select=self.selection, regulate=self.regulate, tune=self.fine_tune),
        )
        note_plan(fleet, plan, self.regulate)
        return {devices[i]: int(rows) for i, rows in zip(plan.chosen, plan.batches, strict=True)}


# --- shared with mergesfl-plus ---


def known_labels(state: MergeSflState, fleet: Fleet) -> dict[str, np.ndarray]:
    """V_i of all devices known; devices never asked before are asked now.

    Raises AllLost where none of the fleet's devices is known.
    """
    unknown = [profile.id for profile in fleet.devices if profile.id not in state.labels]
    order = LabelQuery(classes=state.classes, longest=state.longest)
    someone = len(unknown) < len(fleet.devices)
    try:
        replies = fleet.ask(label_distribution, dict.fromkeys(unknown, order)) if unknown else []
    except AllLost:  # too few of the new ones, without which the others go on
        if not someone:
            raise
        replies = []
    if not (replies or someone):
        raise none_left(len(unknown), list(fleet.unusable.values()))
    return state.labels | {reply.device: reply.value.shares for reply in replies}


def candidates_of(
    state: MergeSflState,
    labels: Mapping[DeviceId, np.ndarray],
    room: Mapping[DeviceId, int],
    batch: int,
) -> tuple[list[DeviceId], Candidates]:
    """The devices that may take part, and what is known of each; `room` is the rows that fit each.

    Raises AllLost where the labels of none are known.
    """
    able = [device for device in room if device in labels]
    if not able:
        raise AllLost(
            f"of {len(room)} devices with memory for a row none has said what labels it holds"
        )
    known = [state.workers.get(device) for device in able]
    return able, Candidates(
        cost=costs(known),
        labels=np.stack([labels[device] for device in able]),
        most=np.minimum([room[device] for device in able], batch),
        rounds=np.array([0 if worker is None else worker.rounds for worker in known]),
    )


def new_as_slowest(
    state: MergeSflState, devices: list[DeviceId], candidates: Candidates
) -> Candidates:
    """The candidates with the cost of the slowest for devices never measured.

    All devices wait for one that is slower than expected, and none for one that is faster.
    """
    new = np.array([device not in state.workers for device in devices])
    return replace(candidates, cost=np.where(new, candidates.cost.max(), candidates.cost))


def limits_of(method: MergeSfl, split_model: SplitModel, longest: int) -> SplitLimits:
    """What binds every plan; raises BadInput for limits that no plan can meet."""
    feature_bytes = row_bytes(split_model.feature_shape(longest), method.precision)
    rows = method.budget_rows or FULL_BATCHES * method.batch
    return SplitLimits(
        largest_batch=method.batch,
        fewest=method.fewest,
        most=method.most,
        feature_bytes=feature_bytes,
        budget_bytes=rows * feature_bytes,
        divergence=method.divergence,
    )


def server_of(
    method: MergeSfl, now: RoundSetup, *, rescale: bool = True, adjustments: LogitAdjustments = None
) -> ServerStep:
    """What trains the server model in this round."""
    given: dict[str, Any] = {"gradients": bool(now.client_model), "adjustments": adjustments}
    match method.merging:
        case "merged":
            return Merged(
                now.split_model, now.server_model, now.optimising, rescale=rescale, **given
            )
        case "in-turn":
            return InTurn(now.split_model, now.server_model, now.optimising, **given)
        case "copies":
            return Copies(
                now.split_model, now.server_model, now.optimising, every_iteration=True, **given
            )


def row_seconds(result: RoundResult, measured: bool) -> dict[DeviceId, float]:
    """Seconds of a row at each device that stayed to the end.

    1 where speed is not `measured`: a time that nothing uses would make each run's state another
    one.
    """
    return {device: own.row_seconds if measured else 1.0 for device, own in result.progress.items()}


def note_plan(fleet: Fleet, plan: SplitPlan, measured: bool) -> None:
    """Record what is expected of the round; waiting only where speed is measured."""
    waiting = {"waiting_planned": plan.waiting} if measured else {}
    fleet.note(merged_kl=plan.divergence, merged_rows=plan.rows, **waiting)


def note_round(fleet: Fleet, result: RoundResult, labels: Mapping[DeviceId, np.ndarray]) -> None:
    """Record the loss, and how far the labels of all merged rows were from the fleet's, in nats."""
    counted = np.array(list(result.counted.values()))
    of_round = merged(counted, np.stack([labels[device] for device in result.progress]))
    everywhere = [labels[profile.id] for profile in fleet.devices if profile.id in labels]
    apart = float(divergence(of_round, reference(np.stack(everywhere))))
    note_devices(fleet, result)
    fleet.note(loss=result.loss, stayed=len(result.client_models), round_kl=apart)
