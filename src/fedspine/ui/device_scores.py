"""Every device's own model of a run, scored on the whole test set: what `fedspine show --all`
shows.

A run scores a stated sample of its devices' models, since each is a pass over the test set.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from fedspine.core.strict import parsed
from fedspine.execution.scoring import Deployment, Scored, score_models
from fedspine.exports.saved_run import device_ids_of, saved_state
from fedspine.runs.assemble import assemble, workers_for
from fedspine.runs.observer import RunObserver
from fedspine.runs.run_dir import DEVICE_SCORES, recipe_of
from fedspine.storage.store import write_atomically


def device_scores(folder: Path, progress: RunObserver) -> dict[str, dict[str, Any]]:
    """Accuracy (not for language models), loss in nats, and sparsity of each device's model, by the
    device's id.

    They are computed once and kept in the run's folder. Raises BadInput for a folder that is no
    run, one that has not finished a round, and data that cannot be read.
    """
    state = saved_state(folder)
    path = folder / DEVICE_SCORES
    try:
        kept = dict(parsed(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or damaged
        kept = {}
    if kept.get("rounds") != state.round or "devices" not in kept:
        kept = {"rounds": state.round, "devices": _scored(folder, state, progress)}
        write_atomically(path, json.dumps(kept, indent=1).encode())
    return kept["devices"]


def _scored(folder: Path, saved: Any, progress: RunObserver) -> dict[str, dict[str, Any]]:
    recipe, ids = recipe_of(folder), tuple(device_ids_of(folder))
    progress.stage("loading model and data")
    assembled = assemble(recipe, here=False)
    deployment = Deployment(recipe.method, saved.state["method"], ids)
    with tempfile.TemporaryDirectory() as cache:
        workers = workers_for(assembled, Path(cache))
        try:
            _, _, *scored = score_models(
                deployment,
                assembled.task,
                workers,
                len(assembled.task.test),
                lambda done, models: progress.scored(done, models, None),
            )
        finally:
            workers.close()
    judged = assembled.task.kind != "causal-lm"
    return {id: _entry(one, judged) for id, one in zip(ids, scored, strict=True)}


def _entry(scored: Scored, judged: bool) -> dict[str, Any]:
    found = {"loss": scored.score.mean_loss, "sparsity": scored.sparsity}
    return {"accuracy": scored.score.accuracy} | found if judged else found
