"""The settings of federated optimisation in a recipe: what goes together, and the server that they
stand for.
"""

from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.logit_adjustment import Unadjusted
from fedspine.core.server_optimiser import Accumulated, NoOptimiser, Server
from fedspine.lm.drift import FedDyn, Free
from fedspine.lm.tuning import HeadTraining
from fedspine.methods import all_methods
from fedspine.runs.sections import FleetSection, TaskSection


def check_optimisation(method: Any, fleet: FleetSection, rounds: int, *, private: bool) -> None:
    """Raise BadInput for settings of a method and a fleet section that do not go together."""
    how = fleet.server_optimiser or NoOptimiser()
    how.check()
    if how != NoOptimiser() and not method.server_optimiser:
        raise BadInput(
            f"fleet.server_optimiser is {how.name}, but {method.name} does not support server "
            f"optimisers; leave it out, or choose one of {_able('server_optimiser')}"
        )
    if not isinstance(method, HeadTraining):
        return
    warmup = method.schedule.warmup_rounds
    if 0 < warmup >= rounds:
        raise BadInput(
            f"method.schedule.warmup_rounds is {warmup}, but run.rounds is {rounds}; at least one "
            "round must come after the warm-up"
        )
    dynamic = isinstance(method.drift, FedDyn)
    if dynamic and how != NoOptimiser():
        raise BadInput(
            f"method.drift is feddyn, which has a server step of its own, and "
            f"fleet.server_optimiser is {how.name}; leave one of them out"
        )
    for name, asked in (
        ('drift.name = "feddyn"', dynamic),
        ("keep_optimiser", method.keep_optimiser),
    ):
        if asked and not method.same_shapes:
            raise BadInput(
                f"method.{name} needs the same tensors on a device in every round, but those of "
                f"{method.name} change; leave it out, or choose one of "
                f"{_able('same_shapes')}"
            )
    if private:
        _check_private(method)


def check_adjusted(task: TaskSection, method: Any) -> None:
    """Raise BadInput for logits that are adjusted by labels where there are none."""
    adjusted = isinstance(method, HeadTraining) and method.logit_adjustment != Unadjusted()
    if adjusted and task.kind == "causal-lm":
        raise BadInput(
            f"method.logit_adjustment is {method.logit_adjustment.name}, but language modelling "
            "has no classes; leave it out"
        )


def check_held_out(task: TaskSection, fleet: FleetSection) -> None:
    """Raise BadInput for rows that are held out where they cannot be scored."""
    if fleet.held_out is not None and task.kind == "causal-lm":
        raise BadInput(
            f"fleet.held_out is {fleet.held_out:g}, but devices are scored on labels, and language "
            "modelling has none; leave it out"
        )


def server_of(method: Any, fleet: FleetSection) -> Server:
    """The server of a run, with nothing to remember yet."""
    if isinstance(method, HeadTraining) and isinstance(method.drift, FedDyn):
        return Server(Accumulated(share=min(1.0, fleet.per_round / fleet.devices)))
    return Server(fleet.server_optimiser or NoOptimiser())


def _check_private(method: HeadTraining) -> None:
    kept = {
        f"drift.name = {method.drift.name}": not isinstance(method.drift, Free),
        "keep_optimiser": method.keep_optimiser,
        "personal_head": method.personal_head,
        f"logit_adjustment = {method.logit_adjustment.name}": (
            method.logit_adjustment != Unadjusted()
        ),
    }
    for setting, asked in kept.items():
        if asked:
            raise BadInput(
                f"[privacy] does not account for method.{setting}; leave one of them out"
            )


def _able(mark: str) -> str:
    return ", ".join(name for name, cls in all_methods().items() if getattr(cls, mark))
