"""The latency of one deployed model of a run on this machine, measured once and kept in the run
directory.
"""

import dataclasses
import json
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.runs.assemble import identities
from fedspine.storage.store import write_atomically
from fedspine.ui.compare.groups import MethodRuns
from fedspine.ui.compare.runs import Run

KEPT = "latency.json"
THREADS = 1
REPEATS = 21  # short calls are easily disturbed


@dataclass(frozen=True)
class Latency:
    """A measured model: wall seconds of one call by batch size, on this machine's `hardware`."""

    seed: int
    device: str
    hardware: str
    tokens: int
    threads: int
    seconds_by_batch: dict[int, float]
    file_bytes: int
    block_parameters: int


def latency_of(method: MethodRuns) -> Latency:
    """The latency of the first seed's model; of all methods of a comparison the same device is
    taken.

    Raises BadInput where the model cannot be exported, such as where its base is gone.
    """
    run = next(iter(method.runs.values()))
    kept = _kept(run)
    if kept is not None:
        return kept
    found = _measured(run)
    with suppress(OSError):  # a folder that cannot be written is measured anew every time
        write_atomically(
            run.folder / KEPT, json.dumps(_mark(run) | dataclasses.asdict(found)).encode()
        )
    return found


def device_of(run: Run) -> str:
    """The device in the middle of the fleet's list."""
    ids = identities(run.recipe)
    return ids[len(ids) // 2]


def hardware() -> str:
    """The processor's name and the cores that may be used."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def _mark(run: Run) -> dict[str, Any]:
    """The key of a kept measurement, which must match for its reuse."""
    return {
        "state_sha256": run.summary["state_sha256"],
        "device": device_of(run),
        "hardware": hardware(),
        "tokens": run.recipe.task.max_tokens,
        "threads": THREADS,
    }


def _kept(run: Run) -> Latency | None:
    try:
        kept = json.loads((run.folder / KEPT).read_bytes())
        if any(kept.get(key) != value for key, value in _mark(run).items()):
            return None
        fields = {field.name: kept[field.name] for field in dataclasses.fields(Latency)}
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return Latency(
        **fields | {"seconds_by_batch": {int(n): s for n, s in kept["seconds_by_batch"].items()}}
    )


def _measured(run: Run) -> Latency:
    from fedspine.exports.bench import bench
    from fedspine.exports.of_run import export_model

    device, tokens = device_of(run), run.recipe.task.max_tokens
    with tempfile.TemporaryDirectory() as place:
        try:
            model = Path(place) / "model"
            export_model(run.folder, device=device, format="hf", to=model, parity=False)
            found = bench(model, tokens=tokens, threads=THREADS, repeats=REPEATS)
        except OSError as error:
            raise BadInput(
                f"the model of {run.folder} cannot be measured ({error.strerror or error})"
            ) from None
    return Latency(
        seed=run.seed,
        device=device,
        hardware=hardware(),
        tokens=tokens,
        threads=THREADS,
        seconds_by_batch=found.latency_seconds,
        file_bytes=found.file_bytes,
        block_parameters=found.block_parameters,
    )
