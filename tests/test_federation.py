"""Whole runs over NVIDIA FLARE on this machine: the bits of simulation, whatever dies on the way."""

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
from flare_federation import SITES, write_recipe
from runs import fedspine
from toy import Lab

from fedspine.build import START, build_task, dataset
from fedspine.config import load
from fedspine.fleets import party  # noqa: F401 - which makes the messages in a saved state known
from fedspine.message import pack
from fedspine.store import Store

pytestmark = pytest.mark.slow
RUN = {"precision": "fp32", "evaluate_every": 0}


def over_flare(federation, recipe, folder, *more):
    """Arguments of a run at the federation's sites."""
    return ["run", str(recipe), "--fleet", str(federation.admin), "--sites", "3", "--out", str(folder), *more]


def simulated(place, recipe, folder):
    """The final state of the recipe on simulated devices that hold the rows and bear the names of the sites."""
    recipe = load(recipe)
    task, _ = build_task(recipe, dataset(recipe))
    lab = Lab(task, folder, kinds=("nx",) * 3)
    lab.workers._workshop = replace(lab.workers._workshop, shares=tuple(place.shares[site] for site in SITES))
    world = lab.fleet._world
    world.profiles = tuple(replace(one, id=site) for one, site in zip(world.profiles, SITES, strict=True))
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


def final_state(folder):
    return Store(folder / "state").load().state["method"]


def rows(folder, kind):
    lines = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    return [line for line in lines if line["row"] == kind]


LORA = {"name": "fedlora", "rank": 4, "steps": 4, "batch": 8, "learning_rate": 2e-2}
# what FedSpine's bandit earns depends on measured seconds, a fixed choice does not
SPINE = {"name": "fedspine", "choice": "fixed", "ranks": [2, 4], "fixed_rank": 4, "steps": 4, "batch": 8}
MERGE = {"name": "mergesfl", "cut": 1, "rank": 4, "steps": 4, "batch": 8, "regulate": False}


@pytest.mark.parametrize("method", [LORA, SPINE], ids=lambda table: table["name"])
def test_a_run_at_sites_ends_in_the_state_of_the_simulated_run(place, federation, tmp_path, method):
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=method, run=RUN | {"rounds": 4})
    done = fedspine(*over_flare(federation, recipe, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert found["state_sha256"] == pack(simulated(place, recipe, tmp_path / "simulated")).sha256
    assert "simulated_seconds" not in found
    assert found["fleet_seconds"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_split_learning_with_an_exchange_per_step_gives_the_same_model(place, federation, tmp_path):
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=MERGE, run=RUN | {"rounds": 2})
    done = fedspine(*over_flare(federation, recipe, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    expected = simulated(place, recipe, tmp_path / "simulated")
    # beside the model MergeSFL remembers how fast each device was, which a clock on the wall measured
    assert pack(final_state(tmp_path / "run").model).sha256 == pack(expected.model).sha256


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


def saved(folder):
    try:
        return Store(folder / "state").rounds()
    except (OSError, ValueError):
        return 0


class Going:
    """A run in a process of its own."""

    def __init__(self, arguments, folder):
        self.folder = folder
        self.log = open(folder.with_suffix(".log"), "w")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedspine", *map(str, arguments)], stdout=self.log, stderr=self.log
        )

    def past(self, round, seconds=120):
        """Wait until so many rounds are saved."""
        end = time.monotonic() + seconds
        while saved(self.folder) < round:
            assert self.process.poll() is None, self.folder.with_suffix(".log").read_text()
            assert time.monotonic() < end, f"{saved(self.folder)} rounds are saved"
            time.sleep(0.05)

    def end(self, seconds=180):
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()


def test_whatever_dies_is_reported_and_the_run_goes_on(place, federation, tmp_path):
    """One run: a worker is killed at work, another hangs, the server's job is killed, a site is killed and started again."""
    kits = federation.folder
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=LORA | {"steps": 30}, run=RUN | {"rounds": 60})
    run = Going(over_flare(federation, recipe, tmp_path / "run", "--within", "10"), tmp_path / "run")
    try:
        run.past(2)
        hit(family(["fedspine.fleets.resident", kits / "west"]))
        run.past(saved(run.folder) + 2)
        hit(family(["fedspine.fleets.resident", kits / "north"]), signal.SIGSTOP)
        run.past(saved(run.folder) + 2)
        hit(family(["runner_process", kits / "server"]))
        run.past(saved(run.folder) + 2)
        hit([pid for pid in family([kits / "east"]) if "fleet start" not in " ".join(psutil.Process(pid).cmdline())])
        assert run.end() == 0, tmp_path.joinpath("run.log").read_text()
    finally:
        if run.process.poll() is None:
            run.end(0)
    assert len(rows(run.folder, "round")) == 60
    assert {note["values"].get("device") for note in rows(run.folder, "note") if "left_out" in note["values"]} >= {
        "north"
    }
    assert all(lost["bytes_up"] == 0 for lost in rows(run.folder, "exchange") if lost["lost"])
    assert "state_sha256" in summary(run.folder)


def test_a_run_that_is_killed_goes_on_to_the_same_state(place, federation, tmp_path):
    recipe = write_recipe(place, tmp_path / "recipe.toml", method=LORA, run=RUN | {"rounds": 12})
    run = Going(over_flare(federation, recipe, tmp_path / "run"), tmp_path / "run")
    run.past(4)
    run.process.kill()
    run.end()
    done = fedspine("run", "--resume", tmp_path / "run")  # the folder knows its fleet
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["state_sha256"] == pack(simulated(place, recipe, tmp_path / "simulated")).sha256
