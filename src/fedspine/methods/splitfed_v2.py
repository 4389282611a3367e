"""SplitFed V2: one top on the server, which takes a step for each device in turn, in an order drawn anew each time.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split Learning", AAAI
(arXiv:2004.12088). Departures: docs/methods/splitfed_v2.md.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.rates import AUTO, Optimiser, Rate
from fedspine.core.task import Task
from fedspine.split.baseline import (
    MODEL_CUT,
    SplitState,
    averaged,
    check_split,
    first_state,
    noted,
    opened,
    rooms,
    rows_of,
)
from fedspine.split.protocol import play
from fedspine.split.server import InTurn
from fedspine.split.wire import Precision


@method("splitfed_v2")
@dataclass(frozen=True)
class SplitFedV2:
    """Split learning with one top, which sees the devices one after another; only the bottoms are averaged."""

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says
    rank: int = 8  # of the adapters; nets train all weights
    scale: float = 2.0  # alpha / rank
    steps: int = 20  # tau: iterations of a round, one optimiser step in each half
    batch: int = 32  # rows of a device in one of them
    optimiser: Optimiser = AUTO
    learning_rate: Rate = AUTO
    decay: float = (
        0.0  # factor on the rate after each round; 0: it falls linearly to zero over the rounds
    )
    lowest: float = 0.0  # below which it does not fall
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm in each half; 0: never
    precision: Precision = "fp16"  # of features and gradients on the wire

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(cut=1, rank=4, steps=3, batch=16, optimiser="adamw", learning_rate=2e-2)

    def check(self, task: Task) -> None:
        check_split(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return first_state(self, task, rng)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        now, rows = opened(self, state, fleet), rows_of(fleet)
        top = InTurn(now.halves, now.top, now.optimising, gradients=bool(now.bottom))
        batches = rooms(fleet, now.halves, self.batch, state.longest)
        orders = {device: now.begin(batch) for device, batch in batches.items()}
        played = play(fleet, orders, self.steps, top, now.seed)
        noted(fleet, played)
        model = now.halves.join(averaged(played.bottoms, rows), top.finish(rows))
        return replace(state, round=state.round + 1, model=model)

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model
