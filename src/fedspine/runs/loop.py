"""The run loop: start, round, score, record, save. A killed run resumes from its last save."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from fedspine.core.checks import Terms, check_rounds_done, check_state
from fedspine.core.errors import BadInput
from fedspine.core.method import planned_sparsities
from fedspine.core.process import keep_freed_memory
from fedspine.execution.workers import Workers
from fedspine.fleets.checked import Checked
from fedspine.fleets.rounds import Totals
from fedspine.report.page import REPORT, write_page
from fedspine.runs import evaluation
from fedspine.runs.answers import answers_at_end
from fedspine.runs.assemble import Assembled, around, begun, cohort, settled
from fedspine.runs.backend import Backend, RealSites, Simulation, backend_of
from fedspine.runs.config import Recipe
from fedspine.runs.ending import guarded
from fedspine.runs.eta import Estimate, WorkPlan
from fedspine.runs.observer import RunObserver, RunStatus
from fedspine.runs.promise import spent_of
from fedspine.runs.run_context import Point, RunContext, Stopwatch
from fedspine.runs.run_dir import (
    DEVICE_SCORES,
    FAILURE,
    RECIPE,
    RECORDS,
    STATE,
    SUMMARY,
    check_age,
    make,
    recipe_of,
    remember,
    summary_of,
)
from fedspine.runs.run_warnings import due
from fedspine.storage.records import Records
from fedspine.storage.store import Saved, Store, write_atomically


def new_run(
    recipe: Recipe, run_dir: Path, progress: RunObserver, backend: Backend | None = None
) -> dict[str, Any]:
    """Run a recipe into a new folder, on simulated devices unless a backend is given; returns the
    summary.

    Raises BadInput for bad input, before the folder is made, and Stopped if the run cannot
    continue.
    """
    if run_dir.exists():
        raise BadInput(
            f"output folder {run_dir} exists; choose another "
            f"with --out, or resume it with --resume {run_dir}"
        )
    backend = backend or Simulation()
    try:
        progress.stage("loading model and data")
        recipe, decided = settled(recipe)
        assembled = backend.assemble(backend.adapted(recipe))
        for line in (
            *decided,
            *assembled.remarks,
        ):  # only now, so that a refusal prints a single line
            progress.say(line)
        make(run_dir, assembled.recipe, assembled)
        backend.remember(run_dir)
        return _carried_out(assembled, backend, run_dir, progress)
    finally:
        backend.close()
        progress.close()


def resume(
    run_dir: Path,
    progress: RunObserver,
    wanted: Recipe | None = None,
    sites: RealSites | None = None,
    from_round: int | None = None,
) -> dict[str, Any]:
    """Resume the run in `run_dir`; `wanted` is a recipe that the user gave, which must equal the
    folder's.

    `sites` is needed only if a run at real sites is to reach them in another way than before. With
    `from_round` the run goes back to that round first, the one before the last or 0, its start.
    """
    recipe, backend = recipe_of(run_dir), backend_of(run_dir, sites)
    wanted = wanted and backend.adapted(wanted.settled_as(recipe), begun=recipe)
    if wanted is not None and (difference := recipe.difference(wanted)):
        raise BadInput(
            f"the recipe differs from that of {run_dir}: {difference}; "
            "resume without a recipe, or start a new run with --out"
        )
    if from_round is not None:
        _go_back(run_dir, from_round)
    summary = summary_of(run_dir)
    try:
        if summary is None:
            progress.stage("loading model and data")
            check_age(run_dir)
            if recipe.open_choices:  # a sweep made the folder, and nothing was run in it yet
                wanted, decided = settled(wanted or recipe)
                write_atomically(run_dir / RECIPE, wanted.toml().encode())
                for line in decided:
                    progress.say(line)
            assembled = backend.assemble(wanted or recipe, begun=run_dir)
            remember(run_dir, assembled)
            return _carried_out(assembled, backend, run_dir, progress)
        if not (run_dir / REPORT).exists():  # killed between the two
            _wrap_up(run_dir)
        return summary
    finally:
        backend.close()
        progress.close()


def _go_back(run_dir: Path, round: int) -> None:
    store, of_the_end = Store(run_dir / STATE), (SUMMARY, REPORT, DEVICE_SCORES)
    try:
        store.go_back(round, [run_dir / name for name in of_the_end])
    finally:
        store.close()


def _carried_out(
    assembled: Assembled, backend: Backend, run_dir: Path, progress: RunObserver
) -> dict[str, Any]:
    def go(store: Store, workers: Workers) -> dict[str, Any]:
        return _run(assembled, backend, workers, store, run_dir, progress)

    return guarded(go, assembled, run_dir, simulated=isinstance(backend, Simulation))


def _run(
    assembled: Assembled,
    backend: Backend,
    workers: Workers,
    store: Store,
    run_dir: Path,
    progress: RunObserver,
) -> dict[str, Any]:
    torch.set_num_threads(1)  # sums must not depend on how many cores there are
    keep_freed_memory()
    saved = store.open()
    if store.undigested:
        progress.say(
            "an older version saved this run without digests, so its state cannot be checked"
        )
    records = Records(run_dir / RECORDS, saved.records if saved else 0)
    try:
        fleet = backend.fleet(assembled, workers, store, records)
        context = RunContext(assembled, workers, store, records, fleet, run_dir)
        recipe = assembled.recipe
        point = _begun(context) if saved is None else _restored(context, saved)
        title = (
            f"{recipe.method.name}: {recipe.task.model} on {recipe.task.data}, "
            f"{recipe.fleet.devices} devices"
        )
        progress.started(recipe.run.rounds, title, done=point.round)
        estimate = _rounds(context, point, progress)
        progress.stage("scoring the deployed models")
        simulated = isinstance(backend, Simulation)
        summary = evaluation.summary(context, point, estimate, progress)
        summary |= spent_of(recipe, evaluation.recorded(context))
        summary |= evaluation.reference_scores(context, progress, simulated=simulated)
        if assembled.recipe.run.answers:
            progress.stage("answering the test rows")
            summary |= answers_at_end(assembled, workers, point.state, records)
        if lines := evaluation.last_doubts(context, point):
            summary["warnings"] = lines
            for line in lines:
                progress.say(f"warning: {line}")
        context.records.flush()
    finally:
        records.close()
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=1).encode())
    _wrap_up(run_dir)
    return summary


def _wrap_up(run_dir: Path) -> None:
    write_page(run_dir)
    (run_dir / FAILURE).unlink(missing_ok=True)  # of an earlier attempt


def _begun(context: RunContext) -> Point:
    state = begun(context.recipe, context.assembled.task)
    check_rounds_done(state, 0, "start")
    return Point(round=0, state=state)


def _restored(context: RunContext, saved: Saved) -> Point:
    if saved.state["recipe"] != context.recipe.fingerprint:
        raise BadInput(
            "the recipe of this run was changed after it began; undo the change, or start a new run"
        )
    if saved.state["computing"] != context.workers.computing:
        raise BadInput(
            f"this run was computed by {saved.state['computing']}, and here it would be by "
            f"{context.workers.computing}, which rounds differently; resume it where it began, or "
            "start a new run"
        )
    context.fleet.restore(saved.fleet, saved.memories)
    context.records.round = saved.round - 1  # the round of the final score, if none is left
    return Point(
        round=saved.round,
        state=saved.state["method"],
        sums=Totals(**saved.state["sums"]),
        watch=Stopwatch(**saved.state["watch"]),
    )


def _rounds(context: RunContext, point: Point, progress: RunObserver) -> Estimate:
    """The remaining rounds, each saved when it is done; returns what they cost."""
    found: dict[str, Any] = {}
    run = context.recipe.run
    estimate = Estimate(_work_plan(context))
    while not run.over(point.round, context.fleet.now):
        estimate.saw_round(point.round, *_one_round(context, point))
        while context.workers.lost:
            progress.say(context.workers.lost.pop(0))
        begun = time.monotonic()
        if checked := evaluation.check(context, point):
            found = checked | {"round": point.round}
            estimate.saw_check(point.round, time.monotonic() - begun)
            doubt = (
                evaluation.current_doubt(context, point)
                if due(context.recipe, point.round)
                else None
            )
            if doubt is not None:
                context.records.write("warning", line=doubt)
                progress.say(f"warning: {doubt}")
        rounds = run.expected_rounds(point.round, context.fleet.now)
        progress.round_done(
            RunStatus(
                round=point.round,
                rounds=rounds,
                seconds_left=estimate.seconds_left(point.round, rounds),
                now=context.fleet.now,
                clock=context.fleet.clock,
                accuracy=found.get("accuracy"),
                loss=found.get("loss"),
                checked=found.get("round"),
                sparsity=found.get("sparsity"),
                bytes_moved=point.sums.bytes_up + point.sums.bytes_down,
            )
        )
        _save(context, point)
    return estimate


def _save(context: RunContext, point: Point) -> None:
    state = {
        "method": point.state,
        "sums": vars(point.sums),
        "watch": {"training": point.watch.training, "before": point.watch.total},
        "recipe": context.recipe.fingerprint,
        "computing": context.workers.computing,
    }
    fleet, records = context.fleet, context.records
    context.store.save(
        Saved(
            round=point.round,
            state=state,
            fleet=fleet.snapshot(),
            memories=fleet.memories,
            records=records.flush(),
            records_sha256=records.sha256,
        )
    )


def _work_plan(context: RunContext) -> WorkPlan:
    recipe = context.recipe
    sparsities = planned_sparsities(recipe.method, recipe.run.rounds)
    rows = len(context.assembled.task.test)
    return WorkPlan.of(recipe.run, sparsities, len(context.fleet.devices), rows)


def _one_round(context: RunContext, point: Point) -> tuple[float, int]:
    """One round; returns its wall seconds and the number of training samples."""
    started = time.monotonic()
    totals = context.fleet.begin_round(point.round)
    everyone = context.fleet.devices
    part = context.fleet.cohort(
        everyone[i].id for i in cohort(context.recipe, point.round, len(everyone))
    )
    asked = around(context.recipe, part, context.fleet.in_flight)
    fleet = Checked(
        asked,
        Terms.of(context.assembled.task),
        everyone=everyone,
        quorum=context.fleet.quorum,
        exchanges=context.exchanges,
    )
    state = context.recipe.method.round(point.state, fleet)
    check_rounds_done(state, point.round + 1, "round")
    check_state(state)
    point.state = state
    seconds = time.monotonic() - started
    point.watch.training += seconds
    context.fleet.end_round(seconds)
    point.sums.add(totals)
    point.round += 1
    return seconds, totals.samples
