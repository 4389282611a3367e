"""Rows that each simulated device holds out, and the scores of what it runs on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedspine.core.device import DeviceId
from fedspine.core.message import pack, unpack
from fedspine.execution.workers import ScoreJob, Workers
from fedspine.lm.held import HEAD
from fedspine.lm.score import Score
from fedspine.runs.config import Recipe
from fedspine.storage.store import Store

HELD_OUT = 104  # the purpose of its random stream, apart from those of `assemble`


def held_out_by(
    recipe: Recipe, shares: tuple[np.ndarray, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The rows that devices train on, and those that they hold out, as the recipe says."""
    if recipe.fleet.held_out is None or not shares:
        return shares, ()
    rng = np.random.default_rng([recipe.run.seed, HELD_OUT])
    return held_out_of(shares, recipe.fleet.held_out, rng)


def held_out_of(
    shares: Sequence[np.ndarray], share: float, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The rows that each device trains on, and those that it holds out, both ascending.

    A random `share` of its rows, rounded, and at least one; none of a device with a single row.

    >>> kept, held = held_out_of([np.arange(10), np.arange(1)], 0.2, np.random.default_rng(0))
    >>> [len(rows) for rows in kept + held]
    [8, 1, 2, 0]
    """
    kept, held = [], []
    for rows in shares:
        most = len(rows) - 1
        count = min(most, max(1, round(share * len(rows))))
        drawn = np.sort(rng.permutation(len(rows))[:count])
        held.append(rows[drawn])
        kept.append(np.delete(rows, drawn))
    return tuple(kept), tuple(held)


def own_scores(
    models: Mapping[DeviceId, Any],
    common: Any,
    indices: Mapping[DeviceId, int],
    workers: Workers,
) -> dict[str, float]:
    """Means over devices of the accuracy and the loss of each one's own model, and of the `common`
    one, on the rows that the device holds out; devices that hold out none are left out.
    """
    rows = {id: workers.rows_held_out(indices[id]) for id in models}
    scored = [id for id in models if rows[id]]
    if not scored:
        return {}
    whole = pack(common).payload

    def scores(payloads: Sequence[bytes]) -> list[Score]:
        jobs = [
            ScoreJob((payload,), rows[id], device=indices[id])
            for id, payload in zip(scored, payloads, strict=True)
        ]
        return list(workers.run(jobs))

    own = scores([pack(models[id]).payload for id in scored])
    theirs = scores([whole] * len(scored))
    return {
        "devices_own": len(scored),
        "accuracy_own": float(np.mean([score.accuracy for score in own])),
        "accuracy_own_global": float(np.mean([score.accuracy for score in theirs])),
        "loss_own": float(np.mean([score.mean_loss for score in own])),
        "loss_own_global": float(np.mean([score.mean_loss for score in theirs])),
    }


def with_own_head(
    model: Any, device: DeviceId, memories: Mapping[DeviceId, str], store: Store
) -> Any:
    """The model with the head that the device keeps, where it keeps one."""
    file = memories.get(device)
    memory = {} if file is None else unpack(store.get_memory(file))
    return replace(model, head=memory[HEAD]) if HEAD in memory else model
