"""The loop: start, round, score, record, save; killed at any moment it goes on from the last saved round."""

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

from fedspine.core.errors import BadInput, Stopped
from fedspine.core.fleet import AllLost
from fedspine.core.message import pack
from fedspine.core.method import planned_sparsities
from fedspine.core.process import farewell, keep_freed_memory
from fedspine.execution.scoring import Deployment, marks, score_models, spread_out
from fedspine.execution.workers import ScoreJob, Workers
from fedspine.fleets.rounds import RoundFleet, Totals
from fedspine.lm.base import Model
from fedspine.lm.structure import full
from fedspine.report.page import REPORT, write_page
from fedspine.report.rows import Rows, read_rows
from fedspine.report.tables import counted
from fedspine.runs import references, task_record
from fedspine.runs.assemble import START, Built, around, cohort, settled, test_order, workers_for
from fedspine.runs.backend import RealSites, Simulation, Venue, venue_of
from fedspine.runs.config import Recipe
from fedspine.runs.eta import Estimate, Plan
from fedspine.runs.failure_advice import advice
from fedspine.runs.observer import Progress, Standing
from fedspine.runs.read_data import dataset
from fedspine.runs.run_dir import (
    CACHE,
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
from fedspine.runs.run_warnings import Seen, doubt, due
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
class Job:
    """What a run works with, the same from its first round to its last."""

    built: Built
    workers: Workers
    store: Store
    records: Records
    fleet: RoundFleet

    @property
    def recipe(self) -> Recipe:
        return self.built.recipe


@dataclass
class Point:
    """How far a run is: the method's state after `round` rounds, and what was added up until then."""

    round: int
    state: Any
    sums: Totals = field(default_factory=Totals)
    watch: Stopwatch = field(default_factory=Stopwatch)


def new_run(
    recipe: Recipe, folder: Path, progress: Progress, venue: Venue | None = None
) -> dict[str, Any]:
    """Run a recipe into a new folder, on simulated devices unless a venue is named; returns the summary.

    Raises BadInput for bad input, before the folder is made; Stopped where the run cannot go on.
    """
    if folder.exists():
        raise BadInput(
            f"output folder {folder} exists; choose another with --out, or go on with --resume {folder}"
        )
    venue = venue or Simulation()
    try:
        progress.stage("loading model and data")
        recipe, decided = settled(recipe)
        built = venue.build(venue.fitted(recipe))
        for line in (
            *decided,
            *built.remarks,
        ):  # said now, so that what is refused is the only line
            progress.say(line)
        make(folder, built.recipe, built)
        venue.remember(folder)
        return _guarded(built, venue, folder, progress)
    finally:
        venue.close()
        progress.close()


def resume(
    folder: Path, progress: Progress, wanted: Recipe | None = None, sites: RealSites | None = None
) -> dict[str, Any]:
    """Go on with the run in `folder`; `wanted` is the recipe that the user named, which must be the folder's.

    `sites` are needed only where a run at real sites is to reach them in another way than it began.
    """
    recipe, venue = recipe_of(folder), venue_of(folder, sites)
    wanted = wanted and venue.fitted(wanted.settled_as(recipe), begun=recipe)
    if wanted is not None and (difference := recipe.difference(wanted)):
        raise BadInput(
            f"the recipe differs from that of {folder}: {difference}; "
            "resume without a recipe, or start a new run with --out"
        )
    summary = summary_of(folder)
    try:
        if summary is None:
            progress.stage("loading model and data")
            check_age(folder)
            if recipe.open_choices:  # a sweep made the folder, and nothing was run in it yet
                wanted, decided = settled(wanted or recipe)
                write_atomically(folder / RECIPE, wanted.toml().encode())
                for line in decided:
                    progress.say(line)
            built = venue.build(wanted or recipe, begun=folder)
            remember(folder, built)
            return _guarded(built, venue, folder, progress)
        if not (folder / REPORT).exists():  # killed between the two
            _wrap_up(folder)
        return summary
    finally:
        venue.close()
        progress.close()


def _guarded(built: Built, venue: Venue, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run, and turn whatever ends a run early into one line; the last saved round stays as it is."""
    store, workers = Store(folder / STATE), workers_for(built, folder / CACHE)
    try:
        return _run(built, venue, workers, store, folder, progress)
    except BadInput:
        raise
    except KeyboardInterrupt as told:
        word, exit_code = farewell(told)
        raise Stopped(f"{word}; {_kept(store, folder)}", exit_code) from None
    except AllLost as error:
        raise Stopped(f"{error}; {_advice(error, built, venue, store, folder)}") from None
    except OSError as error:
        raise Stopped(
            f"{error.filename or folder}: {error.strerror or error}; {_kept(store, folder)}"
        ) from error
    except Exception as error:
        with suppress(OSError):
            (folder / FAILURE).write_text(
                "".join(traceback.format_exception(error)), encoding="utf-8"
            )
        lines = str(error).strip().splitlines() or [""]
        what = " ".join(dict.fromkeys((lines[0], lines[-1])))  # of a worker's traceback, its cause
        where = f"details are in {folder / FAILURE}"
        then = _advice(error, built, venue, store, folder)
        raise Stopped(f"{type(error).__name__}: {what}; {then}; {where}") from error
    finally:
        store.close()
        workers.close()
        shutil.rmtree(folder / CACHE, ignore_errors=True)


def _kept(store: Store, folder: Path) -> str:
    return f"{_saved(store)}; go on with: fedspine run --resume {folder}"


def _saved(store: Store) -> str:
    rounds = store.rounds()
    return f"{counted(rounds, 'round')} saved" if rounds else "no round is saved yet"


def _advice(error: Exception, built: Built, venue: Venue, store: Store, folder: Path) -> str:
    simulated = isinstance(venue, Simulation)
    return advice(error, built.recipe, _saved(store), folder, simulated=simulated)


def _run(
    built: Built, venue: Venue, workers: Workers, store: Store, folder: Path, progress: Progress
) -> dict[str, Any]:
    torch.set_num_threads(1)  # sums must not depend on how many cores there are
    keep_freed_memory()
    saved = store.open()
    records = Records(folder / RECORDS, saved.records if saved else 0)
    try:
        job = Job(built, workers, store, records, venue.fleet(built, workers, store, records))
        recipe = built.recipe
        point = _begun(job) if saved is None else _restored(job, saved)
        title = f"{recipe.method.name}: {recipe.task.model} on {recipe.task.data}, {recipe.fleet.devices} devices"
        progress.started(recipe.run.rounds, title, done=point.round)
        _rounds(job, point, folder, progress)
        progress.stage("scoring the deployed models")
        simulated = isinstance(venue, Simulation)
        summary = _summary(job, point, progress)
        summary |= _references(job, folder, progress, simulated=simulated)
        if lines := _last_doubts(job, point, folder):
            summary["warnings"] = lines
            for line in lines:
                progress.say(f"warning: {line}")
        job.records.flush()
    finally:
        records.close()
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=1).encode())
    _wrap_up(folder)
    return summary


def _wrap_up(folder: Path) -> None:
    write_page(folder)
    (folder / FAILURE).unlink(missing_ok=True)  # of an earlier attempt


def _begun(job: Job) -> Point:
    rng = np.random.default_rng([job.recipe.run.seed, START])
    return Point(round=0, state=job.recipe.method.start(job.built.task, rng))


def _restored(job: Job, saved: Saved) -> Point:
    if saved.state["recipe"] != job.recipe.fingerprint:
        raise BadInput(
            "the recipe of this run was changed after it began; undo the change, or start a new run"
        )
    if saved.state["computing"] != job.workers.computing:
        raise BadInput(
            f"this run was computed by {saved.state['computing']}, here it would be by {job.workers.computing}, which rounds "
            "otherwise; resume it where it began, or start a new run"
        )
    job.fleet.restore(saved.fleet, saved.memories)
    job.records.round = (
        saved.round - 1
    )  # of which the final score is written, where no round is left
    return Point(
        round=saved.round,
        state=saved.state["method"],
        sums=Totals(**saved.state["sums"]),
        watch=Stopwatch(**saved.state["watch"]),
    )


def _rounds(job: Job, point: Point, folder: Path, progress: Progress) -> None:
    """Everything that is left to do, saved round by round."""
    found: dict[str, Any] = {}
    run = job.recipe.run
    sparsities = planned_sparsities(job.recipe.method, run.rounds)
    estimate = Estimate(Plan.of(run, sparsities, len(job.fleet.devices), len(job.built.task.test)))
    while not run.over(point.round, job.fleet.now):
        estimate.saw_round(point.round, *_one_round(job, point))
        begun = time.monotonic()
        if checked := _check(job, point):
            found = checked
            estimate.saw_check(point.round, time.monotonic() - begun)
            if due(job.recipe, point.round) and (line := _doubt(job, point, folder)):
                job.records.write("warning", line=line)
                progress.say(f"warning: {line}")
        sums, watch = point.sums, point.watch
        rounds = run.expected_rounds(point.round, job.fleet.now)
        progress.round_done(
            Standing(
                round=point.round,
                rounds=rounds,
                seconds_left=estimate.left(point.round, rounds),
                now=job.fleet.now,
                clock=job.fleet.clock,
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
            "recipe": job.recipe.fingerprint,
            "computing": job.workers.computing,
        }
        fleet = job.fleet
        job.store.save(
            Saved(point.round, state, fleet.snapshot(), fleet.memories, job.records.flush())
        )


def _one_round(job: Job, point: Point) -> tuple[float, int]:
    """One round; returns its wall seconds and how many samples were trained on."""
    started = time.monotonic()
    totals = job.fleet.begin_round(point.round)
    everyone = job.fleet.devices
    part = job.fleet.cohort(everyone[i].id for i in cohort(job.recipe, point.round, len(everyone)))
    point.state = job.recipe.method.round(point.state, around(job.recipe, part))
    seconds = time.monotonic() - started
    point.watch.training += seconds
    job.fleet.end_round(seconds)
    point.sums.add(totals)
    point.round += 1
    return seconds, totals.samples


def _check(job: Job, point: Point) -> dict[str, Any] | None:
    """Score a few models on some of the test rows, off the clock, where it is due."""
    run = job.recipe.run
    if (
        not run.evaluate_every
        or point.round % run.evaluate_every
        or run.over(point.round, job.fleet.now)
    ):
        return None
    rows = min(run.evaluate_rows, len(job.built.task.test))
    return _score(job, point, rows, run.evaluate_devices, final=False)


def _score(
    job: Job,
    point: Point,
    rows: int,
    devices: int,
    *,
    final: bool,
    told: Callable[[int, int], None] = lambda done, models: None,
) -> dict[str, Any]:
    chosen = spread_out(tuple(profile.id for profile in job.fleet.devices), devices)
    deployment = Deployment(job.recipe.method, point.state, chosen)
    scored = score_models(deployment, job.built.task, job.workers, rows, told)
    found = marks(scored, job.built.task.kind)
    job.records.write("score", now=job.fleet.now, final=final, **found)
    return found


def _doubt(job: Job, point: Point, folder: Path) -> str | None:
    """What is wrong with the run as its last score has it."""
    run, task = job.recipe.run, job.built.task
    rows = _recorded(job, folder)
    final = bool(rows.scores) and rows.scores[-1].final
    scored = run.final_rows_of(len(task.test)) if final else min(run.evaluate_rows, len(task.test))
    seen = Seen(scored, _commonest(job, scored))
    return doubt(job.recipe, rows, seen, point.round)


def _last_doubts(job: Job, point: Point, folder: Path) -> list[str]:
    """What was said of the run on its way, again, and what its last score says."""
    said = [warned.line for warned in _recorded(job, folder).warnings]
    if last := _doubt(job, point, folder):
        job.records.write("warning", line=last)
        return [*said, last]
    return [f"{line} (in the end it was better)" for line in said]


def _recorded(job: Job, folder: Path) -> Rows:
    job.records.flush()
    return read_rows(folder / RECORDS)


def _commonest(job: Job, rows: int) -> float | None:
    """The commonest class's share of the first `rows` test rows that are scored."""
    labels = getattr(job.built.task.test, "labels", None)
    return references.commonest_share(
        None if labels is None else labels[test_order(job.built)[:rows]]
    )


def _references(job: Job, folder: Path, progress: Progress, *, simulated: bool) -> dict[str, float]:
    """The yardsticks of the final score, off the clock; those of the training rows in simulation only."""
    run, task = job.recipe.run, job.built.task
    if not run.references:
        return {}
    scored = test_order(job.built)[: run.final_rows_of(len(task.test))]

    def compute() -> dict[str, float]:
        if task.kind == "causal-lm":
            untuned = Model(structure=full(task.base.layout), adapter={}, head={}, scale=1.0)
            (score,) = job.workers.run([ScoreJob((pack(untuned).payload,), len(scored))])
            return plain({"reference_base": score.mean_loss})
        found = {"reference_commonest": _commonest(job, len(scored))}
        if simulated:
            progress.stage("fitting a reference on the pooled rows")
            name = "logistic" if task.kind == "array" else "tfidf"
            try:
                data = dataset(job.recipe)
                now = task_record.record_of(job.recipe, data)
                if now.data_sha256 != job.built.record.data_sha256:
                    raise BadInput(f"{job.recipe.task.data} has changed since the run began")
                value = references.classical(data.train, data.test, scored)
                found[f"reference_{name}"] = value
            except (BadInput, ImportError) as error:  # what is missing costs a line, not the run
                progress.say(f"no reference beside the results: {error}")
        return {key: value for key, value in found.items() if value is not None}

    return references.kept(folder, compute)


def _summary(job: Job, point: Point, progress: Progress) -> dict[str, Any]:
    recipe, sums, watch = job.recipe, point.sums, point.watch
    rows = recipe.run.final_rows_of(len(job.built.task.test))
    begun = time.monotonic()

    def told(done: int, models: int) -> None:
        seconds = time.monotonic() - begun
        progress.scored(done, models, seconds / done * (models - done) if done else None)

    found = _score(job, point, rows, recipe.run.final_devices, final=True, told=told)
    job.records.flush()
    return plain(
        {
            "method": recipe.method.name,
            "model": recipe.task.model,
            "data": recipe.task.data,
            "kind": recipe.task.kind,
            "classes": len(job.built.task.label_names),
            "seed": recipe.run.seed,
            "rounds": point.round,
            "devices": recipe.fleet.devices,
            "devices_scored": found.pop("devices"),
            "test_rows": rows,
            "rows_left_out": dict(job.built.left_out),
            **found,
            "tuned_unpruned": not any(planned_sparsities(recipe.method, recipe.run.rounds)),
            f"{job.fleet.clock}_seconds": job.fleet.now,
            "waiting_seconds": sums.waiting_seconds,
            "bytes_up": sums.bytes_up,
            "bytes_down": sums.bytes_down,
            "peak_memory_bytes_simulated": sums.peak_memory_bytes,
            "exchanges": sums.exchanges,
            "replies_late": sums.lost,
            "computing": job.workers.computing,
            "wall_seconds": watch.total,
            "server_wall_seconds": sums.server_wall_seconds,
            "samples_per_second": sums.samples / watch.training if watch.training else 0.0,
            "data_sha256": job.built.record.data_sha256,
            "model_sha256": job.built.record.model_sha256,
            "state_sha256": pack(point.state).sha256,
        }
    )
