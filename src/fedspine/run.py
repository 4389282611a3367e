"""The loop: start, round, score, record, save; killed at any moment it goes on from the last saved round."""

import errno
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.build import START, Built, around, build, cohort, simulate, workers_for
from fedspine.config import Recipe, load
from fedspine.errors import BadInput
from fedspine.fleet import AllLost
from fedspine.fleets.simulated import SimulatedFleet, Totals
from fedspine.fleets.workers import ScoreJob, Workers
from fedspine.lm.base import Model
from fedspine.lm.score import Score
from fedspine.lm.structure import sparsity
from fedspine.message import pack
from fedspine.records import Records
from fedspine.report.page import write_page
from fedspine.report.progress import Progress, Standing
from fedspine.store import Saved, Store, write_atomically

RECIPE, RECORDS, SUMMARY, STATE = "recipe.toml", "records.jsonl", "summary.json", "state"


class Stopped(RuntimeError):
    """A run that cannot go on, with its last good state saved; the text is one line."""


@dataclass
class Sums:
    """What a run adds up over its rounds; kept with the state."""

    waiting_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    samples: int = 0
    exchanges: int = 0
    lost: int = 0
    peak_memory_bytes: int = 0

    def add(self, totals: Totals) -> None:
        for name in ("waiting_seconds", "bytes_up", "bytes_down", "samples", "exchanges", "lost"):
            setattr(self, name, getattr(self, name) + getattr(totals, name))
        self.peak_memory_bytes = max(self.peak_memory_bytes, totals.peak_memory_bytes)


@dataclass
class Stopwatch:
    """Wall seconds of this run, those before a resume included."""

    training: float = 0.0
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.started


def new_run(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run a recipe into a new folder; returns the summary.

    Raises BadInput for bad input, before the folder is made; Stopped where the run cannot go on.
    """
    if folder.exists():
        raise BadInput(f"output folder {folder} exists; choose another with --out, or go on with --resume {folder}")
    progress.stage("loading model and data")
    built = build(recipe)
    try:
        folder.mkdir(parents=True)
        write_atomically(folder / RECIPE, recipe.toml().encode())
    except OSError as error:
        raise BadInput(f"output folder {folder} cannot be made ({error.strerror}); choose another with --out") from None
    return _guarded(recipe, built, folder, progress)


def resume(folder: Path, progress: Progress, wanted: Recipe | None = None) -> dict[str, Any]:
    """Go on with the run in `folder`; `wanted` is the recipe that the user named, which must be the folder's."""
    recipe = recipe_of(folder)
    if wanted is not None and not recipe.same_run(wanted):
        raise BadInput(
            f"the recipe differs from that of {folder}: {_difference(recipe, wanted)}; "
            "resume without a recipe, or start a new run with --out"
        )
    finished = folder / SUMMARY
    if finished.exists():
        return json.loads(finished.read_text())
    progress.stage("loading model and data")
    return _guarded(wanted or recipe, build(recipe), folder, progress)


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run's folder; raises BadInput for a folder that is no run."""
    if not (folder / RECIPE).is_file():
        raise BadInput(f"{folder} is not the folder of a run (it has no {RECIPE}); name one that `fedspine run` made")
    return load(folder / RECIPE)


def standing(folder: Path) -> dict[str, Any]:
    """A finished run's summary, or what is known so far of one that is not."""
    recipe = recipe_of(folder)
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    saved = Store(folder / STATE).load()
    known = {
        "method": recipe.method.name,
        "seed": recipe.run.seed,
        "rounds": recipe.run.rounds,
        "devices": recipe.fleet.devices,
        "rounds_done": saved.round if saved else 0,
    }
    if saved is None:
        return known
    sums = {name: saved.state["sums"][name] for name in ("waiting_seconds", "bytes_up", "bytes_down")}
    return known | sums | {"simulated_seconds": saved.fleet.now, "wall_seconds": saved.state["watch"]["before"]}


def _difference(ours: Recipe, theirs: Recipe) -> str:
    for section, table in ours.table().items():
        other = theirs.table()[section]
        for key in {**table, **other}:
            if table.get(key) != other.get(key) and (section, key) != ("run", "workers"):
                return f"{section}.{key} is {table.get(key)!r} there, {other.get(key)!r} here"
    return "nothing"


def _guarded(recipe: Recipe, built: Built, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run, and turn what ends a run early into one line; the last saved round stays as it is."""
    workers = workers_for(recipe, built)
    how = f"the last good state is kept; go on with: fedspine run --resume {folder}"
    try:
        return _run(recipe, built, workers, folder, progress)
    except AllLost as error:
        raise Stopped(f"{error}; {how}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        raise Stopped(f"{folder} cannot be written ({error.strerror}); {how}") from None
    finally:
        workers.close()
        progress.close()


def _run(recipe: Recipe, built: Built, workers: Workers, folder: Path, progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(1)  # sums must not depend on how many cores there are
    method, rounds = recipe.method, recipe.run.rounds
    store = Store(folder / STATE)
    saved = store.open()
    records = Records(folder / RECORDS, saved.records if saved else 0)
    fleet = simulate(recipe, built, workers, store, records)
    sums, watch = Sums(), Stopwatch()
    if saved is None:
        state = method.start(built.task, np.random.default_rng([recipe.run.seed, START]))
    else:
        state = saved.state["method"]
        fleet.restore(saved.fleet, saved.memories)
        sums = Sums(**saved.state["sums"])
        watch = Stopwatch(**saved.state["watch"])
    done, marks = saved.round if saved else 0, {}
    title = f"{method.name}: {recipe.task.model} on {recipe.task.data}, {recipe.fleet.devices} devices"
    progress.started(rounds, title, done=done)
    try:
        for round in range(done, rounds):
            state = _one_round(recipe, built, state, fleet, round, sums, watch)
            marks = _check(recipe, built, workers, fleet, records, state, round) or marks
            progress.round_done(
                Standing(
                    round=round + 1,
                    now=fleet.now,
                    accuracy=marks.get("accuracy"),
                    loss=marks.get("loss"),
                    sparsity=marks.get("sparsity"),
                    bytes_moved=sums.bytes_up + sums.bytes_down,
                )
            )
            watch_now = {"training": watch.training, "before": watch.total}
            store.save(
                Saved(
                    round=round + 1,
                    state={"method": state, "sums": vars(sums), "watch": watch_now},
                    fleet=fleet.snapshot(),
                    memories=fleet.memories,
                    records=records.flush(),
                )
            )
        progress.stage("scoring the deployed models")
        summary = _summary(recipe, built, workers, fleet, records, state, sums, watch)
    finally:
        records.close()
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=1).encode())
    write_page(folder)
    return summary


def _one_round(
    recipe: Recipe, built: Built, state: Any, fleet: SimulatedFleet, round: int, sums: Sums, watch: Stopwatch
) -> Any:
    started = time.monotonic()
    totals = fleet.begin_round(round)
    everyone = fleet.devices
    part = fleet.only(everyone[i].id for i in cohort(recipe, round))
    state = recipe.method.round(state, around(recipe, part))
    seconds = time.monotonic() - started
    watch.training += seconds
    sums.add(totals)
    fleet.end_round(seconds)
    return state


def _check(
    recipe: Recipe,
    built: Built,
    workers: Workers,
    fleet: SimulatedFleet,
    records: Records,
    state: Any,
    round: int,
) -> dict[str, Any] | None:
    """Score a few models on some of the test rows, off the clock, where it is due."""
    every = recipe.run.evaluate_every
    if not every or (round + 1) % every or round + 1 == recipe.run.rounds:
        return None
    rows = min(recipe.run.evaluate_rows, len(built.task.test))
    marks = _marks(recipe, built, workers, fleet, state, rows, recipe.run.evaluate_devices)
    records.write("score", now=fleet.now, final=False, **marks)
    return marks


def _marks(
    recipe: Recipe, built: Built, workers: Workers, fleet: SimulatedFleet, state: Any, rows: int, most: int
) -> dict[str, Any]:
    """Accuracy and loss of the devices' models (a mean), of the global one and of the unpruned one."""
    method = recipe.method
    chosen = np.unique(np.linspace(0, len(fleet.devices) - 1, min(most, len(fleet.devices))).round().astype(int))
    sparsities: list[float] = []
    names: list[str] = []  # the digest of each model in turn; equal models are scored once

    def jobs() -> Iterator[ScoreJob]:
        seen: set[str] = set()
        for model in _models(method, state, [fleet.devices[i].id for i in chosen]):
            packed = pack(model)
            sparsities.append(sparsity(built.task.base.anatomy, model.structure))
            names.append(packed.sha256)
            if packed.sha256 not in seen:
                seen.add(packed.sha256)
                yield ScoreJob(model=packed.payload, rows=rows)

    scores = list(workers.run(jobs()))
    by_name = dict(zip(dict.fromkeys(names), scores, strict=True))
    unpruned, common, *devices = (by_name[name] for name in names)
    language = built.task.kind == "causal-lm"
    return {
        "devices": len(devices),
        "sparsity": float(np.mean(sparsities[2:])),
        "loss": float(np.mean([score.mean_loss for score in devices])),
        "loss_global": common.mean_loss,
        "loss_dense": unpruned.mean_loss,
    } | (
        {}
        if language
        else {
            "accuracy": float(np.mean([score.accuracy for score in devices])),
            "accuracy_lowest": float(min(score.accuracy for score in devices)),
            "accuracy_global": common.accuracy,
            "accuracy_dense": unpruned.accuracy,
        }
    )


def _models(method: Any, state: Any, devices: list[str]) -> Iterator[Model]:
    yield method.unpruned(state)
    yield method.deploy(state)
    for id in devices:
        yield method.deploy(state, id)


def _summary(
    recipe: Recipe,
    built: Built,
    workers: Workers,
    fleet: SimulatedFleet,
    records: Records,
    state: Any,
    sums: Sums,
    watch: Stopwatch,
) -> dict[str, Any]:
    marks = _marks(recipe, built, workers, fleet, state, len(built.task.test), recipe.run.final_devices)
    records.write("score", now=fleet.now, final=True, **marks)
    records.flush()
    scored = marks.pop("devices")
    return {
        "method": recipe.method.name,
        "model": recipe.task.model,
        "data": recipe.task.data,
        "kind": recipe.task.kind,
        "seed": recipe.run.seed,
        "rounds": recipe.run.rounds,
        "devices": recipe.fleet.devices,
        "devices_scored": scored,
        "test_rows": len(built.task.test),
        **marks,
        "simulated_seconds": fleet.now,
        "waiting_seconds": sums.waiting_seconds,
        "bytes_up": sums.bytes_up,
        "bytes_down": sums.bytes_down,
        "peak_memory_bytes_simulated": sums.peak_memory_bytes,
        "exchanges": sums.exchanges,
        "exchanges_lost": sums.lost,
        "wall_seconds": watch.total,
        "samples_per_second": sums.samples / watch.training if watch.training else 0.0,
        "state_sha256": pack(state).sha256,
    }
