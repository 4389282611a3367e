"""What a run has reached: checks on the way, the final score, warnings, references, the summary."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.message import pack
from fedspine.core.method import planned_sparsities
from fedspine.execution.scoring import Deployment, marks, score_models, spread_out
from fedspine.execution.workers import ScoreJob
from fedspine.lm.base import Model
from fedspine.lm.structure import full
from fedspine.report.rows import RunRows, read_rows
from fedspine.runs import references, task_record
from fedspine.runs.assemble import test_order
from fedspine.runs.eta import Estimate
from fedspine.runs.observer import RunObserver
from fedspine.runs.own_rows import own_scores, with_own_head
from fedspine.runs.read_data import dataset
from fedspine.runs.run_context import Point, RunContext
from fedspine.runs.run_dir import RECORDS
from fedspine.runs.run_warnings import CheckContext, doubt, skewed
from fedspine.storage.records import plain


def check(context: RunContext, point: Point) -> dict[str, Any] | None:
    """Score a few models on some of the test rows, off the virtual clock, if a check is due."""
    run = context.recipe.run
    if (
        not run.evaluate_every
        or point.round % run.evaluate_every
        or run.over(point.round, context.fleet.now)
    ):
        return None
    rows = min(run.evaluate_rows, len(context.assembled.task.test))
    return _score(context, point, rows, run.evaluate_devices, final=False)


def _score(
    context: RunContext,
    point: Point,
    rows: int,
    devices: int,
    *,
    final: bool,
    on_progress: Callable[[int, int], None] = lambda done, models: None,
) -> dict[str, Any]:
    chosen = spread_out(tuple(profile.id for profile in context.fleet.devices), devices)
    deployment = Deployment(context.recipe.method, point.state, chosen)
    scored = score_models(deployment, context.assembled.task, context.workers, rows, on_progress)
    found = marks(scored, context.assembled.task.kind)
    context.records.write("score", now=context.fleet.now, final=final, **found)
    return found


def _own_scores(context: RunContext, point: Point) -> dict[str, Any]:
    """The scores of the devices' own models on the rows that they hold out, where they do."""
    if not context.assembled.held_out:
        return {}
    everyone = tuple(profile.id for profile in context.fleet.devices)
    method, memories = context.recipe.method, context.fleet.memories
    models = {
        id: with_own_head(method.deploy(point.state, id), id, memories, context.store)
        for id in spread_out(everyone, context.recipe.run.final_devices)
    }
    indices = {id: index for index, id in enumerate(everyone)}
    return own_scores(models, method.deploy(point.state), indices, context.workers)


def current_doubt(context: RunContext, point: Point) -> str | None:
    """A warning about the run, judged by its last score."""
    run, task = context.recipe.run, context.assembled.task
    rows = recorded(context)
    final = bool(rows.scores) and rows.scores[-1].final
    scored = run.final_rows_of(len(task.test)) if final else min(run.evaluate_rows, len(task.test))
    seen = CheckContext(scored, _commonest(context, scored), _skewed(context))
    return doubt(context.recipe, rows, seen, point.round)


def last_doubts(context: RunContext, point: Point) -> list[str]:
    """The warnings of the run so far, and that of its final score."""
    said = [warned.line for warned in recorded(context).warnings]
    if last := current_doubt(context, point):
        context.records.write("warning", line=last)
        return [*said, last]
    return [f"{line} (the run recovered later)" for line in said]


def recorded(context: RunContext) -> RunRows:
    """All records of the run so far."""
    context.records.flush()
    return read_rows(context.run_dir / RECORDS)


def _commonest(context: RunContext, rows: int) -> float | None:
    """The commonest class's share of the first `rows` test rows that are scored."""
    labels = getattr(context.assembled.task.test, "labels", None)
    return references.commonest_share(
        None if labels is None else labels[test_order(context.assembled)[:rows]]
    )


def _skewed(context: RunContext) -> bool:
    """Whether devices' labels are skewed; unknown, so not, where they are elsewhere."""
    labels, shares = context.assembled.task.train.labels, context.assembled.shares
    return labels is not None and len(labels) > 0 and skewed(labels, shares)


def reference_scores(
    context: RunContext, progress: RunObserver, *, simulated: bool
) -> dict[str, float]:
    """Reference scores beside the final score; those from training rows in simulation only."""
    run, task = context.recipe.run, context.assembled.task
    if not run.references:
        return {}
    scored = test_order(context.assembled)[: run.final_rows_of(len(task.test))]

    def compute() -> dict[str, float]:
        if task.kind == "causal-lm":
            untuned = Model(structure=full(task.base.layout), adapter={}, head={}, scale=1.0)
            (score,) = context.workers.run([ScoreJob((pack(untuned).payload,), len(scored))])
            return plain({"reference_base": score.mean_loss})
        found = {"reference_commonest": _commonest(context, len(scored))}
        if simulated:
            progress.stage("fitting a reference on the pooled rows")
            name = "logistic" if task.kind == "array" else "tfidf"
            try:
                data = dataset(context.recipe)
                now = task_record.record_of(context.recipe, data)
                if now.data_sha256 != context.assembled.record.data_sha256:
                    raise BadInput(f"{context.recipe.task.data} has changed since the run began")
                value = references.classical(data.train, data.test, scored)
                found[f"reference_{name}"] = value
            except (BadInput, ImportError) as error:  # without it the run only lacks a reference
                progress.say(f"no reference score: {error}")
        return {key: value for key, value in found.items() if value is not None}

    return references.kept(context.run_dir, compute)


def _structure(context: RunContext, point: Point) -> dict[str, Any]:
    """Of a method that prunes: which structure it was to have, and what the global model, which has
    as many units as each device's, keeps.
    """
    method = context.recipe.method
    kind = getattr(method, "structure", None)
    if kind is None:
        return {}
    layout, kept = context.assembled.task.base.layout, method.deploy(point.state).structure
    return {
        "structure": kind,
        "sparsity_asked": method.sparsity,
        "heads_kept": kept.heads.sum(1).tolist(),
        "channels_kept": kept.channels.sum(1).tolist(),
        "heads": layout.heads,
        "channels": layout.channels,
    }


def _vocabulary(context: RunContext) -> dict[str, Any]:
    """What is left of the model's vocabulary, where the run reduces it."""
    found, section = context.assembled.vocabulary, context.recipe.task.vocabulary
    if found is None or section is None:
        return {}
    counted = {"texts": section.texts, "epsilon": section.epsilon_of_texts}
    return {"vocabulary": asdict(found.about) | counted}


def summary(
    context: RunContext, point: Point, estimate: Estimate, progress: RunObserver
) -> dict[str, Any]:
    """The final score and all else that `summary.json` keeps, but warnings, references and what was
    spent of a privacy budget.
    """
    recipe, sums, watch = context.recipe, point.sums, point.watch
    rows = recipe.run.final_rows_of(len(context.assembled.task.test))
    begun = time.monotonic()

    def on_progress(done: int, models: int) -> None:
        left = estimate.scoring_left(done, time.monotonic() - begun)
        progress.scored(done, models, left)

    found = _score(
        context, point, rows, recipe.run.final_devices, final=True, on_progress=on_progress
    )
    found |= _own_scores(context, point)
    context.records.flush()
    return plain(
        {
            "method": recipe.method.name,
            "model": recipe.task.model,
            "data": recipe.task.data,
            "kind": recipe.task.kind,
            "classes": len(context.assembled.task.label_names),
            "seed": recipe.run.seed,
            "rounds": point.round,
            "devices": recipe.fleet.devices,
            "devices_scored": found.pop("devices"),
            "test_rows": rows,
            "rows_left_out": dict(context.assembled.left_out),
            **found,
            **_structure(context, point),
            **_vocabulary(context),
            "tuned_unpruned": not any(planned_sparsities(recipe.method, recipe.run.rounds)),
            f"{context.fleet.clock}_seconds": context.fleet.now,
            "waiting_seconds": sums.waiting_seconds,
            "bytes_up": sums.bytes_up,
            "bytes_down": sums.bytes_down,
            "peak_memory_bytes_simulated": sums.peak_memory_bytes,
            "exchanges": sums.exchanges,
            "replies_late": sums.late,
            "replies_lost": sums.lost,
            "computing": context.workers.computing,
            "wall_seconds": watch.total,
            "server_wall_seconds": sums.server_wall_seconds,
            "samples_per_second": sums.samples / watch.training if watch.training else 0.0,
            "data_sha256": context.assembled.record.data_sha256,
            "model_sha256": context.assembled.record.model_sha256,
            "state_sha256": pack(point.state).sha256,
        }
    )
