"""Tiny jobs for the tests of whole runs, and the files of a run."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from places import SOURCE

from fedspine.ui import cli

CLASS_WORDS = {"kind": ("good", "the", "very"), "unkind": ("bad", "not", "small")}
NOISE = ("in", "is", "with", "at", "cab", "dig", "27")
WALL = {
    "wall_seconds",
    "server_wall_seconds",
    "samples_per_second",
}  # wall-clock measurements, which differ between runs


def write_csv(path, rows=80, labels=tuple(CLASS_WORDS)):
    """A CSV file of short texts of two classes, which a tiny model can learn."""
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for row in range(rows):
        label = labels[row % len(labels)]
        lines.append(
            f"{' '.join([*rng.choice(CLASS_WORDS[label], 3), *rng.choice(NOISE, 3)])},{label}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_job(model, data, **changed):
    """Arguments of `fedspine run` for two rounds of two of three devices; `changed` as
    section__key=value.
    """
    settings = {
        "task.model": model,
        "task.data": data,
        "fleet.devices": 3,
        "fleet.per_round": 2,
        "run.rounds": 2,
        "run.workers": 1,
        # bf16 takes ten times as long on processors without instructions for it
        "run.precision": "fp32",
        "run.references": "false",
        "method.steps": 2,
        "method.ranks": [2, 4],
    } | {key.replace("__", ".", 1): value for key, value in changed.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def carried_out(*arguments):
    """Run the command line in this process, for shared fixtures; it must succeed."""
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # which a run sets for its process
        patch.setattr(sys, "argv", ["fedspine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code, said.getvalue()


def in_process(monkeypatch, capsys, *arguments):
    """Run the command line in this process: its exit code, stdout, and the lines of stderr."""
    # which a run sets for its own process
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    monkeypatch.setattr(sys, "argv", ["fedspine", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err.splitlines()


def fedspine(*arguments, **options):
    """Run the command line in a process of its own; its output is captured."""
    return python("-m", "fedspine", *map(str, arguments), **options)


def python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)


@contextmanager
def handling_ctrl_c():
    """Processes started in this context receive Ctrl-C.

    Tests that `nohup` or a shell's background job runs ignore it, and so would what they
    start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ignoring_ctrl_c():
    """Processes started in this context ignore Ctrl-C, as under `nohup`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def environment():
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def records_of(folder):
    """All rows, without wall-clock measurements."""
    rows = [json.loads(line) for line in (Path(folder) / "records.jsonl").read_text().splitlines()]
    return [without_wall(row) for row in rows]


def without_wall(row):
    return {key: value for key, value in row.items() if key not in WALL}
