"""What split methods share: their settings, their state, and how a round is set up.

SplitFed, LocFedMix-SL, AdaSFL, SplitLoRA and MergeSFL differ in how the server model is trained and
how client models are weighted. Everything else is the same, so that they can be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fedspine.control.batch_sizes import rows_that_fit
from fedspine.control.worker_state import WorkerState, observed, took_part
from fedspine.core.device import DeviceId
from fedspine.core.errors import unknown
from fedspine.core.fleet import Fleet, NoMemory
from fedspine.core.message import Tensors, message
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import average
from fedspine.split.interface import SplitModel, seed_at
from fedspine.split.messages import Begin, Cutting
from fedspine.split.protocol import RoundResult
from fedspine.split.trainable_half import Optimising
from fedspine.split.training_settings import ModelTraining, check_training, optimising_at
from fedspine.split.wire import BYTES, weights_wired

MODEL_CUT = -1  # value of `cut` for the model's own default


@dataclass(frozen=True, kw_only=True)
class SplitTraining(ModelTraining):
    """The settings that split methods share."""

    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says

    def predicted_reads(self, base: Any) -> Reads:
        """What a device's orders will read: features leave after each batch, with its labels."""
        return Reads(batch=self.batch, cut=cutting_of(self, base).cut, labels=True)


# with which a tiny model learns a toy task in a few rounds
TOY = MappingProxyType(
    {
        "cut": 1,
        "rank": 4,
        "steps": 3,
        "batch": 16,
        "optimiser": "adamw",
        "learning_rate": 2e-2,
    }
)


class ClientMemory(Protocol):
    """What knows how much memory training a client model needs."""

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int: ...


@message
class SplitState:
    """The model, from which both halves are taken in every round."""

    round: int
    rounds: int
    seed: int
    longest: int  # tokens of a text, 1 for arrays
    model: Any  # as `SplitModel.join` gives it


def check_split(fields: SplitTraining, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    check_training(fields, task)
    if fields.precision not in BYTES:
        raise unknown("method.precision", fields.precision, BYTES)
    cutting_of(fields, task.base).of(task.base)


def cutting_of(fields: SplitTraining, base: Any) -> Cutting:
    """Where the model is cut."""
    cut = base.default_cut if fields.cut == MODEL_CUT else fields.cut
    return Cutting(cut=cut, rank=fields.rank, scale=fields.scale)


def first_state(fields: SplitTraining, task: Task, rng: np.random.Generator) -> SplitState:
    split_model = cutting_of(fields, task.base).of(task.base)
    return SplitState(
        round=0,
        rounds=task.rounds,
        longest=task.max_tokens,
        model=split_model.join(*split_model.start(rng)),
        seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class RoundSetup:
    """What a round begins with: both models, and how they are trained."""

    split_model: SplitModel
    cutting: Cutting
    optimising: Optimising
    client_model: Tensors
    server_model: Tensors
    seed: int
    longest: int  # tokens of a text, 1 for arrays
    precision: str

    def begin(self, batch: int, client_model: "Tensors | None" = None) -> Begin:
        """The first order of a device, with the common client model or another."""
        weights = self.client_model if client_model is None else client_model
        return Begin(
            weights=weights_wired(weights, self.precision),
            cutting=self.cutting,
            batch=batch,
            optimising=self.optimising,
            precision=self.precision,
        )

    def with_ending(self, order: Begin, ending: Tensors) -> Begin:
        """The same order with the last part of the server model, for the U-shape."""
        sent = weights_wired(ending, self.precision)
        return replace(order, ending=sent, ending_optimising=self.optimising)


def set_up_round(fields: SplitTraining, state: SplitState, fleet: Fleet) -> RoundSetup:
    cutting = cutting_of(fields, fleet.base)
    split_model = cutting.of(fleet.base)
    client_model, server_model = split_model.parts(state.model)
    return RoundSetup(
        split_model=split_model,
        cutting=cutting,
        optimising=optimising_at(fields, state.round, state.rounds),
        client_model=client_model,
        server_model=server_model,
        seed=seed_at(state.seed, state.round),
        longest=state.longest,
        precision=fields.precision,
    )


def updated_workers(
    known: Mapping[DeviceId, WorkerState], costs: Mapping[DeviceId, float], keep: float
) -> dict[DeviceId, WorkerState]:
    """Devices that completed the round, with the seconds of a row; `keep` is the share of the old
    average.
    """
    return {
        device: took_part(observed(known.get(device), compute_seconds=cost, keep=keep))
        for device, cost in costs.items()
    }


def batch_caps(
    fleet: Fleet, client_model: ClientMemory, batch: int, longest: int
) -> dict[DeviceId, int]:
    """Rows of a batch, up to `batch`, that each device's data and memory allow, at `longest`
    tokens.

    Devices that cannot hold one row are noted and left out. Raises NoMemory where none can.
    """
    found = {
        profile.id: rows_that_fit(
            lambda rows: client_model.memory_bytes("client", rows, longest),
            profile.memory_bytes,
            min(batch, profile.examples),
        )
        for profile in fleet.devices
    }
    for device in (device for device, rows in found.items() if not rows):
        fleet.note(device=device, left_out="one row does not fit its memory")
    if not any(found.values()):
        raise NoMemory(
            f"none of the {len(found)} devices has the memory for one row of the client model; "
            "choose a lower cut"
        )
    return {device: rows for device, rows in found.items() if rows}


def weighted_mean(models: Mapping[DeviceId, Tensors], weights: Mapping[DeviceId, float]) -> Tensors:
    """The weighted mean of what devices returned."""
    return average((weights[device], model) for device, model in models.items())


def note_devices(fleet: Fleet, result: RoundResult) -> None:
    """Record each device's batch size and loss."""
    for device, progress in result.progress.items():
        fleet.note(device=device, batch=progress.batch, loss=progress.losses[-1])
