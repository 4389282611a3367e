"""Scores the models that a run deploys: those of devices, the global one, and the unpruned one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.message import pack
from fedspine.core.task import Task
from fedspine.execution.workers import ScoreJob, Workers
from fedspine.lm.base import Model
from fedspine.lm.score import Score
from fedspine.lm.structure import key_of, sparsity
from fedspine.nets.net import NetModel


@dataclass(frozen=True)
class Deployment:
    """The models that a method deploys from one state to some of the devices."""

    method: Any
    state: Any
    devices: tuple[DeviceId, ...]

    def models(self) -> Iterator[Model | NetModel]:
        """The unpruned model, the global one, then each device's, made one at a time."""
        yield self.method.unpruned(self.state)
        yield self.method.deploy(self.state)
        for id in self.devices:
            yield self.method.deploy(self.state, id)


@dataclass(frozen=True)
class Scored:
    """A deployed model's score on the test rows, and its sparsity."""

    score: Score
    sparsity: float


def spread_out(devices: tuple[DeviceId, ...], most: int) -> tuple[DeviceId, ...]:
    """At most `most` of the devices, spread evenly over their order, with the first and the last.

    >>> spread_out(("a", "b", "c", "d", "e"), 3)
    ('a', 'c', 'e')
    """
    count = min(most, len(devices))
    return tuple(devices[i] for i in np.linspace(0, len(devices) - 1, count).round().astype(int))


def score_models(
    deployment: Deployment,
    task: Task,
    workers: Workers,
    rows: int,
    on_progress: Callable[[int, int], None] = lambda done, models: None,
) -> list[Scored]:
    """The score of every model of the deployment, in its order, on the first `rows` rows of the
    shuffled test set.

    Equal models are scored once. `on_progress` gets the number of scored models and of all models.
    """
    sparsities: list[float] = []
    names: list[str] = []  # the digest of each model in turn
    scored: list[str] = []  # the digests in the order of scoring

    def jobs() -> Iterator[ScoreJob]:
        # models of one structure, which wait to be scored in one pass
        alike: dict[Any, dict[str, bytes]] = {}
        for model in deployment.models():
            packed = pack(model)
            name, shape = packed.sha256, _shape(model)
            known = name in names
            sparsities.append(
                0.0 if isinstance(model, NetModel) else sparsity(task.base.layout, model.structure)
            )
            names.append(name)
            if known:
                continue
            waiting = alike.setdefault(shape, {})
            waiting[name] = packed.payload
            if len(waiting) == workers.together:
                yield job(alike.pop(shape))
        yield from map(job, alike.values())

    def job(models: dict[str, bytes]) -> ScoreJob:
        scored.extend(models)
        return ScoreJob(models=tuple(models.values()), rows=rows)

    by_name: dict[str, Score] = {}
    models = 2 + len(deployment.devices)
    done = 0
    on_progress(done, models)
    for score in workers.run(jobs()):
        by_name[scored[len(by_name)]] = score
        done = sum(name in by_name for name in names)
        on_progress(done, models)
    if done < models:  # the others equal models that are scored already
        on_progress(models, models)
    return [Scored(by_name[name], share) for name, share in zip(names, sparsities, strict=True)]


def marks(scored: list[Scored], kind: str) -> dict[str, Any]:
    """The metrics of a result of `score_models`: means over devices, and those of the global and
    the unpruned model.
    """
    unpruned, common, *devices = (each.score for each in scored)
    found = {
        "devices": len(devices),
        "sparsity": float(np.mean([each.sparsity for each in scored[2:]])),
        "loss": float(np.mean([score.mean_loss for score in devices])),
        "loss_global": common.mean_loss,
        "loss_dense": unpruned.mean_loss,
    }
    if kind == "causal-lm":
        return found
    return found | {
        "accuracy": float(np.mean([score.accuracy for score in devices])),
        "accuracy_lowest": float(min(score.accuracy for score in devices)),
        "accuracy_global": common.accuracy,
        "accuracy_dense": unpruned.accuracy,
    }


def _shape(model: Model | NetModel) -> Any:
    """The key of a model; models with equal keys can be scored in one pass."""
    if isinstance(model, NetModel):
        return model.net
    return (
        key_of(model.structure),
        tuple(sorted(model.adapter)),
        tuple(sorted(model.head)),
        model.scale,
    )
