"""SplitLoRA: a transformer split at a block, LoRA in both halves, devices served one after another.

Lin, Hu, Zhang, Chen, Fang, Chen, Li, Vepakomma and Gao 2024, "SplitLoRA: A Split
Parameter-Efficient Fine-Tuning Framework for Large Language Models", arXiv:2407.00952. Departures:
docs/methods/splitlora.md.
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
    batch_caps,
    check_split,
    first_state,
    note_devices,
    set_up_round,
    weighted_mean,
)
from fedspine.split.protocol import run_round
from fedspine.split.server import InTurn


@method("splitlora")
@dataclass(frozen=True)
class SplitLora(SplitTraining):
    """Split learning of LoRA factors on one server model that sees the devices in turn, with its
    authors' training settings.

    Optimisers are fresh on devices after each averaging, on the server in each round.
    """

    # iterations after which the devices' factors are averaged; at the latest at the round's end
    average_every: int = 100
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
        now = set_up_round(self, state, fleet)
        batches = batch_caps(fleet, now.split_model, self.batch, state.longest)
        server_model = InTurn(
            now.split_model,
            now.server_model,
            now.optimising,
            gradients=bool(now.client_model),
            shuffled=False,
        )
        client_model = now.client_model
        for first in range(0, self.steps, self.average_every):
            steps = min(self.average_every, self.steps - first)
            orders = {device: now.begin(batch, client_model) for device, batch in batches.items()}
            result = run_round(fleet, orders, steps, server_model, now.seed + first)
            note_devices(fleet, result)
            batches = {
                device: batches[device] for device in result.client_models
            }  # who vanished is back in the next round
            client_model = weighted_mean(result.client_models, dict.fromkeys(batches, 1))
        return replace(
            state,
            round=state.round + 1,
            model=now.split_model.join(client_model, server_model.finish({})),
        )

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return state.model

    def unpruned(self, state: SplitState) -> Any:
        return state.model
