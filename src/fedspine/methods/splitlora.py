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
from fedspine.core.task import Task
from fedspine.split.baseline import (
    SplitState,
    SplitTraining,
    averaged,
    check_split,
    first_state,
    noted,
    opened,
    rooms,
)
from fedspine.split.protocol import play
from fedspine.split.server import InTurn


@method("splitlora")
@dataclass(frozen=True)
class SplitLora(SplitTraining):
    """Split learning of LoRA factors on one top that sees the devices in turn, with its authors' training settings.

    Optimisers are fresh on devices after each averaging, on the server in each round.
    """

    average_every: int = 100  # iterations after which the devices' factors are averaged; at the latest at the round's end
    batch: int = 8
    weight_decay: float = 0.01
    clip: float = 0.0

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
