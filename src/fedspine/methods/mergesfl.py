"""MergeSFL: split learning on the features of all devices, merged into one batch.

Liao, Xu, Xu, Yao, Wang and Qiao 2024, "MergeSFL: Split Federated Learning with Feature Merging and
Batch Size Regulation", ICDE (arXiv:2311.13348). Batch sizes follow the devices' speed, and devices
are chosen for the labels that the merged batch will hold. This is the paper's form, for nets and
carried over to transformers with LoRA (docs/methods/mergesfl.md); with our additions it is
`mergesfl-plus`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedspine.control.split_parts import Batches, Genetic, Regulated, Selection
from fedspine.core.device import DeviceId
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.core.task import Task
from fedspine.split.baseline import TOY, SplitState, first_state, weighted_mean
from fedspine.split.composed import ComposedTraining, check_composed, composed_state, deployed
from fedspine.split.composed_round import RoundPlan, next_state, note_round, plan_round, train
from fedspine.split.server import Copies, InTurn, MergedStep, ServerStep

Merging = Literal["merged", "in-turn", "copies"]


@method("mergesfl")
@dataclass(frozen=True)
class MergeSfl(ComposedTraining):
    """Feature merging and batch size regulation, as in the paper; `merging` and `batches` have its
    two ablations.

    `steps` is tau, the iterations of a round; `batch` is D, the rows of the fastest device in one
    of them.

    >>> from fedspine import MergeSfl, Recipe
    >>> recipe = Recipe(method=MergeSfl(steps=10), data="signals.npz", model="cnn-h", per_round=20)
    >>> recipe.task.kind, recipe.method.steps
    ('array', 10)
    """

    models: ClassVar[tuple[str, ...]] = ("transformer", "net")
    renamed: ClassVar[dict[str, str]] = {  # settings of old recipes
        "fewest": "selection.fewest",
        "most": "selection.most",
        "budget_rows": "selection.budget_rows",
        "divergence": "batches.divergence",
        "keep": "batches.keep",
        "fine_tune": "batches.tune",
        "regulate": 'batches.name = "equal" for false',
    }

    # without merging: the server model makes a step for each device, or has a copy for each
    merging: Merging = "merged"
    selection: Selection = Genetic()
    batches: Batches = Regulated()

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**{**TOY, "steps": 4})

    def check(self, task: Task) -> None:
        check_composed(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> SplitState:
        return composed_state(self, first_state(self, task, rng), task)

    def round(self, state: SplitState, fleet: Fleet) -> SplitState:
        plan = plan_round(self, state, fleet)
        server = server_of(self.merging, plan)
        result = train(plan, fleet, server, self.steps)
        note_round(fleet, result, plan.labels)
        weights = result.counted  # d_i/Q of Eq. 17
        model = plan.now.split_model.join(
            weighted_mean(result.client_models, weights), server.finish(weights)
        )
        return next_state(self, plan, state, result, model)

    def deploy(self, state: SplitState, device: DeviceId | None = None) -> Any:
        return deployed(self, state)

    def unpruned(self, state: SplitState) -> Any:
        return deployed(self, state)


def server_of(merging: Merging, plan: RoundPlan, *, rescale: bool = True) -> ServerStep:
    """What trains the server model in this round."""
    match merging:
        case "merged":
            return MergedStep(**plan.server_arguments, rescale=rescale)
        case "in-turn":
            return InTurn(**plan.server_arguments)
        case "copies":
            return Copies(**plan.server_arguments, every_iteration=True)
