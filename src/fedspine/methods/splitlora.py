"""SplitLoRA: a transformer split at a block, LoRA in both halves, devices served one after another.

Lin, Hu, Zhang, Chen, Fang, Chen, Li, Vepakomma and Gao 2024, "SplitLoRA: A Split
Parameter-Efficient Fine-Tuning Framework for Large Language Models", arXiv:2407.00952. Departures:
docs/methods/splitlora.md.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.baseline import TOY, SplitState, first_state, weighted_mean
from fedspine.split.composed import ComposedTraining, check_composed, composed_state, deployed
from fedspine.split.composed_round import next_state, note_round, plan_round, train
from fedspine.split.server import InTurn


@method("splitlora")
@dataclass(frozen=True)
class SplitLora(ComposedTraining):
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
        return cls(**TOY, average_every=2)

    def check(self, task: Task) -> None:
        check_composed(self, task)
        if self.average_every < 1:
            raise BadInput(
                f"method.average_every is {self.average_every}, but at least 1 iteration is needed"
            )

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return composed_state(self, first_state(self, task, rng), task)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        plan = plan_round(self, state, fleet)
        server_model = InTurn(**plan.server_arguments, shuffled=False)
        client_model, devices = plan.now.client_model, list(plan.rows)
        for first in range(0, self.steps, self.average_every):
            steps = min(self.average_every, self.steps - first)
            orders = plan.orders(steps, client_model, devices)
            seed = plan.now.seed + first
            result = train(plan, fleet, server_model, steps, seed=seed, orders=orders)
            note_round(fleet, result, plan.labels)
            # who vanished is back in the next round
            devices = list(result.client_models)
            client_model = weighted_mean(result.client_models, dict.fromkeys(devices, 1))
        model = plan.now.split_model.join(client_model, server_model.finish({}))
        return next_state(self, plan, state, result, model)

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return deployed(self, state)

    def unpruned(self, state: SplitState) -> Any:
        return deployed(self, state)
