"""Kills at random moments of a run, a sweep and a run over real sites, which are then continued to
their ends: the state must be that of an undisturbed one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from fault_ground import rows

from fedspine.lm.tiny import write_tiny

SITES = "sites"
SHARES = {"run": 0.5, "sweep": 0.3, SITES: 0.2}  # of the kills
ATTEMPTS = 100  # after which something does not go on
ENDS = {"killed": -signal.SIGKILL, "terminated": 128 + signal.SIGTERM}
# faults of real sites that are kills, as benchmarks/faults.py calls them
AT_SITES = (
    "worker killed in training",
    "site killed and started again",
    "server job killed",
    "run killed and resumed",
)


@dataclass
class Kills:
    """What was killed, and the outcome."""

    victims: dict[str, int] = field(default_factory=dict)  # how often each was hit
    wrong: list[str] = field(default_factory=list)  # what went wrong
    seconds: float = 0.0

    @property
    def number(self) -> int:
        return sum(self.victims.values())

    def hit(self, victim: str) -> None:
        self.victims[victim] = self.victims.get(victim, 0) + 1


@dataclass(frozen=True)
class Job:
    """A command that goes on where it was killed."""

    command: Callable[[], list[str]]
    states: Callable[[], list[str] | None]  # sha256 of what it made; None until all is there


def killed(
    job: Job, expected: list[str], seconds: float, draw: random.Random, kills: Kills
) -> None:
    """One job, killed again and again within the `seconds` that it takes, until it is done."""
    for _ in range(ATTEMPTS):
        process = subprocess.Popen(
            job.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        victim = _strike(process, seconds, draw)
        _, said = process.communicate()
        code, lines = process.returncode, [line for line in said.splitlines() if line.strip()]
        if victim is not None:
            kills.hit(victim)
        # a sweep that lost a cell or found one still locked says so, and goes on the next time
        fine = {0, 1, *ENDS.values(), -signal.SIGTERM}  # the last before the command began
        errors = [line for line in lines if line.startswith("fedspine: ")]
        if code not in fine or len(errors) > 1 or "Traceback" in said:
            kills.wrong.append(f"{victim}: exit code {code}: {said[-400:]}")
        if code == ENDS["terminated"] and len(errors) != 1:
            kills.wrong.append(f"{victim}: {len(errors)} lines: {said[-400:]}")
        if (found := job.states()) is not None:
            if found != expected:
                kills.wrong.append(f"{victim}: another state than that of an undisturbed one")
            return
    kills.wrong.append(f"not done after {ATTEMPTS} attempts")


def _strike(process: "subprocess.Popen[str]", seconds: float, draw: random.Random) -> str | None:
    """Kill the process, or one below it, within the `seconds` that it takes, half of the times
    while it has processes below it; what was killed, None where it was over before.
    """
    if draw.random() < 0.5:
        while process.poll() is None and not _below(process.pid):
            time.sleep(0.01)
        seconds /= 4
    try:
        process.wait(draw.uniform(0.0, seconds))
        return None
    except subprocess.TimeoutExpired:
        pass
    below = _below(process.pid)
    if below and draw.random() < 0.5:
        chosen = draw.choice(below)
        try:
            # a sweep's cells are commands of their own, and workers are forked
            what = "cell" if "fedspine.ui.sweep.cell" in chosen.cmdline() else "worker"
            what = "cell's worker" if what == "cell" and chosen.ppid() != process.pid else what
            chosen.kill()
            return what
        except psutil.NoSuchProcess:
            return None
    number = draw.choice([signal.SIGKILL, signal.SIGTERM])
    process.send_signal(number)
    return "itself" if number == signal.SIGKILL else "itself, by SIGTERM"


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


# --- the jobs ---


def jobs(folder: Path) -> dict[str, Callable[[str], Job]]:
    """A run and a sweep on a tiny model, each in a new place by its name."""
    folder.mkdir()
    model = write_tiny(folder / "tiny", "bert")
    (folder / "data.csv").write_text(rows(random.Random(1), 80))
    task = {"model": str(model), "data": str(folder / "data.csv"), "max_tokens": 16}
    settings = {
        "task": task,
        "fleet": {"devices": 4, "per_round": 3},
        "run": {"rounds": 8, "workers": 2, "precision": "fp32", "references": False},
    }
    method = {"name": "fedspine", "ranks": [2, 4], "steps": 4}
    recipe, sweep = folder / "recipe.toml", folder / "sweep.toml"
    recipe.write_text(tomli_w.dumps(settings | {"method": method}))
    lora = {"name": "fedlora", "rank": 4, "steps": 4}
    sweep.write_text(
        tomli_w.dumps({"seeds": [0], **settings, "methods": {"spine": method, "lora": lora}})
    )

    def run(name: str) -> Job:
        out = folder / name

        def command() -> list[str]:
            more = ["--resume", out] if out.exists() else [recipe, "--out", out]
            return _fedspine("run", *more, "--json")

        return Job(command, lambda: _states([out], 1))

    def swept(name: str) -> Job:
        out = folder / name
        command = _fedspine("sweep", sweep, "--out", out, "--retry", "--json")
        return Job(lambda: command, lambda: _states(_runs_in(out), 2))

    return {"run": run, "sweep": swept}


def _fedspine(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "fedspine", *map(str, arguments)]


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("recipe.toml"))


def _states(runs: list[Path], number: int) -> list[str] | None:
    paths = [run / "summary.json" for run in runs]
    if len(paths) < number or not all(path.exists() for path in paths):
        return None
    return [json.loads(path.read_text())["state_sha256"] for path in paths]


# --- all of them ---


def tried(
    folder: Path,
    number: int,
    draw: random.Random,
    of: Collection[str],
    at_sites: Callable[[str, int], dict[str, Any]],
) -> Iterator[tuple[str, Kills]]:
    """The kills of what `of` names, of so many in all; `at_sites` tries a fault at real sites."""
    wanted = {name: max(1, round(share * number)) for name, share in SHARES.items()}
    for name, job in jobs(folder).items():
        if name not in of:
            continue
        began = time.monotonic()
        whole = job(f"{name}-whole")
        subprocess.run(whole.command(), check=True, capture_output=True)
        expected, seconds = whole.states(), time.monotonic() - began
        assert expected is not None
        kills, count = Kills(), 0
        while kills.number < wanted[name] and not kills.wrong:
            killed(job(f"{name}-{count}"), expected, seconds, draw, kills)
            count += 1
        kills.seconds = time.monotonic() - began
        yield name, kills
    if SITES in of:
        began, kills = time.monotonic(), Kills()
        for count in range(wanted[SITES]):
            fault = draw.choice(AT_SITES)
            outcome = at_sites(fault, count)
            kills.hit(fault)
            if not outcome["fine"]:
                kills.wrong.append(f"{fault}: {outcome}")
        kills.seconds = time.monotonic() - began
        yield "a run over a server and three sites", kills


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `tried` found, each row with the machine and the commit that it was measured on."""
    lines = [
        "# Random kills",
        "",
        "`python benchmarks/faults.py --kills N`: a run, a sweep of two runs and a run over real "
        "sites, on a tiny model, killed at random moments and again while they go on. *Wrong*: "
        "another state than that of an undisturbed one (over sites: than that of a replay), "
        "another exit code than 0, 1, 143 or that of a kill, or more than one line.",
        "",
        "| what ran | kills | of what | wrong | minutes | measured on |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        of_what = ", ".join(f"{count} {victim}" for victim, count in sorted(row["victims"].items()))
        kills = sum(row["victims"].values())
        lines.append(
            f"| {name} | {kills} | {of_what} | {len(row['wrong'])} | {row['seconds'] / 60:.0f} "
            f"| {row['machine']} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> str:
    return f"{os.cpu_count()} cores, commit {_commit()}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
