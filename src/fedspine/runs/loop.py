"""The run loop: start, round, score, record, save. A killed run resumes from its last save."""

import json
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.core.checks import Terms, check_state
from fedspine.core.errors import BadInput, Stopped
from fedspine.core.fleet import AllLost, Diverged
from fedspine.core.message import pack
from fedspine.core.method import planned_sparsities
from fedspine.core.process import farewell, keep_freed_memory
from fedspine.execution.scoring import Deployment, marks, score_models, spread_out
from fedspine.execution.workers import ScoreJob, Workers
from fedspine.fleets.checked import Checked, Exchanges
from fedspine.fleets.rounds import RoundFleet, Totals
from fedspine.lm.base import Model
from fedspine.lm.structure import full
from fedspine.report.page import REPORT, write_page
from fedspine.report.rows import RunRows, read_rows
from fedspine.report.tables import counted
from fedspine.runs import references, task_record
from fedspine.runs.assemble import (
    START,
    Assembled,
    around,
    cohort,
    settled,
    test_order,
    workers_for,
)
from fedspine.runs.backend import Backend, RealSites, Simulation, backend_of
from fedspine.runs.config import Recipe
from fedspine.runs.eta import Estimate, WorkPlan
from fedspine.runs.failure_advice import advice
from fedspine.runs.observer import RunObserver, RunStatus
from fedspine.runs.promise import spent_of
from fedspine.runs.read_data import dataset
from fedspine.runs.run_dir import (
    CACHE,
    DEVICE_SCORES,
    ENDED,
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
from fedspine.runs.run_warnings import CheckContext, doubt, due
from fedspine.storage.records import Records, plain
from fedspine.storage.store import Saved, Store, write_atomically


@dataclass
class Stopwatch:
    """Wall seconds of this run, those before a resume included."""

    training: float = 0.0
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.started


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that stay the same in all rounds."""

    assembled: Assembled
    workers: Workers
    store: Store
    records: Records
    fleet: RoundFleet
    exchanges: Exchanges = field(default_factory=Exchanges)

    @property
    def recipe(self) -> Recipe:
        return self.assembled.recipe


@dataclass
class Point:
    """The progress of a run: the method's state after `round` rounds, and the sums until then."""

    round: int
    state: Any
    sums: Totals = field(default_factory=Totals)
    watch: Stopwatch = field(default_factory=Stopwatch)


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
            f"with --out, or go on with --resume {run_dir}"
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
        return _guarded(assembled, backend, run_dir, progress)
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
            return _guarded(assembled, backend, run_dir, progress)
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


def _guarded(
    assembled: Assembled, backend: Backend, run_dir: Path, progress: RunObserver
) -> dict[str, Any]:
    """Run, and turn any error into one line; the last saved round stays untouched."""
    store, workers = Store(run_dir / STATE), workers_for(assembled, run_dir / CACHE)
    try:
        attempt = Attempt.of(run_dir, store)
        (run_dir / ENDED).unlink(missing_ok=True)  # of an earlier attempt
        return _run(assembled, backend, workers, store, run_dir, progress)
    except BadInput:
        raise
    except KeyboardInterrupt as interrupt:
        word, exit_code = farewell(interrupt)
        raise _stopped(run_dir, f"{word}; {_kept(store, run_dir)}", exit_code) from None
    except AllLost as error:
        if isinstance(error, Diverged) and attempt.is_second(error, store):
            with suppress(BadInput):  # where the round before is not whole, this one stays
                store.go_back(attempt.rounds - 1)
        then = _advice(error, assembled, backend, store, run_dir)
        raise _stopped(run_dir, f"{error}; {then}") from None
    except OSError as error:
        what = f"{error.filename or run_dir}: {error.strerror or error}"
        raise _stopped(run_dir, f"{what}; {_kept(store, run_dir)}") from error
    except Exception as error:
        with suppress(OSError):
            (run_dir / FAILURE).write_text(
                "".join(traceback.format_exception(error)), encoding="utf-8"
            )
        lines = str(error).strip().splitlines() or [""]
        what = " ".join(dict.fromkeys((lines[0], lines[-1])))  # of a worker's traceback, its cause
        where = f"details are in {run_dir / FAILURE}"
        then = _advice(error, assembled, backend, store, run_dir)
        raise _stopped(run_dir, f"{type(error).__name__}: {what}; {then}; {where}") from error
    finally:
        store.close()
        workers.close()
        shutil.rmtree(run_dir / CACHE, ignore_errors=True)


@dataclass(frozen=True)
class Attempt:
    """Where an attempt to go on with a run began, and the line that ended the one before."""

    rounds: int
    ended: str

    @classmethod
    def of(cls, run_dir: Path, store: Store) -> "Attempt":
        path = run_dir / ENDED
        return cls(store.rounds(), path.read_text(encoding="utf-8") if path.exists() else "")

    def is_second(self, error: Diverged, store: Store) -> bool:
        """Whether all replies to the last saved state were not finite for a second time in a row,
        and there is a round before it, whose state devices could use.
        """
        return self.rounds == store.rounds() > 1 and self.ended.startswith(str(error))


def _stopped(run_dir: Path, line: str, exit_code: int = 2) -> Stopped:
    """The error that ends the command; its line stays in the run directory for `fedspine show`."""
    with suppress(OSError):
        write_atomically(run_dir / ENDED, line.encode())
    return Stopped(line, exit_code)


def _kept(store: Store, run_dir: Path) -> str:
    return f"{_saved(store)}; go on with: fedspine run --resume {run_dir}"


def _saved(store: Store) -> str:
    rounds = store.rounds()
    return f"{counted(rounds, 'round')} saved" if rounds else "no round is saved yet"


def _advice(
    error: Exception, assembled: Assembled, backend: Backend, store: Store, run_dir: Path
) -> str:
    simulated = isinstance(backend, Simulation)
    return advice(error, assembled.recipe, _saved(store), run_dir, simulated=simulated)


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
            "an older version saved this run, without digests: its state is taken as it is"
        )
    records = Records(run_dir / RECORDS, saved.records if saved else 0)
    try:
        context = RunContext(
            assembled, workers, store, records, backend.fleet(assembled, workers, store, records)
        )
        recipe = assembled.recipe
        point = _begun(context) if saved is None else _restored(context, saved)
        title = (
            f"{recipe.method.name}: {recipe.task.model} on {recipe.task.data}, "
            f"{recipe.fleet.devices} devices"
        )
        progress.started(recipe.run.rounds, title, done=point.round)
        estimate = _rounds(context, point, run_dir, progress)
        progress.stage("scoring the deployed models")
        simulated = isinstance(backend, Simulation)
        summary = _summary(context, point, estimate, progress)
        summary |= spent_of(recipe, _recorded(context, run_dir))
        summary |= _references(context, run_dir, progress, simulated=simulated)
        if lines := _last_doubts(context, point, run_dir):
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
    rng = np.random.default_rng([context.recipe.run.seed, START])
    return Point(round=0, state=context.recipe.method.start(context.assembled.task, rng))


def _restored(context: RunContext, saved: Saved) -> Point:
    if saved.state["recipe"] != context.recipe.fingerprint:
        raise BadInput(
            "the recipe of this run was changed after it began; undo the change, or start a new run"
        )
    if saved.state["computing"] != context.workers.computing:
        raise BadInput(
            f"this run was computed by {saved.state['computing']}, here "
            f"it would be by {context.workers.computing}, which rounds "
            "otherwise; resume it where it began, or start a new run"
        )
    context.fleet.restore(saved.fleet, saved.memories)
    context.records.round = saved.round - 1  # the round of the final score, if none is left
    return Point(
        round=saved.round,
        state=saved.state["method"],
        sums=Totals(**saved.state["sums"]),
        watch=Stopwatch(**saved.state["watch"]),
    )


def _rounds(context: RunContext, point: Point, run_dir: Path, progress: RunObserver) -> Estimate:
    """The remaining rounds, each saved when it is done; returns what they cost."""
    found: dict[str, Any] = {}
    run = context.recipe.run
    estimate = Estimate(_work_plan(context))
    while not run.over(point.round, context.fleet.now):
        estimate.saw_round(point.round, *_one_round(context, point))
        while context.workers.lost:
            progress.say(context.workers.lost.pop(0))
        begun = time.monotonic()
        if checked := _check(context, point):
            found = checked
            estimate.saw_check(point.round, time.monotonic() - begun)
            if due(context.recipe, point.round) and (line := _doubt(context, point, run_dir)):
                context.records.write("warning", line=line)
                progress.say(f"warning: {line}")
        sums, watch = point.sums, point.watch
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
                sparsity=found.get("sparsity"),
                bytes_moved=sums.bytes_up + sums.bytes_down,
            )
        )
        state = {
            "method": point.state,
            "sums": vars(sums),
            "watch": {"training": watch.training, "before": watch.total},
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
    return estimate


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
    check_state(state)
    point.state = state
    seconds = time.monotonic() - started
    point.watch.training += seconds
    context.fleet.end_round(seconds)
    point.sums.add(totals)
    point.round += 1
    return seconds, totals.samples


def _check(context: RunContext, point: Point) -> dict[str, Any] | None:
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


def _doubt(context: RunContext, point: Point, run_dir: Path) -> str | None:
    """A warning about the run, judged by its last score."""
    run, task = context.recipe.run, context.assembled.task
    rows = _recorded(context, run_dir)
    final = bool(rows.scores) and rows.scores[-1].final
    scored = run.final_rows_of(len(task.test)) if final else min(run.evaluate_rows, len(task.test))
    check = CheckContext(scored, _commonest(context, scored))
    return doubt(context.recipe, rows, check, point.round)


def _last_doubts(context: RunContext, point: Point, run_dir: Path) -> list[str]:
    """The warnings of the run so far, and that of its final score."""
    said = [warned.line for warned in _recorded(context, run_dir).warnings]
    if last := _doubt(context, point, run_dir):
        context.records.write("warning", line=last)
        return [*said, last]
    return [f"{line} (in the end it was better)" for line in said]


def _recorded(context: RunContext, run_dir: Path) -> RunRows:
    context.records.flush()
    return read_rows(run_dir / RECORDS)


def _commonest(context: RunContext, rows: int) -> float | None:
    """The commonest class's share of the first `rows` test rows that are scored."""
    labels = getattr(context.assembled.task.test, "labels", None)
    return references.commonest_share(
        None if labels is None else labels[test_order(context.assembled)[:rows]]
    )


def _references(
    context: RunContext, run_dir: Path, progress: RunObserver, *, simulated: bool
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
                progress.say(f"no reference beside the results: {error}")
        return {key: value for key, value in found.items() if value is not None}

    return references.kept(run_dir, compute)


def _summary(
    context: RunContext, point: Point, estimate: Estimate, progress: RunObserver
) -> dict[str, Any]:
    recipe, sums, watch = context.recipe, point.sums, point.watch
    rows = recipe.run.final_rows_of(len(context.assembled.task.test))
    begun = time.monotonic()

    def on_progress(done: int, models: int) -> None:
        left = estimate.scoring_left(done, time.monotonic() - begun)
        progress.scored(done, models, left)

    found = _score(
        context, point, rows, recipe.run.final_devices, final=True, on_progress=on_progress
    )
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
            "tuned_unpruned": not any(planned_sparsities(recipe.method, recipe.run.rounds)),
            f"{context.fleet.clock}_seconds": context.fleet.now,
            "waiting_seconds": sums.waiting_seconds,
            "bytes_up": sums.bytes_up,
            "bytes_down": sums.bytes_down,
            "peak_memory_bytes_simulated": sums.peak_memory_bytes,
            "exchanges": sums.exchanges,
            "replies_late": sums.lost,
            "computing": context.workers.computing,
            "wall_seconds": watch.total,
            "server_wall_seconds": sums.server_wall_seconds,
            "samples_per_second": sums.samples / watch.training if watch.training else 0.0,
            "data_sha256": context.assembled.record.data_sha256,
            "model_sha256": context.assembled.record.model_sha256,
            "state_sha256": pack(point.state).sha256,
        }
    )
