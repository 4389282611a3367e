"""Runs that are killed, interrupted or out of room go on to the same end, bit for bit. See
kill_driver.py.
"""

import errno
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from runs import environment, records_of, summary_of, tiny_job, without_wall, write_csv

DRIVER = ROOT / "tests" / "support" / "kill_driver.py"
ENOUGH: dict = {}  # an attempt that nothing disturbs
# writes before a run's folder is there: its recipe and its task.json, and for the latter the base's
# configuration and
# the two files of its tokenizer
MAKING = {"replace": 2, "fsync": 5}


@pytest.fixture(scope="module")
def job(tiny_folder, tmp_path_factory):
    """A function that carries out plans on the same tiny job, and the folder of its undisturbed
    run.
    """
    root = tmp_path_factory.mktemp("killed")
    data = write_csv(root / "rows.csv")
    command = [sys.executable, str(DRIVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as driver:

        def carry_out(folder, *attempts, every=False, **changed):
            arguments = tiny_job(tiny_folder("bert"), data, run__evaluate_every=1, **changed)
            plan = {"folder": str(root / folder), "attempts": attempts, "every": every}
            driver.stdin.write(json.dumps({"arguments": arguments, "plan": plan}) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        (whole,) = carry_out("whole", {"report": True})
        assert whole["ends"][0]["code"] == 0, whole
        yield carry_out, whole["folder"]
        driver.stdin.close()


def assert_same(folder, whole):
    """The run in `folder` ended as the undisturbed one did, and left nothing half-written."""
    assert without_wall(summary_of(folder)) == without_wall(summary_of(whole))
    assert records_of(folder) == records_of(whole)
    names = {path.name for path in Path(folder).iterdir()}
    assert names == {path.name for path in Path(whole).iterdir()}
    assert {p.name for p in (Path(folder) / "state").iterdir()} == {
        p.name for p in (Path(whole) / "state").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(job, workers) -> None:
    carry_out, whole = job
    (plan,) = carry_out(f"workers-{workers}", ENOUGH, run__workers=workers)
    assert plan["ends"][0]["code"] == 0, plan
    assert_same(plan["folder"], whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "when"), [("replace", "before"), ("replace", "after"), ("fsync", "before")]
)
def test_killed_at_every_write(job, function, when) -> None:
    """Killed at the first, second, ... file that is written, renamed, until the run ends before its
    turn.
    """
    carry_out, whole = job
    *killed, unharmed = carry_out(
        f"{function}-{when}", {"function": function, "when": when}, ENOUGH, every=True
    )
    # a round writes two memories, the state and its name; there is a summary after
    assert len(killed) >= MAKING[function] + 2 * 4 + 1
    for number, plan in enumerate(killed):
        first, last = plan["ends"]
        assert (first["code"], last["code"]) == (-9, 0), plan
        assert last["resumes"] or number < MAKING[function]
        assert_same(plan["folder"], whole)
    assert unharmed["ends"][0]["code"] == 0


@pytest.mark.slow
def test_killed_while_old_files_are_removed(job) -> None:
    carry_out, whole = job
    *killed, _ = carry_out("unlink", {"function": "unlink", "when": "before"}, ENOUGH, every=True)
    # the state of the first round, and the memory of a device that is asked again
    assert len(killed) >= 2
    for plan in killed:
        assert [end["code"] for end in plan["ends"]] == [-9, 0]
        assert_same(plan["folder"], whole)


@pytest.mark.slow
def test_killed_at_random_moments(job) -> None:
    """At least twenty kills of runs with two workers, several of them on the same run; no worker
    outlives its run.
    """
    carry_out, whole = job
    rng, kills = random.Random(20), 0
    for number in range(30):  # on a fast machine a run may be over before it is struck
        if kills >= 20:
            break
        delays = [rng.uniform(0, 0.4) for _ in range(4)]
        struck = [{"seconds": seconds, "slow": 0.03} for seconds in delays]
        (plan,) = carry_out(f"random-{number}", *struck, ENOUGH, run__workers=2)
        kills += sum(end["code"] == -9 for end in plan["ends"])
        assert plan["orphans"] == []
        assert [line for end in plan["ends"] for line in end["said"]] == []
        assert plan["ends"][-1]["code"] == 0
        assert_same(plan["folder"], whole)
    assert kills >= 20


def test_killed_while_replies_are_late(job) -> None:
    """Rounds that end at two of three replies; the third is under way when the run is killed."""
    carry_out, _ = job
    busy = {"fleet__per_round": 3, "fleet__quorum": 0.5, "run__rounds": 3}
    (whole,) = carry_out("late-whole", ENOUGH, **busy)
    assert whole["ends"][0]["code"] == 0, whole
    # of the first round the three memories, the state and its name, which is the last to be written
    struck = {"function": "replace", "when": "after", "call": MAKING["replace"] + 5}
    (plan,) = carry_out("late-killed", struck, ENOUGH, **busy)
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (-9, 0), plan
    assert last["resumes"]
    assert_same(plan["folder"], whole["folder"])
    asked = [row["round"] for row in records_of(whole["folder"]) if row["row"] == "exchange"]
    assert len(asked) < 9  # in a later round somebody was busy


@pytest.mark.slow
def test_full_disk_at_every_write(job) -> None:
    carry_out, whole = job
    struck = {"function": "fsync", "when": "before", "error": errno.ENOSPC}
    *full, _ = carry_out("full", struck, ENOUGH, every=True)
    # as above, and the records once a round and at the end
    assert len(full) >= MAKING["fsync"] + 2 * 5 + 2
    for plan in full:
        first, last = plan["ends"]
        assert (first["code"], last["code"]) == (2, 0), plan
        (line,) = first["said"]
        assert line.startswith("fedspine: ")
        assert "No space left on device" in line
        assert_same(plan["folder"], whole)


@pytest.mark.slow
def test_file_that_may_not_grow(job) -> None:
    """The system's own limit on the size of files, which the second round's state passes and the
    first's does not.
    """
    carry_out, whole = job
    # the wall seconds in a state take a few bytes more or less in every run; a second round adds
    # hundreds
    bytes = (Path(whole) / "state" / "round-000002.safetensors").stat().st_size - 100
    (plan,) = carry_out("limit", {"file_bytes": bytes}, ENOUGH)
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (2, 0), plan
    (line,) = first["said"]
    assert "File too large; 1 round saved" in line
    assert line.endswith(f"fedspine run --resume {plan['folder']}")
    assert_same(plan["folder"], whole)


@pytest.mark.slow
def test_report_without_room(job) -> None:
    """A run that had no room for its last file is finished by resuming it."""
    carry_out, _ = job
    struck = {
        "function": "replace",
        "call": 12,
        "when": "before",
        "error": errno.ENOSPC,
        "report": True,
    }
    (plan,) = carry_out("report", struck, {"report": True})
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (2, 0), plan
    (line,) = first["said"]
    assert "2 rounds saved" in line
    assert (Path(plan["folder"]) / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.25])
def test_interrupted(job, seconds) -> None:
    """Ctrl-C reaches the workers too: one line, exit code 130, and nothing is lost."""
    carry_out, whole = job
    struck = {"seconds": seconds, "signal": "INT", "slow": 0.1}
    (plan,) = carry_out(f"interrupt-{seconds}", struck, ENOUGH, run__workers=2)
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (130, 0), plan
    (line,) = first["said"]
    assert line.startswith("fedspine: interrupted; ")
    assert plan["orphans"] == []
    assert_same(plan["folder"], whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers", "says"),
    [
        ("exit", 2, "worker"),
        ("raise", 2, "no room for 8 exabytes"),
        ("raise", 1, "no room for 8 exabytes"),
    ],
)
def test_worker_that_fails(job, how, workers, says) -> None:
    carry_out, whole = job
    (plan,) = carry_out(
        f"worker-{how}-{workers}", {"job": 2, "how": how}, ENOUGH, run__workers=workers
    )
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (2, 0), plan
    (line,) = first["said"]
    assert says in line
    assert f"--resume {plan['folder']}" in line
    assert_same(plan["folder"], whole)
