"""What the split baselines share: their settings, their state, and how a round opens and closes.

SplitFed, LocFedMix-SL, AdaSFL and SplitLoRA differ in what the server makes of the features that come, and in how the
bottoms are weighed; all else is alike, and alike in MergeSFL, so that a comparison means something.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedspine.control.batch_sizes import rows_that_fit
from fedspine.control.worker_state import WorkerState, observed, took_part
from fedspine.core.device import DeviceId
from fedspine.core.errors import unknown
from fedspine.core.fleet import Fleet, NoMemory
from fedspine.core.message import Tensors, message
from fedspine.core.task import Task
from fedspine.core.tensors import average, half
from fedspine.split.device import Begin, Cutting
from fedspine.split.interface import Halves
from fedspine.split.protocol import Played, play
from fedspine.split.server import ServerStep
from fedspine.split.trainable_half import Optimising
from fedspine.split.training_settings import ModelTraining, check_halves, optimising_at
from fedspine.split.wire import BYTES

MODEL_CUT = -1  # of `cut`: where the model says
LATER = 3  # how much more the later rounds count in a mean of all


@dataclass(frozen=True, kw_only=True)
class SplitTraining(ModelTraining):
    """The settings that split methods share."""

    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says


class Bottom(Protocol):
    """What says how much memory training a bottom needs: halves, or a bottom with something beside it."""

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int: ...


@message
class SplitState:
    """The model, from which both halves are taken in every round."""

    round: int
    rounds: int
    seed: int
    longest: int  # tokens of a text, 1 for arrays
    model: Any  # as `Halves.join` gives it


def check_split(fields: SplitTraining, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    check_halves(fields, task)
    if fields.precision not in BYTES:
        raise unknown("method.precision", fields.precision, BYTES)
    cutting_of(fields, task.base).of(task.base)


def cutting_of(fields: SplitTraining, base: Any) -> Cutting:
    """Where the model is cut."""
    cut = base.default_cut if fields.cut == MODEL_CUT else fields.cut
    return Cutting(cut=cut, rank=fields.rank, scale=fields.scale)


def first_state(fields: SplitTraining, task: Task, rng: np.random.Generator) -> SplitState:
    halves = cutting_of(fields, task.base).of(task.base)
    return SplitState(
        round=0,
        rounds=task.rounds,
        longest=task.max_tokens,
        model=halves.join(*halves.start(rng)),
        seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class Opened:
    """A round that is about to begin."""

    halves: Halves
    cutting: Cutting
    optimising: Optimising
    bottom: Tensors
    top: Tensors
    seed: int
    precision: str

    def begin(self, batch: int, bottom: "Tensors | None" = None) -> Begin:
        """The first order of a device, with the common bottom or another."""
        weights = self.bottom if bottom is None else bottom
        return Begin(
            weights=weights if self.precision == "fp32" else half(weights),
            cutting=self.cutting,
            batch=batch,
            optimising=self.optimising,
            precision=self.precision,
        )

    def with_ending(self, order: Begin, ending: Tensors) -> Begin:
        """The same order with the last part of the top, for the U-shape."""
        sent = ending if self.precision == "fp32" else half(ending)
        return replace(order, ending=sent, ending_optimising=self.optimising)


def opened(fields: SplitTraining, state: SplitState, fleet: Fleet) -> Opened:
    cutting = cutting_of(fields, fleet.base)
    halves = cutting.of(fleet.base)
    bottom, top = halves.parts(state.model)
    return Opened(
        halves=halves,
        cutting=cutting,
        optimising=optimising_at(fields, state.round, state.rounds),
        bottom=bottom,
        top=top,
        seed=int(np.random.SeedSequence([state.seed, state.round]).generate_state(1)[0]),
        precision=fields.precision,
    )


def split_round(
    method: SplitTraining,
    state: SplitState,
    fleet: Fleet,
    server_of: Callable[[Opened], ServerStep],
) -> SplitState:
    """One round with the same batch for all devices and averages weighed by rows: SplitFed's.

    `server_of` makes what trains the top in this round.
    """
    now, rows = opened(method, state, fleet), rows_of(fleet)
    server = server_of(now)
    batches = rooms(fleet, now.halves, method.batch, state.longest)
    orders = {device: now.begin(batch) for device, batch in batches.items()}
    played = play(fleet, orders, method.steps, server, now.seed)
    noted(fleet, played)
    stayed = {device: rows[device] for device in played.bottoms}
    model = now.halves.join(averaged(played.bottoms, stayed), server.finish(stayed))
    return replace(state, round=state.round + 1, model=model)


def paced(
    known: Mapping[DeviceId, WorkerState], costs: Mapping[DeviceId, float], keep: float
) -> dict[DeviceId, WorkerState]:
    """The devices whose round counts, with the seconds a row that they took in it; `keep` is the old average's share."""
    return {
        device: took_part(observed(known.get(device), compute_seconds=cost, keep=keep))
        for device, cost in costs.items()
    }


def rows_of(fleet: Fleet) -> dict[DeviceId, int]:
    """How many rows each device holds: SplitFed's weights."""
    return {profile.id: profile.examples for profile in fleet.devices}


def rooms(fleet: Fleet, bottom: Bottom, batch: int, longest: int) -> dict[DeviceId, int]:
    """Rows of a batch, up to `batch`, that each device's data and memory allow, at `longest` tokens.

    Devices that cannot hold one row are noted and left out. Raises NoMemory where none can.
    """
    found = {
        profile.id: rows_that_fit(
            lambda rows: bottom.memory_bytes("bottom", rows, longest),
            profile.memory_bytes,
            min(batch, profile.examples),
        )
        for profile in fleet.devices
    }
    for device in (device for device, rows in found.items() if not rows):
        fleet.note(device=device, left_out="one row does not fit its memory")
    if not any(found.values()):
        raise NoMemory(
            f"of {len(found)} devices none has the memory for one row of the bottom; choose a lower cut"
        )
    return {device: rows for device, rows in found.items() if rows}


def averaged(bottoms: Mapping[DeviceId, Tensors], weights: Mapping[DeviceId, float]) -> Tensors:
    """The weighted mean of the bottoms of the devices that stayed to the end."""
    return average((weights[device], bottom) for device, bottom in bottoms.items())


def with_newest(halves: Halves, mean: Any, newest: Any, rounds: int) -> Any:
    """The mean of the models of `rounds` rounds, from that of the rounds before and the newest.

    Later ones count more: polynomial-decay averaging of Shamir and Zhang 2013 (arXiv:1212.1824). The first round's model is
    its own mean, after 5 rounds the newest counts a half, after 25 a seventh.
    """
    share = (LATER + 1) / (rounds + LATER)
    pairs = zip(halves.parts(mean), halves.parts(newest), strict=True)
    return halves.join(*(average([(1 - share, before), (share, now)]) for before, now in pairs))


def noted(fleet: Fleet, played: Played) -> None:
    """Write down how each device fared."""
    for device, progress in played.progress.items():
        fleet.note(device=device, batch=progress.batch, loss=progress.losses[-1])
