"""What a run says when it ends early: the cause, and to go on only where that can help."""

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import in_process, records_of, summary_of, tiny_job, write_csv

from fedspine.core.errors import BadInput, of_machine
from fedspine.core.fleet import AllLost, Diverged, NoMemory, none_left
from fedspine.execution.workers import WorkerLost, WorkFailed
from fedspine.lm import importance_sources
from fedspine.methods import fedlora
from fedspine.methods.fedspine import FedSpine
from fedspine.runs.failure_advice import advice

FOLDER = Path("runs/one")


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command in this process: its exit code, stdout, and the lines of
    stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture
def job(tiny_folder, tmp_path):
    """Arguments of a tiny run."""
    return functools.partial(tiny_job, tiny_folder("bert"), write_csv(tmp_path / "rows.csv"))


def recipe(drop=0.0, workers=0, **method):
    return SimpleNamespace(
        fleet=SimpleNamespace(drop=drop),
        run=SimpleNamespace(workers=workers),
        method=SimpleNamespace(**{"name": "fedspine", "learning_rate": 2e-4} | method),
    )


METHODS = {
    "fedspine": {"method__name": "fedspine"},
    "fedlora": {"method__name": "fedlora", "method__rank": 2},
    "flexlora": {"method__name": "flexlora", "method__ranks": "[2, 4]"},
    "mergesfl": {"method__name": "mergesfl", "method__rank": 2},
    "copies": {"method__name": "mergesfl", "method__rank": 2, "method__merging": "copies"},
    "labels stay": {
        "method__name": "mergesfl-plus",
        "method__rank": 2,
        "method__labels_stay": "true",
    },
    "splitlora": {"method__name": "splitlora", "method__rank": 2},
}


@pytest.mark.parametrize("what", METHODS)
def test_a_learning_rate_that_is_too_high(job, command, tmp_path, what):
    """The line names the loss and the setting, and a resume, which would end the same way, is not
    offered.
    """
    settings = {"method__learning_rate": 1e9, "method__steps": 4} | METHODS[what]
    arguments = job(**settings)
    if "method__rank" in settings:
        place = next(i for i, part in enumerate(arguments) if part.startswith("method.ranks"))
        arguments = arguments[: place - 1] + arguments[place + 1 :]
    folder = tmp_path / "run"
    code, out, lines = command("run", *arguments, "--out", folder, "--json")
    (line,) = lines
    assert (code, out) == (2, "")
    # split learning without merging goes from device to device
    who = "the one device asked" if what == "splitlora" else "all 2 devices"
    assert who in line and "not finite" in line
    assert "lower method.learning_rate (1e9)" in line and "start a new run" in line
    assert "--resume" not in line
    code, out, _ = command("show", folder)
    shown = " ".join(out.split())
    assert code == 0 and "lower method.learning_rate (1e9)" in shown and "--resume" not in shown
    # which is true: it ends with the same words
    code, _, again = command("run", "--resume", folder, "--json")
    assert (code, again) == (2, lines)


def test_a_device_that_diverges_alone_is_recorded_as_such(job, command, tmp_path, monkeypatch):
    tune = importance_sources.tune

    def breaks(device, model, *values, **options):
        if device.id == "nx-01":
            wrong = {name: torch.full_like(part, torch.nan) for name, part in model.head.items()}
            model = replace(model, head=wrong)
        return tune(device, model, *values, **options)

    monkeypatch.setattr(importance_sources, "tune", breaks)
    code, _, lines = command("run", *job(fleet__per_round=3), "--out", tmp_path / "run", "--json")
    assert (code, lines) == (0, [])
    left_out = [
        (row["values"]["device"], row["values"]["left_out"])
        for row in records_of(tmp_path / "run")
        if row["row"] == "note" and "left_out" in row["values"]
    ]
    assert left_out == [("nx-01", "cannot be used: loss is nan")] * 2


def test_a_state_that_no_device_can_use_is_not_saved_over_the_last_good_one(
    job, command, tmp_path, monkeypatch
):
    """Round 2 makes weights that are not finite of replies that are; round 3 gets nothing else."""
    folder, arguments = tmp_path / "run", job(run__rounds=4, method__name="fedlora")
    at = next(i for i, word in enumerate(arguments) if word.startswith("method.ranks"))
    arguments[at] = "method.rank=2"
    whole = ("run", *arguments, "--out", tmp_path / "whole", "--json")
    assert command(*whole)[0] == 0
    merged = fedlora.merged
    rounds = []

    def spoils(replies, fleet, **before):
        rounds.append(0)
        found = merged(replies, fleet, **before)
        if len(rounds) == 1:
            return found
        return {field: {k: t * torch.nan for k, t in each.items()} for field, each in found.items()}

    monkeypatch.setattr(fedlora, "merged", spoils)
    code, _, lines = command("run", *arguments, "--out", folder, "--json")
    assert code == 2 and "the weights after this round are not finite" in lines[0]
    assert "1 round saved" in lines[0]
    monkeypatch.setattr(fedlora, "merged", merged)
    code, _, lines = command("run", "--resume", folder, "--json")
    assert (code, lines) == (0, [])
    same = [summary_of(tmp_path / name)["state_sha256"] for name in ("whole", "run")]
    assert same[0] == same[1]


def test_replies_of_nothing_but_nan_leave_the_last_good_state(job, command, tmp_path, monkeypatch):
    """As at real sites, where a resume may find other replies."""
    folder, tune = tmp_path / "run", importance_sources.tune
    asks = []

    def breaks(device, model, *values, **options):
        asks.append(0)
        if len(asks) > 2:  # of two devices in each round: from the second round on
            model = replace(model, head={k: each * torch.nan for k, each in model.head.items()})
        return tune(device, model, *values, **options)

    monkeypatch.setattr(importance_sources, "tune", breaks)
    for _ in range(2):  # two attempts in a row, after both of which the state is that of round 1
        code, _, lines = command(
            *(("run", "--resume", folder) if folder.exists() else ("run", *job(), "--out", folder)),
            "--json",
        )
        assert code == 2 and "not finite (nan)" in lines[0] and "1 round saved" in lines[0]
    monkeypatch.setattr(importance_sources, "tune", tune)
    code, _, lines = command("run", "--resume", folder, "--json")
    assert (code, lines) == (0, [])
    assert summary_of(folder)["rounds"] == 2


def test_a_state_that_no_device_can_use_twice_gives_way_to_the_one_before(
    job, command, tmp_path, monkeypatch
):
    """Round 2 saves a state to which all devices reply NaN; after two attempts to go on from it the
    run goes on from round 1, whose state they could use.
    """
    folder, tune, spoilt = tmp_path / "run", importance_sources.tune, []

    def breaks(device, model, *values, **options):
        if len(spoilt) > 3:  # the replies of two devices in two rounds are good
            model = replace(model, head={k: each * torch.nan for k, each in model.head.items()})
        spoilt.append(0)
        return tune(device, model, *values, **options)

    monkeypatch.setattr(importance_sources, "tune", breaks)
    arguments = job(run__rounds=4, method__name="fedspine")
    code, _, lines = command("run", *arguments, "--out", folder, "--json")
    assert code == 2 and "not finite (nan)" in lines[0] and "2 rounds saved" in lines[0]
    code, _, lines = command("run", "--resume", folder, "--json")
    assert code == 2 and "not finite (nan)" in lines[0] and "1 round saved" in lines[0]
    monkeypatch.setattr(importance_sources, "tune", tune)
    code, _, lines = command("run", "--resume", folder, "--json")
    assert (code, lines) == (0, [])
    done = [row["round"] for row in records_of(folder) if row["row"] == "round"]
    assert done == [0, 1, 2, 3]


def test_a_round_that_does_not_count_itself_ends_the_run(job, command, tmp_path, monkeypatch):
    monkeypatch.setattr(FedSpine, "round", lambda method, state, fleet: state)
    code, _, (line,) = command("run", *job(), "--out", tmp_path / "run", "--json")
    assert code == 2 and "a state with round = 0, but 1 was expected" in line


@pytest.mark.parametrize("workers", [1, 2])
def test_work_that_fails_would_fail_again(job, command, tmp_path, monkeypatch, workers):
    def breaks(*values, **options):
        raise ZeroDivisionError("of no rows")

    monkeypatch.setattr(importance_sources, "tune", breaks)
    folder = tmp_path / "run"
    code, _, lines = command("run", *job(run__workers=workers), "--out", folder, "--json")
    (line,) = lines
    assert code == 2 and "ZeroDivisionError: of no rows" in line
    assert "no round is saved yet, but a resume would end the same way" in line
    assert "change the recipe and start a new run" in line and "--resume" not in line
    assert "in breaks" in (folder / "failure.txt").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_one_line_from_wherever_it_comes(job, command, tmp_path, monkeypatch, workers):
    def breaks(*values, **options):
        raise BadInput("rank 16 exceeds the 8 of layer 3; lower method.ranks")

    monkeypatch.setattr(importance_sources, "tune", breaks)
    folder = tmp_path / "run"
    code, _, lines = command("run", *job(run__workers=workers), "--out", folder, "--json")
    assert (code, lines) == (2, ["fedspine: rank 16 exceeds the 8 of layer 3; lower method.ranks"])


def worker_failure(error, **more):
    return WorkFailed(f"a worker failed:\nTraceback\n{type(error).__name__}: {error}", **more)


NO_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
RESUME, NEW = f"resume with: fedspine run --resume {FOLDER}", "a resume would end the same way"
ADVICE = {  # the error, the recipe, whether devices are simulated, what is said and what is not
    "diverged": (
        Diverged("x"),
        recipe(learning_rate=1e9),
        True,
        ["lower method.learning_rate (1e9) and start a new run", NEW],
    ),
    "diverged at sites": (Diverged("x"), recipe(), False, ["method.learning_rate (0.0002)", NEW]),
    "no memory on devices": (NoMemory("x"), recipe(), True, ["start a new run", NEW]),
    "lost by the recipe": (AllLost("x"), recipe(drop=1.0), True, ["lower fleet.drop (1)", NEW]),
    "lost": (AllLost("x"), recipe(), True, [RESUME]),
    "sites lost": (AllLost("x"), recipe(drop=0.5), False, [RESUME]),
    "a bug": (ZeroDivisionError("x"), recipe(), True, ["change the recipe", NEW]),
    "a bug in another's method": (
        ZeroDivisionError("x"),
        recipe(name="x"),
        True,
        ["types", RESUME],
    ),
    "a bug at sites": (ZeroDivisionError("x"), recipe(), False, [RESUME]),
    "a bug in a worker": (
        worker_failure(ZeroDivisionError("x"), of_machine=False),
        recipe(),
        True,
        ["change the recipe", NEW],
    ),
    "a killed worker": (
        WorkerLost("x"),
        recipe(),
        True,
        [f"--resume {FOLDER} --set run.workers=1"],
    ),
    "memory": (MemoryError(), recipe(workers=4), True, ["--set run.workers=1"]),
    "torch's memory": (NO_CPU, recipe(), True, ["--set run.workers=1"]),
    "a worker's memory": (
        worker_failure(NO_CPU, of_machine=True),
        recipe(),
        True,
        ["--set run.workers=1"],
    ),
    "memory of one": (
        torch.OutOfMemoryError("CUDA"),
        recipe(workers=1),
        True,
        ["free memory", f"--resume {FOLDER}, or lower method.batch"],
    ),
    "a worker's disk": (worker_failure(OSError("full"), of_machine=True), recipe(), True, [RESUME]),
}


@pytest.mark.parametrize("what", ADVICE)
def test_going_on_is_advised_only_where_it_can_help(what):
    error, of, simulated, said = ADVICE[what]
    line = advice(error, of, "3 rounds saved", FOLDER, simulated=simulated)
    assert "3 rounds saved" in line and "\n" not in line
    assert not [word for word in said if word not in line], line
    assert ("--resume" in line) != (NEW in line)


@pytest.mark.parametrize(
    ("asked", "flaws", "kind", "line"),
    [
        (
            3,
            ["loss is nan"] * 3,
            Diverged,
            "the training loss of all 3 devices is not finite (nan)",
        ),
        (
            2,
            ["loss is nan", "loss is inf"],
            Diverged,
            "the training loss of all 2 devices is not finite (inf, nan)",
        ),
        (
            5,
            ["loss is not finite"] * 2,
            Diverged,
            "the training loss of all 2 devices that replied, of 5 asked, is not finite",
        ),
        (
            2,
            ["weights are not finite", "loss is nan"],
            Diverged,
            "what all 2 devices sent is not finite (loss is nan, weights are not finite)",
        ),
        (4, [], AllLost, "of 4 devices asked, 0 replied"),
    ],
)
def test_why_nothing_is_left_of_a_round(asked, flaws, kind, line):
    error = none_left(asked, flaws)
    assert type(error) is kind and str(error) == line


def test_what_comes_from_the_machine():
    for error in (MemoryError(), OSError(28, "full"), torch.OutOfMemoryError("CUDA"), NO_CPU):
        assert of_machine(error)
    for error in (ZeroDivisionError(), RuntimeError("mat1 and mat2"), BadInput("x"), IndexError()):
        assert not of_machine(error)
