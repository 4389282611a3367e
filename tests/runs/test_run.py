"""Whole runs: what happens when devices fail, and that memory does not grow with their number."""

import functools
import json
import math
from dataclasses import replace

import pytest
from runs import in_process, records_of, summary_of, tiny_job, without_wall, write_csv
from warm import forked

from fedspine.fleets.lossy import Lossy
from fedspine.lm import importance_sources
from fedspine.runs import evaluation, loop


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


def test_a_device_whose_loss_is_no_number_is_left_out(job, command, tmp_path, monkeypatch) -> None:
    tune = importance_sources.tune

    def breaks(device, *values, **options):
        trace = tune(device, *values, **options)
        return replace(trace, loss=math.nan) if device.id == "nx-01" else trace

    monkeypatch.setattr(importance_sources, "tune", breaks)
    code, _, lines = command("run", *job(fleet__per_round=3), "--out", tmp_path / "run", "--json")
    assert (code, lines) == (0, [])
    notes = [row for row in records_of(tmp_path / "run") if row["row"] == "note"]
    left_out = [
        (row["round"], row["values"]["device"]) for row in notes if "left_out" in row["values"]
    ]
    assert left_out == [(0, "nx-01"), (1, "nx-01")]
    assert math.isfinite(summary_of(tmp_path / "run")["loss"])
    assert "nx-01" in (tmp_path / "run" / "report.html").read_text()


def test_all_devices_lost_before_the_first_round_ends(job, command, tmp_path) -> None:
    folder = tmp_path / "run"
    for arguments in (("run", *job(fleet__drop=1.0), "--out", folder), ("run", "--resume", folder)):
        code, out, lines = command(*arguments, "--json")
        assert (code, out) == (2, "")
        (line,) = lines
        assert "0 replied" in line
        # what is lost follows from the recipe
        assert "lower fleet.drop (1) and start a new run; no round is saved yet" in line
        assert "--resume" not in line
    code, out, _ = command("show", folder, "--json")
    assert (code, json.loads(out)["rounds_done"]) == (0, 0)
    code, _, lines = command("export", folder, "--to", tmp_path / "model", "--json")
    assert code == 2
    assert "no model yet" in lines[0]
    assert not (tmp_path / "model").exists()


def test_all_devices_lost_later(job, command, tmp_path, monkeypatch) -> None:
    """The state is saved, and once the devices are back the run ends as if they had never been
    lost.
    """
    command("run", *job(), "--out", tmp_path / "whole", "--json")
    folder = tmp_path / "run"

    around = loop.around

    def silent_later(recipe, fleet, in_flight):
        inner = Lossy(fleet, drop=1.0, seed=0) if fleet.now else fleet
        return around(recipe, inner, in_flight)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "around", silent_later)
        code, _, lines = command("run", *job(), "--out", folder, "--json")
    (line,) = lines
    assert code == 2
    assert "1 round saved" in line
    code, out, _ = command("show", folder)
    assert code == 0
    assert "1 of 2 rounds" in out
    code, _, _ = command("run", "--resume", folder, "--json")
    assert code == 0
    assert without_wall(summary_of(folder)) == without_wall(summary_of(tmp_path / "whole"))
    assert records_of(folder) == records_of(tmp_path / "whole")


def test_a_failure_that_nobody_expected(job, command, tmp_path, monkeypatch) -> None:
    """One line for the user, the traceback in a file, which goes when the run ends well."""

    def fails(*values):
        raise ZeroDivisionError("a bug\nof two lines")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "marks", fails)
        code, _, lines = command("run", *job(), "--out", tmp_path / "run", "--json")
    (line,) = lines
    assert code == 2
    assert line.startswith("fedspine: ZeroDivisionError: a bug of two lines; 2 rounds saved")
    assert "in fails" in (tmp_path / "run" / "failure.txt").read_text()
    code, _, _ = command("run", "--resume", tmp_path / "run", "--json")
    assert code == 0
    assert not (tmp_path / "run" / "failure.txt").exists()


def test_a_changed_recipe_is_not_gone_on_with(job, command, tmp_path) -> None:
    command("run", *job(), "--out", tmp_path / "run", "--json")
    (tmp_path / "run" / "summary.json").unlink()
    recipe = tmp_path / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 2", "steps = 3"))
    code, _, lines = command("run", "--resume", tmp_path / "run", "--json")
    assert code == 2
    assert "changed after it began" in lines[0]


def test_rows_that_were_lost_are_missed(job, command, tmp_path) -> None:
    command("run", *job(), "--out", tmp_path / "run", "--json")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "records.jsonl").write_text("")
    code, _, lines = command("run", "--resume", tmp_path / "run", "--json")
    assert code == 2
    assert "records.jsonl has lost rows" in lines[0]


PEAK = """
import sys
from fedspine.core.process import peak_memory_bytes
from fedspine.ui import cli
sys.argv = ["fedspine", "run", *sys.argv[1:], "--json"]
try:
    cli.main()
finally:
    print(peak_memory_bytes(), file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_devices(tiny_folder, tmp_path) -> None:
    data = write_csv(tmp_path / "rows.csv", rows=1300)
    peaks = {}
    for devices in (10, 1000):
        changed = {"fleet__devices": devices, "fleet__per_round": 10, "run__rounds": 3}
        arguments = tiny_job(tiny_folder("bert"), data, **changed)
        done = forked(*arguments, "--out", tmp_path / str(devices), code=PEAK)
        assert done.returncode == 0, done.stderr
        peaks[devices] = int(done.stderr.split()[-1])
        assert summary_of(tmp_path / str(devices))["devices_scored"] == 4
    # a hundred times as many devices; what does not grow with them, the libraries, is about 600 MB
    assert peaks[1000] <= 1.3 * peaks[10]


def test_a_run_of_limited_time_begins_no_round_after_it(job, command, tmp_path) -> None:
    """Two rounds where the second one begins in time, and one where the limit is what the first one
    took.
    """
    command("run", *job(run__rounds=4), "--out", tmp_path / "whole", "--json")
    first, second, *_ = (
        row["now"] for row in records_of(tmp_path / "whole") if row["row"] == "round"
    )
    for name, seconds, rounds, now in (("one", first, 1, first), ("two", 1.01 * first, 2, second)):
        _, _, lines = command(
            "run", *job(run__rounds=4, run__seconds=seconds), "--out", tmp_path / name
        )
        summary = summary_of(tmp_path / name)
        assert (summary["rounds"], summary["simulated_seconds"]) == (rounds, now)
        assert any(f"round {rounds}/{rounds}" in line for line in lines)
    code, _, (line,) = command("run", *job(run__seconds=-1.0), "--out", tmp_path / "none", "--json")
    assert code == 2 and "run.seconds" in line
