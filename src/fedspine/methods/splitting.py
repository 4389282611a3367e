"""What the split baselines share: their settings, their state, and how a round opens and closes.

SplitFed, LocFedMix-SL, AdaSFL and SplitLoRA differ in what the server makes of the features that come, and in how the
bottoms are weighed; all else is alike, and alike in MergeSFL, so that a comparison means something.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from fedspine.device import DeviceId
from fedspine.errors import unknown
from fedspine.fleet import AllLost, Fleet
from fedspine.message import Tensors, message
from fedspine.methods.halved import check_halves, optimising_at
from fedspine.planning.regulate import rows_that_fit
from fedspine.planning.workers import WorkerState, observed, took_part
from fedspine.split.device import Begin, Cutting
from fedspine.split.halves import Halves
from fedspine.split.rounds import Played
from fedspine.split.trained import Optimising
from fedspine.split.wire import BYTES, Precision
from fedspine.task import Task
from fedspine.tensors import average, half

MODEL_CUT = -1  # of `cut`: where the model says


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


@dataclass(frozen=True)
class SplitMethod:
    """The settings and the ends of a method that trains a model in two halves; a round is each method's own."""

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says
    rank: int = 8  # of the adapters; nets train all weights
    scale: float = 2.0  # alpha / rank
    steps: int = 20  # tau: iterations of a round, one optimiser step in each half
    batch: int = 32  # rows of a device in one of them, of the fastest where they differ
    optimiser: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 2e-4
    decay: float = 0.0  # factor on the rate after each round; 0: it falls linearly to zero over the rounds
    lowest: float = 0.0  # below which it does not fall
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm in each half; 0: never
    precision: Precision = "fp16"  # of features and gradients on the wire

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=3, batch=16, learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_halves(self, task)
        if self.precision not in BYTES:
            raise unknown("method.precision", self.precision, BYTES)
        cutting_of(self, task.base).of(task.base)

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        halves = cutting_of(self, task.base).of(task.base)
        return SplitState(
            round=0,
            rounds=task.rounds,
            longest=task.max_tokens,
            model=halves.join(*halves.start(rng)),
            seed=int(rng.integers(2**31)),
        )

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model


def cutting_of(method: SplitMethod, base: Any) -> Cutting:
    """Where the model is cut."""
    cut = base.default_cut if method.cut == MODEL_CUT else method.cut
    return Cutting(cut=cut, rank=method.rank, scale=method.scale)


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


def opened(method: SplitMethod, state: SplitState, fleet: Fleet) -> Opened:
    cutting = cutting_of(method, fleet.base)
    halves = cutting.of(fleet.base)
    bottom, top = halves.parts(state.model)
    return Opened(
        halves=halves,
        cutting=cutting,
        optimising=optimising_at(method, state.round, state.rounds),
        bottom=bottom,
        top=top,
        seed=int(np.random.SeedSequence([state.seed, state.round]).generate_state(1)[0]),
        precision=method.precision,
    )


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

    Devices that cannot hold one row are noted and left out. Raises AllLost where none can.
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
        raise AllLost(f"of {len(found)} devices none has the memory for one row of the bottom; choose a lower cut")
    return {device: rows for device, rows in found.items() if rows}


def averaged(bottoms: Mapping[DeviceId, Tensors], weights: Mapping[DeviceId, float]) -> Tensors:
    """The weighted mean of the bottoms of the devices that stayed to the end."""
    return average((weights[device], bottom) for device, bottom in bottoms.items())


def noted(fleet: Fleet, played: Played) -> None:
    """Write down how each device fared."""
    for device, progress in played.progress.items():
        fleet.note(device=device, batch=progress.batch, loss=progress.losses[-1])
