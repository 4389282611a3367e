"""SplitLoRA: a transformer split at a block, LoRA in both halves, devices served one after another.

Lin, Hu, Zhang, Chen, Fang, Chen, Li, Vepakomma and Gao 2024, "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework
for Large Language Models", arXiv:2407.00952. Departures: docs/methods/splitlora.md.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
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
)
from fedspine.split.protocol import play
from fedspine.split.server import InTurn
from fedspine.split.wire import Precision


@method("splitlora")
@dataclass(frozen=True)
class SplitLora:
    """Split learning of LoRA factors on one top that sees the devices in turn, with its authors' training settings."""

    average_every: int = 100  # iterations after which the devices' factors are averaged; at the latest at the round's end
    cut: int = MODEL_CUT  # blocks on the devices; -1: as many as the model says
    rank: int = 8  # of the adapters
    scale: float = 2.0  # alpha / rank
    steps: int = 20  # tau: iterations of a round, one optimiser step in each half for every device
    batch: int = 8  # rows of a device in one of them
    optimiser: Optimiser = AUTO  # fresh on devices after each averaging, on the server each round
    learning_rate: Rate = AUTO
    decay: float = 0.0  # of the learning rate, each round; 0: it falls linearly to zero
    lowest: float = 0.0  # learning rate that decay does not go below
    weight_decay: float = 0.01
    clip: float = 0.0  # of the gradient's norm in each half; 0: never
    precision: Precision = "fp16"  # of features and gradients on the wire

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(
            cut=1, rank=4, steps=3, average_every=2, batch=16, optimiser="adamw", learning_rate=2e-2
        )

    def check(self, task: Task) -> None:
        check_split(self, task)
        if self.average_every < 1:
            raise BadInput(
                f"method.average_every is {self.average_every}, but at least 1 iteration is needed"
            )

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return first_state(self, task, rng)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        now = opened(self, state, fleet)
        batches = rooms(fleet, now.halves, self.batch, state.longest)
        top = InTurn(
            now.halves, now.top, now.optimising, gradients=bool(now.bottom), shuffled=False
        )
        bottom = now.bottom
        for first in range(0, self.steps, self.average_every):
            steps = min(self.average_every, self.steps - first)
            orders = {device: now.begin(batch, bottom) for device, batch in batches.items()}
            played = play(fleet, orders, steps, top, now.seed + first)
            noted(fleet, played)
            batches = {
                device: batches[device] for device in played.bottoms
            }  # who vanished is back in the next round
            bottom = averaged(played.bottoms, dict.fromkeys(batches, 1))
        return replace(state, round=state.round + 1, model=now.halves.join(bottom, top.finish({})))

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model
