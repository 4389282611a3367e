"""The simulator against its peers, side by side in one run on the same work: `python
benchmarks/simulator.py --help`.

Every contender runs in its own processes. They take turns over the seeds, so that other load on the
machine affects all alike. Writes results/simulator.md, .png and .json.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.work import Outcome, Settings, Way, Work, prepare

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Dataset
from fedspine.data.tasks import load

HERE = Path(__file__).parent
BESIDE = HERE.parents[1] / "shared" / "data" / "ag_news"
LOOK_SECONDS = 0.5  # between two looks at memory, at least
LOOK_SHARE = 0.02  # of one core's time, at most: walking the pages of large processes takes long
# what keeps the libraries to AVX2, as on a processor without AVX-512 and bf16
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
LIMIT_SECONDS = 1200  # a contender that takes longer hangs


@dataclass(frozen=True)
class Contender:
    """Its description in the table, its file in `peers`, and further arguments of `run` there."""

    what: str
    module: str
    arguments: tuple[Any, ...]
    more: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)  # what differs from the common work
    once: bool = False  # with the first seed only
    avx2: bool = False  # as on a processor with no more than that

    @property
    def precision(self) -> str:
        first = self.arguments[0]
        return first.precision if isinstance(first, Way) else first


AS_WRITTEN = Way("fp32", "fixed", "sdpa")
EQUAL = Way("bf16", "bucketed", "sdpa")
# the fastest found for peers; sdpa is slow on a CPU in bf16
BEST = Way("bf16", "bucketed", "eager")
PEERS = {
    "fedspine": Contender("fedspine, bf16", "ours", ("bf16",)),
    "flower": Contender(
        "Flower as its users write it: fp32, padded to the full length", "flower", (AS_WRITTEN,)
    ),
    "flower-best": Contender("Flower, bf16, our batches, eager attention", "flower", (BEST,)),
    "flower-equal": Contender(
        "Flower, bf16, our batches, sdpa attention", "flower", (EQUAL,), once=True
    ),
    "pfl": Contender("pfl, bf16, our batches, eager attention", "pfl_users", (BEST,), once=True),
    "bare": Contender(
        "bare PyTorch, PEFT, bf16, our batches, eager attention; 2 processes",
        "loop",
        (BEST,),
        {"processes": 2, "threads": 1},
        once=True,
    ),
    "bare-threads": Contender(
        "bare PyTorch, PEFT, bf16, our batches, eager attention; 2 threads",
        "loop",
        (BEST,),
        {"processes": 1, "threads": 2},
        once=True,
    ),
    "fedspine-fp32": Contender("fedspine, fp32", "ours", ("fp32",), once=True),
    "fedspine-avx2": Contender("AVX2: fedspine, fp32", "ours", ("fp32",), once=True, avx2=True),
    "flower-avx2": Contender(
        "AVX2: Flower as its users write it: fp32, padded to the full length",
        "flower",
        (AS_WRITTEN,),
        once=True,
        avx2=True,
    ),
    "bare-avx2": Contender(
        "AVX2: bare PyTorch, PEFT, fp32, our batches, sdpa attention; 2 processes",
        "loop",
        (Way("fp32", "bucketed", "sdpa"),),
        {"processes": 2, "threads": 1},
        once=True,
        avx2=True,
    ),
}
EVERYONE = {"devices": 6, "per_round": 6, "rounds": 5}  # so that each device prunes in every round
SPINE = {
    "name": "fedspine-plus",
    "aggregation": "delta-product",
    "sparsity": 0.5,
    "ranks": [8],
    "most_per_round": 0.5,
    "until": 0.4,  # of the rounds: the last two are trained at full sparsity
    "importance": {"name": "blend", "every": 4},
    "head_start": "random",
    "global_importance_weight": 0.5,
}
PRUNED_ROUNDS = 2
PRUNED = {
    "fedlora": Contender("FedLoRA", "ours", ("bf16",), {}, EVERYONE, once=True),
    "pruned": Contender(
        "FedSpine+, sparsity 0.5 once pruned", "ours", ("bf16",), SPINE, EVERYONE, once=True
    ),
}
MANY = 10_000
FEW_ROUNDS = {"partition": "iid", "rounds": 3}
FLEETS = {
    "devices": Contender("as above", "ours", ("bf16",), {}, FEW_ROUNDS, once=True),
    "devices-many": Contender(
        "many", "ours", ("bf16",), {}, FEW_ROUNDS | {"devices": MANY}, once=True
    ),
}
CONTENDERS = {**PEERS, **PRUNED, **FLEETS}


def main() -> None:
    arguments = _arguments()
    if arguments.only:
        return _one(arguments.only, Work(arguments.work), arguments.out)
    try:
        results = _everything(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from simulator_report import write  # matplotlib is for the one who reports, not for contenders

    groups = {"peers": list(PEERS), "pruned": list(PRUNED), "fleets": list(FLEETS)}
    return write(results, CONTENDERS, groups, arguments.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument(
        "--every-seed", action="store_true", help="all peers with every seed, twice as long"
    )
    parser.add_argument(
        "--contenders", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument("--devices", type=int, default=MANY, help="of the large fleet")
    parser.add_argument("--data", default=str(BESIDE) if BESIDE.exists() else "pydoc-topics")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder to write into"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything: does it work?"
    )
    parser.add_argument(
        "--only",
        choices=[*CONTENDERS, "ceiling", "operations"],
        help="one contender, on --work, into --out",
    )
    parser.add_argument("--work", type=Path, help="folder with prepared work")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.only and not (arguments.out and arguments.work):
        parser.error("--only expects --work, a folder that a full run prepared, and --out")
    return arguments


# --- one contender, in a process of its own ---


def _one(name: str, work: Work, out: Path) -> None:
    from peers import meters

    meters.adopt_orphans()
    match name:
        case "ceiling":
            found: Any = meters.ceiling()
        case "operations":
            found = meters.operations(work, [AS_WRITTEN, EQUAL, BEST])
        case _:
            contender = CONTENDERS[name]
            outcome: Outcome = importlib.import_module(f"peers.{contender.module}").run(
                work, *contender.arguments, **contender.more
            )
            found = asdict(outcome)
    out.write_text(json.dumps(found))


# --- all of them ---


def _everything(arguments: argparse.Namespace) -> dict[str, Any]:
    """Results by seed and contender: what `Outcome` holds, peak memory, or the error."""
    data = load(arguments.data, kind="classification")
    started = time.time()
    turns: list[dict[str, Any]] = []
    for seed in range(1 if arguments.quick else arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            turns.append(_turn(arguments, data, _settings(arguments, seed), Path(folder)))
    settings = _settings(arguments, 0)
    return {
        "command": " ".join(["python", "benchmarks/simulator.py", *sys.argv[1:]]),
        "data": Path(arguments.data).name,
        "test_rows": min(arguments.test_rows, len(data.test.texts)),
        "settings": asdict(settings),
        "samples_per_round": settings.samples_per_round,
        "many": arguments.devices,
        "pruned_rounds": PRUNED_ROUNDS,
        "seconds": time.time() - started,
        "turns": turns,
    }


def _settings(arguments: argparse.Namespace, seed: int) -> Settings:
    settings = Settings(seed=seed, rounds=arguments.rounds, learning_rate=arguments.learning_rate)
    return replace(settings, rounds=2, steps=2) if arguments.quick else settings


def _turn(
    arguments: argparse.Namespace, data: Dataset, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Every contender once, with one seed; in the first turn also what does not depend on it."""
    common = prepare(folder / "common", data, settings, arguments.test_rows)
    found: dict[str, Any] = {
        "ceiling": _apart("ceiling", common),
        "ceiling_avx2": _apart("ceiling", common, avx2=True),
    }
    first = settings.seed == 0
    if first:
        found["operations"] = _apart("operations", common)
    for name in arguments.contenders:
        contender = CONTENDERS[name]
        if not first and contender.once and not (arguments.every_seed and name in PEERS):
            continue
        work = common
        if contender.work:
            changes = contender.work | (
                {"devices": arguments.devices} if name == "devices-many" else {}
            )
            work = prepare(folder / name, data, replace(settings, **changes), arguments.test_rows)
        found[name] = _apart(name, work, contender.avx2) | {"devices": work.settings.devices}
    return found


def _apart(name: str, work: Work, avx2: bool = False) -> dict[str, Any]:
    """Run `--only name` in a process of its own, and watch the memory of it and of all it starts.

    With `avx2` the process computes as on a processor with no more than AVX2.
    """
    from peers.meters import end, memory_bytes

    print(f"seed {work.settings.seed}: {name}", end=" ", file=sys.stderr, flush=True)
    out, log = work.folder / f"{name}.json", work.folder / f"{name}.log"
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--work",
        str(work.folder),
        "--out",
        str(out),
    ]
    began, peak = time.time(), 0
    with log.open("wb") as lines:
        environment = os.environ | {"BENCHMARK_SPAWNED": str(began)} | (AVX2 if avx2 else {})
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
        while process.poll() is None:
            looked = time.process_time()
            peak = max(peak, memory_bytes(process.pid))
            time.sleep(max(LOOK_SECONDS, (time.process_time() - looked) / LOOK_SHARE))
            if time.time() - began > LIMIT_SECONDS:
                end(process.pid)
    if process.returncode == 0 and out.exists():
        found = json.loads(out.read_text())
    else:
        found = {"error": _last_error(log) or f"exit code {process.returncode}"}
    print(f"{time.time() - began:.0f} s {found.get('error', '')}", file=sys.stderr, flush=True)
    return found | {"peak_memory_bytes": peak, "wall_seconds": time.time() - began}


def _last_error(log: Path) -> str | None:
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if "Error" in line), None)


if __name__ == "__main__":
    main()
