"""How a fleet of real processes handles faults: each fault several times, with its expected
outcome.

`python benchmarks/faults.py` starts a server and three sites over NVIDIA FLARE on this machine, one
of them in a network of its own where that can be made (Linux, as root). The fault happens during a
run of FedLoRA on a tiny model, at a random round and site. Afterwards the run is replayed in this
process, on the same rows and without exactly those replies that its records call lost: the state
must have the same sha256. Writes results/faults.md; the exit code is 1 if any run ended badly.

With `--kills N` it kills at random instead: runs, sweeps and runs over those sites, N kills in all
(fault_kills.py); with `--of` only some of these, with their share of the N.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_kills
import fault_replay
import tomli_w
from fault_ground import AWAY, HERE, SITES, Place, cut, family, ground, hit

from fedspine.flare import startup_kit as kits

CUT = "network cut"
KILLS = "random kills"  # in results/faults.json
ELSEWHERE = """## Disk, folder and clock

`pytest -m slow tests/integration/test_resume.py`, on a run in simulation: a disk that is full at
each write in turn, a limit on the size of files, a folder that is read-only, a clock that jumps. A
run ends with one line and exit code 2, or goes on; after `--resume` it has the state of an
undisturbed one. `pytest tests/flare/test_worker_process.py -k full_disk`: a site on a full disk
leaves an order undone and stays. By hand: a sweep of two runs on a disk of 8 to 560 KiB, 584 KiB
being what it takes, ended with one line for each cell, or for itself, and the same command with
`--retry` on a larger disk gave the states of an undisturbed one.
"""
METHOD = {"name": "brittle", "rank": 4, "steps": 12, "batch": 16, "learning_rate": 2e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="how often each fault happens")
    parser.add_argument(
        "--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="these faults alone"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rounds and sites that are hit")
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    parser.add_argument("--kills", type=int, help="kill at random instead, so often in all")
    parser.add_argument(
        "--of",
        nargs="+",
        choices=list(fault_kills.SHARES),
        default=list(fault_kills.SHARES),
        help="with --kills: of what",
    )
    parser.add_argument("--cut", type=float, default=30.0, help="seconds that the network is cut")
    parser.add_argument("--within", type=float, default=15.0, help="seconds that an order may take")
    options = parser.parse_args()
    if options.kills is not None:
        return killed(options.kills, options.seed, of=options.of, write=options.write)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, ground(Path(folder)) as place:
        place.cut_seconds, place.within = options.cut, options.within
        for name in options.only:
            if name == CUT and not place.separate:
                print(f"{name}: not tried, since no network namespace can be made here", flush=True)
                continue
            draw = random.Random(f"{options.seed} {name}")
            found[name] = [tried(place, name, draw, number) for number in range(options.times)]
            if options.write:
                _write(found)
    print(table(found))
    return 0 if all(as_it_should(one) for tries in found.values() for one in tries) else 1


def killed(number: int, seed: int, *, of: list[str], write: bool) -> int:
    """Kill at random; the exit code is 1 where something went wrong."""
    draw, wrong = random.Random(seed), False
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (Path(folder) / "sites").mkdir()
        if fault_kills.SITES in of:
            place = stack.enter_context(ground(Path(folder) / "sites"))

        def at_sites(name: str, count: int) -> dict[str, Any]:
            outcome = tried(place, name, draw, count)
            return outcome | {"fine": as_it_should(outcome)}

        for name, kills in fault_kills.tried(Path(folder) / "here", number, draw, of, at_sites):
            print(f"{name}: {vars(kills)}", flush=True)
            wrong = wrong or bool(kills.wrong)
            if write:
                kept = _kept()
                now = vars(kills) | {"machine": fault_kills.machine()}
                row = f"{name}, seed {seed}" if seed else name
                _keep(kept | {KILLS: kept.get(KILLS, {}) | {row: now}})
    return int(wrong)


def as_it_should(outcome: dict[str, Any]) -> bool:
    """Whether the run ended well, reported the fault, had the site back and the right state."""
    return (
        outcome["exit"] == 0 and outcome["reported"] and outcome["back"] and outcome["same_state"]
    )


def _write(found: dict[str, list[dict[str, Any]]]) -> None:
    """Replace the results of earlier calls for the same faults."""
    _keep(_kept() | found)


def _kept() -> dict[str, Any]:
    kept = HERE / "results" / "faults.json"
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}


def _keep(known: dict[str, Any]) -> None:
    kept = HERE / "results" / "faults.json"
    all_of_them = {name: known[name] for name in (*FAULTS, KILLS) if name in known}
    kept.write_text(json.dumps(all_of_them, indent=1) + "\n", encoding="utf-8")
    page = table({name: tries for name, tries in all_of_them.items() if name != KILLS})
    if KILLS in all_of_them:
        page += "\n#" + fault_kills.table(all_of_them[KILLS])
    page += "\n" + ELSEWHERE
    kept.with_suffix(".md").write_text(page, encoding="utf-8")


# --- a run with one fault in it ---


@dataclass
class Going:
    """A run in a process of its own."""

    out: Path
    process: "subprocess.Popen[bytes]"

    def saved(self) -> int:
        """Rounds that the records hold."""
        return sum(row["row"] == "round" for row in self.records())

    def records(self) -> list[dict[str, Any]]:
        path = self.out / "records.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # the last may be half written

    def past(self, round: int) -> None:
        """Return once so many rounds are done."""
        self.until(lambda: self.saved() >= round, 180)

    def until(self, come: Callable[[], bool], seconds: float) -> None:
        """Return once it has come, the run ended, or the time is over."""
        end = time.monotonic() + seconds
        while not come() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)

    def noted(self, words: str) -> bool:
        """Whether a note of the records says these words."""
        return any(
            words in json.dumps(row["values"]) for row in self.records() if row["row"] == "note"
        )


def begun(place: Place, number: str, rounds: int, pause: float) -> Going:
    recipe = place.folder / f"{number}.toml"
    tables = {
        "task": {
            "model": str(place.folder / "tiny"),
            "data": str(place.folder / "data.csv"),
            "max_tokens": 16,
        },
        "fleet": {"per_round": len(SITES)},
        "method": METHOD | {"pause": pause},
        "run": {"rounds": rounds, "evaluate_every": 0, "precision": "fp32", "references": False},
    }
    recipe.write_text(tomli_w.dumps(tables))
    out = place.folder / f"run-{number}"
    more = [
        "--fleet",
        place.kits / kits.ADMIN_KIT,
        "--sites",
        len(SITES),
        "--within",
        place.within,
        "--out",
        out,
        "--json",
    ]
    return Going(out, command(place, out, "run", recipe, *more))


def command(place: Place, out: Path, *arguments: Any) -> "subprocess.Popen[bytes]":
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedspine", *map(str, arguments)], stdout=log, stderr=log
        )


def tried(place: Place, name: str, draw: random.Random, number: int) -> dict[str, Any]:
    """One fault in one run, and the outcome."""
    fault = FAULTS[name]
    site = AWAY if name == CUT else draw.choice(SITES)
    began = time.monotonic()
    rounds = fault.rounds + (round(place.cut_seconds) if name == CUT else 0)  # a second each
    run = begun(place, f"{name.replace(' ', '-')}-{number}", rounds, fault.pause)
    run.past(draw.randint(2, 6))
    fault.happens(place, run, site)
    try:
        code: Any = run.process.wait(300)
    except subprocess.TimeoutExpired:
        code = "none"
        hit([run.process.pid])
    records = run.records()
    lost = [
        (row["round"], row["device"]) for row in records if row["row"] == "exchange" and row["lost"]
    ]
    answered = [
        row["round"]
        for row in records
        if row["row"] == "exchange" and row["device"] == site and not row["lost"]
    ]
    state = None
    if code == 0:
        state = json.loads((run.out / "summary.json").read_text())["state_sha256"]
    outcome = {
        "site": site,
        "exit": code,
        "rounds": run.saved(),
        "seconds": round(time.monotonic() - began, 1),
        "lost": len(lost),
        "reported": fault.words is None or run.noted(fault.words),
        "back": bool(answered) and max(answered) == rounds - 1,
        "same_state": state is not None
        and state == fault_replay.replayed(run.out, place.kits, place.folder / "again"),
        "load": round(os.getloadavg()[0], 1),
    } | ({"cut": place.cut_seconds} if name == CUT else {})
    print(f"{name}: {outcome}", flush=True)
    if code != 0:
        print(run.out.with_suffix(".log").read_text()[-600:], flush=True)
        shutil.copytree(run.out, Path(tempfile.mkdtemp()) / run.out.name)
    return outcome


# --- the faults ---


def worker_killed(place: Place, run: Going, site: str) -> None:
    """Kill the worker until the records show that it was hit at work."""
    end = time.monotonic() + 60
    while not run.noted(FAULTS["worker killed in training"].words or "") and time.monotonic() < end:
        hit(family("fedspine.flare.worker_process", str(place.kits / site)))
        run.past(run.saved() + 1)


def site_killed(place: Place, run: Going, site: str) -> None:
    place.kill(site)
    time.sleep(random.random() * 3)
    place.start(site)


def job_killed(place: Place, run: Going, site: str) -> None:
    hit(family("runner_process", str(place.kits / "server")))


def run_killed(place: Place, run: Going, site: str) -> None:
    hit([run.process.pid])
    run.process.wait()
    run.process = command(place, run.out, "run", "--resume", run.out, "--json")


def site_hangs(place: Place, run: Going, site: str) -> None:
    hit(family("fedspine.flare.worker_process", str(place.kits / site)), signal.SIGSTOP)


def spoils(kind: str) -> Callable[[Place, Going, str], None]:
    def happens(place: Place, run: Going, site: str) -> None:
        said = place.folder / "spoil" / site
        said.write_text(kind)
        run.past(run.saved() + 2)
        said.unlink()

    return happens


def network_cut(place: Place, run: Going, site: str) -> None:
    cut(down=True)
    time.sleep(place.cut_seconds)
    cut(down=False)


@dataclass(frozen=True)
class Fault:
    """What happens to a run, what its records must say of it, and how long the run is."""

    happens: Callable[[Place, Going, str], None]
    words: str | None  # None: nothing is lost, so there is nothing to report
    rounds: int = 20
    pause: float = 0.2  # seconds between rounds


FAULTS = {
    "worker killed in training": Fault(worker_killed, "its worker ended"),
    "site killed and started again": Fault(site_killed, "does not answer", 50, 0.8),
    "server job killed": Fault(job_killed, "relay"),
    "run killed and resumed": Fault(run_killed, None),
    "site hangs": Fault(site_hangs, "did not reply in time", 25, 0.5),
    "reply with NaN": Fault(spoils("nan"), "not finite"),
    "reply with wrong shapes": Fault(spoils("shapes"), "was expected"),
    CUT: Fault(network_cut, "does not answer", 20, 1.0),
}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# What fails, and what becomes of the run",
        "",
        "`python benchmarks/faults.py`: a server and three sites on one machine, one of them in a "
        "network of its own; FedLoRA on a tiny model. *Right state*: the state's sha256 is that of "
        "a replay in one process that lacks exactly the replies that the records call lost.",
        "",
        (
            "| fault | tried | run ended well | reported "
            "| site took part to the end | right state | replies lost | seconds |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault, tries in found.items():
        counts = [
            sum(bool(one[key]) if key != "exit" else one[key] == 0 for one in tries)
            for key in ("exit", "reported", "back", "same_state")
        ]
        lost, seconds = ([one[key] for one in tries] for key in ("lost", "seconds"))
        name = f"{fault} {tries[0]['cut']:g} s" if fault == CUT else fault
        reported = "nothing lost" if FAULTS[fault].words is None else str(counts[1])
        lines.append(
            f"| {name} | {len(tries)} | {counts[0]} | {reported} | {counts[2]} | {counts[3]} "
            f"| {min(lost)} to {max(lost)} | {min(seconds):.0f} to {max(seconds):.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
