"""Which deployed models of a run fit a device: every model, format and quantisation with its
quality, memory and latency.

Models of the same size cost the same, so all are scored, but only the best of each size is
exported. Memory is measured in a fresh process on this machine. Latency is measured here, or
predicted for a device kind from operation counts and that kind's slowest power mode.
"""

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from fedspine.core.errors import BadInput, unknown
from fedspine.core.message import pack
from fedspine.exports.bench import latency_seconds, peak_memory_bytes
from fedspine.exports.card import weight_bytes
from fedspine.exports.fit_runs import FitRun, ModelCost, falling, open_runs
from fedspine.exports.load import load_model
from fedspine.exports.of_run import QUANTISATIONS
from fedspine.fleets.hardware import KINDS, LAUNCH_SECONDS, UTILISATION

FORMATS = ("hf", "onnx", "executorch", "gguf")  # an adapter alone is not a deployed model
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
    tokens: int | None  # of the timed rows; None for nets
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

    run: FitRun
    device: str
    alike: int
    format: str
    quantize: str | None

    @property
    def name(self) -> str:
        numbers = f" {self.quantize}" if self.quantize else ""
        return f"{self.run.folder.name} {self.device} as {self.format}{numbers}"


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
    runs = open_runs(list(dict.fromkeys(folders)), base=query.base, rows=query.rows)
    first = runs[0]
    tokens = _tokens(first, query.tokens)
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    able = [_formats_of(run, query.formats, refused) for run in runs]
    _check_formats(query.formats, set(chain.from_iterable(able)), refused)
    trials = (_of_run(run, formats, say) for run, formats in zip(runs, able, strict=True))
    for trial in chain.from_iterable(trials):
        say(f"measuring {trial.name}")
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "model"
            try:
                trial.run.export(trial.device, trial.format, trial.quantize, place)
            except BadInput as error:
                refused[trial.name] = str(error)
                continue
            found.append(_measured(trial, place, query, tokens))
    _check_formats(query.formats, {one.format for one in found}, refused)
    kind = first.record.kind
    found.sort(key=lambda one: (falling(one.quality, kind), one.latency_seconds))
    return Fit(
        measure="loss" if kind == "causal-lm" else "accuracy",
        rows=first.rows,
        rows_from=first.rows_from,
        tokens=tokens,
        candidates=tuple(found),
        refused=refused,
    )


def _tokens(run: FitRun, named: int | None) -> int | None:
    """Tokens of the rows that are timed; None for nets, whose rows have one shape."""
    if run.tokens is None and named is not None:
        raise BadInput(
            f"{run.folder} trained a net on arrays, whose rows have one shape; leave --tokens out"
        )
    return None if run.tokens is None else named or min(TOKENS, run.tokens)


def _check_formats(named: tuple[str, ...], came: set[str], refused: Mapping[str, str]) -> None:
    """Raise BadInput for a requested format without any model, and if no format has one."""
    for format in named or (() if came else FORMATS):
        if format not in came:
            why = next((line for name, line in refused.items() if f" as {format}" in name), "")
            raise BadInput(why or f"no model of these runs could be exported as {format}")


def _formats_of(run: FitRun, named: tuple[str, ...], refused: dict[str, str]) -> tuple[str, ...]:
    """The formats that the run's models can be exported to; reasons against the others go to
    `refused`.
    """
    able = []
    for format in named or FORMATS:
        try:
            run.check_format(format)
        except BadInput as error:
            refused[f"{run.folder.name} as {format}"] = str(error)
        else:
            able.append(format)
    return tuple(able)


def _of_run(run: FitRun, formats: Sequence[str], say: Say) -> Iterator[_Trial]:
    if not formats:
        return
    for device, alike in _best_of_each_size(run, say):
        for format in formats:
            for quantize in QUANTISATIONS.get(format, (None,)):
                yield _Trial(run, device, alike, format, quantize)


def _best_of_each_size(run: FitRun, say: Say) -> Iterator[tuple[str, int]]:
    """For each model size, the name of the best model and the number of models."""
    names = run.names()
    losses: dict[str, float] = {}
    by_size: dict[Hashable, list[tuple[float, int]]] = {}
    for number, name in enumerate(names):
        say(f"scoring {run.folder.name} {name}, {number + 1} of {len(names)}")
        model = run.model(name)
        digest = pack(model).sha256
        if digest not in losses:
            losses[digest] = run.falling(model)
        by_size.setdefault(run.size(model), []).append((losses[digest], number))
    for alike in by_size.values():
        yield names[min(alike)[1]], len(alike)


def _measured(trial: _Trial, place: Path, query: FitQuery, tokens: int | None) -> Candidate:
    loaded = load_model(place, threads=query.threads)
    run, batch = trial.run, query.limits.batch
    if query.device_kind is None:
        calls = {batch: CALLS_OF_ONE if batch == 1 else 1}
        seconds = latency_seconds(
            loaded, tokens=tokens, threads=query.threads, repeats=REPEATS, calls=calls
        )[batch]
    else:
        cost = run.cost(trial.device, batch, tokens)
        # weights in int8 of format hf are expanded, so its products are in fp32, too
        single = trial.format == "hf" or trial.quantize in (None, "none")
        seconds = predicted_seconds(query.device_kind, cost, single=single)
    memory = peak_memory_bytes(place, tokens=tokens, threads=query.threads, batches=(batch,))
    return Candidate(
        run=str(run.folder),
        device=trial.device,
        alike=trial.alike,
        format=trial.format,
        quantize=trial.quantize,
        runtime=loaded.runtime,
        sparsity=run.sparsity(trial.device),
        quality=run.quality(loaded),
        memory_bytes=memory,
        latency_seconds=seconds,
        predicted=query.device_kind is not None,
        file_bytes=weight_bytes(place),
        excess=query.limits.excess(memory, seconds),
    )


def predicted_seconds(kind: str, cost: ModelCost, *, single: bool) -> float:
    """Seconds of a forward pass on a device kind in its slowest power mode, from the operations in
    the blocks; `single` says that the weights are fp32.

    Peak rates, utilisation and the launch time of a layer are those of the simulated fleet
    (`fleets/hardware.py`); integers are assumed to be as fast as fp16.

    >>> half_of_minilm = ModelCost(flops=1.434e9, layers=6)  # 128 tokens
    >>> round(predicted_seconds("tx2", half_of_minilm, single=False), 4)
    0.0305
    """
    peak = 1e12 * min(KINDS[kind].peaks_tflops)
    seconds = cost.flops / (UTILISATION * peak) * (FP32 if single else 1.0)
    return seconds + FORWARD * cost.layers * LAUNCH_SECONDS
