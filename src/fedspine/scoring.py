"""How good the models are that a run deploys: each device's own, the one for everybody, and the unpruned one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.device import DeviceId
from fedspine.fleets.workers import ScoreJob, Workers
from fedspine.lm.base import Model
from fedspine.lm.structure import key_of, sparsity
from fedspine.message import pack
from fedspine.nets.net import NetModel
from fedspine.task import Task


@dataclass(frozen=True)
class Deployment:
    """What a method deploys from one state to some of the devices."""

    method: Any
    state: Any
    devices: tuple[DeviceId, ...]

    def models(self) -> Iterator[Model | NetModel]:
        """The unpruned model, everybody's, then each device's, made one at a time."""
        yield self.method.unpruned(self.state)
        yield self.method.deploy(self.state)
        for id in self.devices:
            yield self.method.deploy(self.state, id)


def spread_out(devices: tuple[DeviceId, ...], most: int) -> tuple[DeviceId, ...]:
    """At most `most` of the devices, evenly over their order, the first and the last among them.

    >>> spread_out(("a", "b", "c", "d", "e"), 3)
    ('a', 'c', 'e')
    """
    count = min(most, len(devices))
    return tuple(devices[i] for i in np.linspace(0, len(devices) - 1, count).round().astype(int))


def marks(deployment: Deployment, task: Task, workers: Workers, rows: int) -> dict[str, Any]:
    """Accuracy and loss on `rows` test rows: the mean over the devices' models, everybody's and the unpruned one's."""
    sparsities: list[float] = []
    names: list[str] = []  # the digest of each model in turn; equal models are scored once
    scored: list[str] = []  # the digests in the order of scoring

    def jobs() -> Iterator[ScoreJob]:
        alike: dict[
            Any, dict[str, bytes]
        ] = {}  # models of one structure, which wait to be scored in one pass
        for model in deployment.models():
            packed = pack(model)
            name, shape = packed.sha256, _shape(model)
            known = name in names
            sparsities.append(
                0.0 if isinstance(model, NetModel) else sparsity(task.base.anatomy, model.structure)
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

    scores = list(workers.run(jobs()))
    by_name = dict(zip(scored, scores, strict=True))
    unpruned, common, *devices = (by_name[name] for name in names)
    found = {
        "devices": len(devices),
        "sparsity": float(np.mean(sparsities[2:])),
        "loss": float(np.mean([score.mean_loss for score in devices])),
        "loss_global": common.mean_loss,
        "loss_dense": unpruned.mean_loss,
    }
    if task.kind == "causal-lm":
        return found
    return found | {
        "accuracy": float(np.mean([score.accuracy for score in devices])),
        "accuracy_lowest": float(min(score.accuracy for score in devices)),
        "accuracy_global": common.accuracy,
        "accuracy_dense": unpruned.accuracy,
    }


def _shape(model: Model | NetModel) -> Any:
    """What models that are scored in one pass must share."""
    if isinstance(model, NetModel):
        return model.net
    return (
        key_of(model.structure),
        tuple(sorted(model.adapter)),
        tuple(sorted(model.head)),
        model.scale,
    )
