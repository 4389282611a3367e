"""Whole runs over NVIDIA FLARE on one machine: the bits of simulation, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from flare_federation import write_recipe
from runs import handling_ctrl_c
from toy import Lab
from warm import forked

from fedspine.core.aggregation import Mean, NormClip
from fedspine.core.message import pack
from fedspine.runs.assemble import START, build_task, dataset
from fedspine.runs.config import load

pytestmark = pytest.mark.slow
RUN = {"precision": "fp32", "evaluate_every": 0, "references": False}


def over_flare(federation, recipe, folder, *more):
    """Arguments of a run at the federation's sites."""
    return [
        "run",
        str(recipe),
        "--fleet",
        str(federation.admin),
        "--sites",
        str(len(federation.sites)),
        "--out",
        str(folder),
        *more,
    ]


def simulated(place, recipe, folder):
    """The final state of the recipe on simulated devices that hold the rows and bear the names of
    the sites.
    """
    recipe = load(recipe)
    task, _ = build_task(recipe, dataset(recipe))
    # what a run at sites has where its recipe says nothing
    aggregation = NormClip() if recipe.method.robust else Mean()
    lab = Lab(task, folder, kinds=("nx",) * len(place.shares), aggregation=aggregation)
    lab.workers._workshop = replace(lab.workers._workshop, shares=tuple(place.shares.values()))
    world = lab.fleet._world
    world.profiles = tuple(
        replace(one, id=site) for one, site in zip(world.profiles, place.shares, strict=True)
    )
    world.__post_init__()
    lab.fleet = type(lab.fleet)(world)
    try:
        state = recipe.method.start(task, np.random.default_rng([recipe.run.seed, START]))
        for round in range(recipe.run.rounds):
            lab.fleet.begin_round(round)
            state = recipe.method.round(state, lab.fleet)
    finally:
        lab.close()
    return state


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def rows(folder, kind):
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a run under way may be writing the last
    return [line for line in whole if line["row"] == kind]


# what FedSpine's bandit earns depends on measured seconds, a fixed choice does not
SPINE = {
    "name": "fedspine",
    "controller": {"name": "fixed", "rank": 4},
    "ranks": [2, 4],
    "steps": 40,
    "batch": 8,
}
# batches follow measured seconds, equal ones do not
MERGE = {
    "name": "mergesfl",
    "cut": 1,
    "rank": 4,
    "steps": 4,
    "batch": 8,
    "batches": {"name": "equal"},
}


# --- what dies on the way ---


def family(words):
    """Processes on this machine whose command lines hold all of these words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if all(str(word) in line for word in words):
            found.append(process.pid)
    return found


def hit(pids, number=signal.SIGKILL):
    assert pids, "the process to be hit was not found"
    for pid in pids:
        os.kill(pid, number)


class Going:
    """A run in a process of its own."""

    def __init__(self, arguments, folder):
        self.folder = folder
        self.log = open(folder.with_suffix(".log"), "w")  # noqa: SIM115 - closed by `end`
        with handling_ctrl_c():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedspine", *map(str, arguments)],
                stdout=self.log,
                stderr=self.log,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def until(self, come, seconds=300):
        """Wait until `come` says so; the run must not end before."""
        end = time.monotonic() + seconds
        while not come():
            assert self.process.poll() is None, self.folder.with_suffix(".log").read_text()
            assert time.monotonic() < end, self.folder.with_suffix(".log").read_text()
            time.sleep(0.1)

    def at_rest(self, seconds=0.5):
        """Stop the run for a while, in which the sites are done with what they were asked; rounds
        that nobody looks at would take all cores from what is waited for.
        """
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def past(self, round):
        """Wait until so many rounds are in the records."""
        self.until(lambda: len(rows(self.folder, "round")) >= round)

    def noted(self, words):
        """The rounds and sites of the notes that say these words."""
        notes = [note for note in rows(self.folder, "note") if words in str(note["values"])]
        return [(note["round"], note["values"].get("device")) for note in notes]

    def lost(self):
        """The rounds and sites of the replies that were lost."""
        return {
            (row["round"], row["device"]) for row in rows(self.folder, "exchange") if row["lost"]
        }

    def answered(self, site, round):
        """Whether the site answered in this round or later."""
        replies = [
            row
            for row in rows(self.folder, "exchange")
            if row["device"] == site and not row["lost"]
        ]
        return any(row["round"] >= round for row in replies)


def test_whatever_dies_is_reported_and_takes_part_again(place, federation, tmp_path):
    """One run: a worker is killed at work, the server's job is killed, a site is killed and started
    again.
    """
    kits = federation.folder
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=SPINE, run=RUN | {"rounds": 2000})
    with Going(
        over_flare(federation, recipe, tmp_path / "run", "--within", "30"), tmp_path / "run"
    ) as run:
        run.past(1)
        run.until(lambda: killed_at_work(run, kits / "west"))
        lost_in, site = run.noted("its worker ended")[-1]
        assert site == "west"
        run.until(lambda: run.answered("west", lost_in + 1))
        missed = run.lost()
        hit(family(["runner_process", kits / "server"]))
        run.until(lambda: run.noted("another took its place"))
        relayed_in = run.noted("another took its place")[0][0]
        for site in federation.sites:
            run.until(lambda site=site: run.answered(site, relayed_in))
        assert run.lost() == missed  # the lost relay cost nobody's reply
        hit(
            [
                pid
                for pid in family([kits / "east"])
                if "fleet start" not in " ".join(psutil.Process(pid).cmdline())
            ]
        )
        run.until(lambda: run.noted("does not answer"))
        lost_in, site = run.noted("does not answer")[0]
        assert site == "east"
        run.until(lambda: run.answered("east", lost_in + 1) or run.at_rest())
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(60) == 130
    assert "interrupted" in tmp_path.joinpath("run.log").read_text()
    assert {site for _, site in run.lost()} == {"west", "east"}
    assert run.lost() <= set(run.noted("left_out"))


def killed_at_work(run, kit):
    """Kill the site's worker when it works, until the records tell of a reply lost with it."""
    if not run.noted("its worker ended"):
        workers = family(["fedspine.flare.worker_process", kit])
        if workers and at_work(psutil.Process(workers[0])):
            os.kill(workers[0], signal.SIGKILL)
            time.sleep(3.0)  # until the round is in the records; a new worker need not die too
    return run.noted("its worker ended")


def at_work(process, seconds=0.2):
    """Whether it computes: a tenth of the time will do, since others may want the cores."""
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return sum(process.cpu_times()[:2]) - before > seconds / 10


def test_a_run_that_is_killed_goes_on_to_the_state_of_the_simulated_run(
    place, federation, tmp_path
):
    """A method of split learning here, one that prunes above."""
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=MERGE, run=RUN | {"rounds": 8})
    with Going(over_flare(federation, recipe, tmp_path / "run"), tmp_path / "run") as run:
        run.past(2)
    done = forked("run", "--resume", tmp_path / "run")  # the folder knows its fleet
    assert done.returncode == 0, done.stderr
    assert "of them done before" in done.stderr + done.stdout
    found = summary(tmp_path / "run")
    assert found["state_sha256"] == pack(simulated(place, recipe, tmp_path / "simulated")).sha256
    assert "simulated_seconds" not in found
    assert found["fleet_seconds"] > 0
    assert (tmp_path / "run" / "report.html").is_file()
