"""Which deployed models of a run fit a device: every model, format and quantisation with its
quality, memory and latency.

Models of the same size cost the same, so all are scored, but only the best of each size is
exported. Memory is measured in a fresh process on this machine. Latency is measured here, or
predicted for a device kind from operation counts and that kind's slowest power mode.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf, isnan
from pathlib import Path
from typing import Any, TypeAlias

from fedspine.core.errors import BadInput, unknown
from fedspine.core.message import pack
from fedspine.core.task import Examples, TaskKind
from fedspine.exports.agreement import answers
from fedspine.exports.bench import latency_seconds, peak_memory_bytes
from fedspine.exports.card import weight_bytes
from fedspine.exports.load import load_model
from fedspine.exports.of_run import (
    DENSE,
    GLOBAL,
    QUANTISATIONS,
    RunModel,
    check_kind,
    device_ids_of,
    export_model,
    open_run,
)
from fedspine.exports.parity_rows import RANDOM_WORDS, parity_rows
from fedspine.fleets.hardware import KINDS, LAUNCH_SECONDS, UTILISATION
from fedspine.lm.base import Model
from fedspine.lm.cost import Extent, forward_flops
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.score import score
from fedspine.lm.structure import sparsity

FORMATS = ("hf", "onnx", "gguf")  # an adapter alone is not a deployed model
ROWS = 1000  # that models are scored on, at most
TOKENS = 128  # of the rows that are timed, or as many as the models were trained to read
REPEATS = 5
CALLS_OF_ONE = 8  # per repeat at batch 1, as in `bench`
# share of a layer's launch time in a training step, which has a forward and a backward pass
FORWARD = 0.5
Say: TypeAlias = Callable[[str], None]
FP32 = 2.0  # time of fp32 over that at a device kind's fp16 peak


@dataclass(frozen=True)
class DeviceLimits:
    """The limits of a device; None: no limit."""

    memory_bytes: float | None
    latency_seconds: float | None
    batch: int = 1

    def excess(self, memory_bytes: float, latency_seconds: float) -> float:
        """The worst ratio of need to limit; a model with at most 1 fits.

        >>> DeviceLimits(memory_bytes=100, latency_seconds=None).excess(150, 9)
        1.5
        """
        pairs = ((memory_bytes, self.memory_bytes), (latency_seconds, self.latency_seconds))
        return max((need / limit for need, limit in pairs if limit is not None), default=0.0)


@dataclass(frozen=True)
class Candidate:
    """One model of a run in one format, and what it costs."""

    run: str
    device: str  # whose model scores best among those of its size
    alike: int  # models of the run with this size
    format: str
    quantize: str | None
    runtime: str
    sparsity: float
    quality: float  # accuracy, 0 to 1, or loss in nats per token, on the same rows
    memory_bytes: int  # peak of a process that runs it
    latency_seconds: float
    predicted: bool  # whether the latency is predicted
    file_bytes: int
    excess: float  # the worst ratio of need to limit; at most 1 fits

    @property
    def fits(self) -> bool:
        return self.excess <= 1


@dataclass(frozen=True)
class Fit:
    """All candidates, the best first; `refused` says why a model is missing in a format."""

    measure: str  # "accuracy" or "loss"
    rows: int
    rows_from: str
    tokens: int
    candidates: tuple[Candidate, ...]
    refused: Mapping[str, str]  # why, by run, device and format

    @property
    def best(self) -> Candidate | None:
        """The most accurate candidate that fits; among equals the fastest."""
        return next((one for one in self.candidates if one.fits), None)

    @property
    def nearest(self) -> tuple[Candidate, ...]:
        """All candidates by how close they are to the limits, the closest first."""
        return tuple(sorted(self.candidates, key=lambda one: one.excess))


@dataclass(frozen=True)
class FitQuery:
    """What to look for in all runs."""

    limits: DeviceLimits
    formats: tuple[str, ...] = ()  # empty: all that a model can be exported to
    device_kind: str | None = None
    tokens: int | None = None
    threads: int = 1
    rows: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class _Trial:
    """One model of a run to export and measure in one format."""

    folder: Path
    run: RunModel
    device: str
    alike: int
    format: str
    quantize: str | None

    @property
    def name(self) -> str:
        numbers = f" {self.quantize}" if self.quantize else ""
        return f"{self.folder.name} {self.device} as {self.format}{numbers}"


def fit(folders: Sequence[Path], query: FitQuery, say: Say = lambda line: None) -> Fit:
    """Measure every model of these runs in every format; `say` is called with the progress.

    Raises BadInput for folders that are not runs or of different tasks, formats that no model can
    be exported to, an unknown device kind, and without rows to score on.
    """
    for format in query.formats:
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
    if query.device_kind is not None and query.device_kind not in KINDS:
        raise unknown("device kind", query.device_kind, KINDS)
    runs = {folder: open_run(folder, query.base) for folder in dict.fromkeys(folders)}
    _check_alike(runs)
    first = next(iter(runs.values()))
    examples, rows_from = parity_rows(first.recipe, first.record, first.tokenizer, query.rows, ROWS)
    if rows_from == RANDOM_WORDS:
        raise BadInput(
            f"the data of {next(iter(runs))} is not available, so its models cannot be scored; "
            "give rows with --rows"
        )
    if first.record.kind != "causal-lm" and examples.labels is None:
        raise BadInput(
            "the rows have no labels, so models cannot be scored; give others with --rows"
        )
    tokens = query.tokens or min(TOKENS, first.record.max_tokens)
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    able = {
        folder: _formats_of(folder, run, query.formats, refused) for folder, run in runs.items()
    }
    _check_formats(query.formats, set(chain.from_iterable(able.values())), refused)
    trials = (_of_run(folder, run, examples, able[folder], say) for folder, run in runs.items())
    for trial in chain.from_iterable(trials):
        say(f"measuring {trial.name}")
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "model"
            try:
                _export(trial, place, query)
            except BadInput as error:
                refused[trial.name] = str(error)
                continue
            found.append(_measured(trial, place, examples, query, tokens))
    _check_formats(query.formats, {one.format for one in found}, refused)
    kind = first.record.kind
    found.sort(key=lambda one: (_falling(one.quality, one.quality, kind), one.latency_seconds))
    return Fit(
        measure="loss" if kind == "causal-lm" else "accuracy",
        rows=len(examples),
        rows_from=rows_from,
        tokens=tokens,
        candidates=tuple(found),
        refused=refused,
    )


def _export(trial: _Trial, place: Path, query: FitQuery) -> None:
    export_model(
        trial.folder,
        device=trial.device,
        format=trial.format,
        to=place,
        base=query.base,
        quantize=trial.quantize,
        rows=query.rows if trial.format in QUANTISATIONS else None,
        parity=trial.format in QUANTISATIONS,
    )


def _check_formats(named: tuple[str, ...], came: set[str], refused: Mapping[str, str]) -> None:
    """Raise BadInput for a requested format without any model, and if no format has one."""
    for format in named or (() if came else FORMATS):
        if format not in came:
            why = next((line for name, line in refused.items() if f" as {format}" in name), "")
            raise BadInput(why or f"no model of these runs could be exported as {format}")


def _check_alike(runs: dict[Path, RunModel]) -> None:
    (place, first), *others = runs.items()
    for other, run in others:
        mine, its = first.record, run.record
        if (mine.kind, mine.classes, mine.data_sha256) != (its.kind, its.classes, its.data_sha256):
            raise BadInput(
                f"{place} and {other} are runs on different data, so their models have no common "
                "rows; give runs on one data set"
            )


def _formats_of(
    folder: Path, run: RunModel, named: tuple[str, ...], refused: dict[str, str]
) -> tuple[str, ...]:
    """The formats that the run's models can be exported to; reasons against the others go to
    `refused`.
    """
    able = []
    for format in named or FORMATS:
        try:
            check_kind(format, run)
        except BadInput as error:
            refused[f"{folder.name} as {format}"] = str(error)
        else:
            able.append(format)
    return tuple(able)


def _of_run(
    folder: Path, run: RunModel, examples: Examples, formats: Sequence[str], say: Say
) -> Iterator[_Trial]:
    if not formats:
        return
    for device, alike in _best_of_each_size(folder, run, examples, say):
        for format in formats:
            for quantize in QUANTISATIONS.get(format, (None,)):
                yield _Trial(folder, run, device, alike, format, quantize)


def _best_of_each_size(
    folder: Path, run: RunModel, examples: Examples, say: Say
) -> Iterator[tuple[str, int]]:
    """For each model size, the name of the best model and the number of models."""
    names = (DENSE, GLOBAL, *device_ids_of(folder))
    losses: dict[str, float] = {}
    by_size: dict[Any, list[tuple[float, int]]] = {}
    for number, name in enumerate(names):
        say(f"scoring {folder.name} {name}, {number + 1} of {len(names)}")
        model: Model = run.model(name)
        digest = pack(model).sha256
        if digest not in losses:
            found = score(run.base, model, examples)
            losses[digest] = _falling(found.mean_loss, found.accuracy, run.record.kind)
        kept = model.structure
        size = tuple(kept.heads.sum(1).tolist()), tuple(kept.channels.sum(1).tolist())
        by_size.setdefault(size, []).append((losses[digest], number))
    for alike in by_size.values():
        yield names[min(alike)[1]], len(alike)


def _falling(loss: float, accuracy: float, kind: TaskKind) -> float:
    """A number that is lower for a better model; NaN counts as the worst."""
    value = loss if kind == "causal-lm" else -accuracy
    return inf if isnan(value) else value


def _measured(
    trial: _Trial, place: Path, examples: Examples, query: FitQuery, tokens: int
) -> Candidate:
    loaded = load_model(place, threads=query.threads)
    _, accuracy, loss = answers(loaded, examples)
    batch, costs = query.limits.batch, {"tokens": tokens, "threads": query.threads}
    pruned = sparsity(trial.run.base.layout, trial.run.model(trial.device).structure)
    if query.device_kind is None:
        calls = {batch: CALLS_OF_ONE if batch == 1 else 1}
        seconds = latency_seconds(loaded, repeats=REPEATS, calls=calls, **costs)[batch]
    else:
        seconds = predicted_seconds(
            query.device_kind,
            trial.run.base.layout,
            pruned,
            Extent(tokens=batch * tokens, squared_tokens=batch * tokens**2),
            single=trial.quantize in (None, "none"),
        )
    memory = peak_memory_bytes(place, batches=(batch,), **costs)
    return Candidate(
        run=str(trial.folder),
        device=trial.device,
        alike=trial.alike,
        format=trial.format,
        quantize=trial.quantize,
        runtime=loaded.runtime,
        sparsity=pruned,
        quality=float(loss if accuracy is None else accuracy),
        memory_bytes=memory,
        latency_seconds=seconds,
        predicted=query.device_kind is not None,
        file_bytes=weight_bytes(place),
        excess=query.limits.excess(memory, seconds),
    )


def predicted_seconds(
    kind: str, layout: PrunableLayout, pruned: float, extent: Extent, *, single: bool
) -> float:
    """Seconds of a forward pass on a device kind in its slowest power mode, from the operations in
    the blocks; `single` says that the weights are fp32.

    Peak rates, utilisation and the launch time of a layer are those of the simulated fleet
    (`fleets/hardware.py`); integers are assumed to be as fast as fp16.

    >>> sizes = {"heads": 12, "channels": 1536, "width": 384, "query_heads": 12, "head_dim": 32}
    >>> minilm = PrunableLayout(architecture="bert", prefix="bert", layers=6, **sizes)
    >>> row = Extent(tokens=128, squared_tokens=128**2)
    >>> round(predicted_seconds("tx2", minilm, 0.5, row, single=False), 4)
    0.0305
    """
    flops = (1 - pruned) * forward_flops(layout, extent)
    peak = 1e12 * min(KINDS[kind].peaks_tflops)
    seconds = flops / (UTILISATION * peak) * (FP32 if single else 1.0)
    return seconds + FORWARD * layout.layers * LAUNCH_SECONDS
