"""Runs that are killed, interrupted or out of room go on to the same end, bit for bit. See
kill_driver.py.
"""

import errno
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from runs import environment, records_of, summary_of, tiny_job, without_wall, write_csv
from warm import forked

DRIVER = ROOT / "tests" / "support" / "kill_driver.py"
ENOUGH: dict = {}  # an attempt that nothing disturbs
# writes before a run's folder is there: its recipe and its task.json, and for the latter the base's
# configuration and
# the two files of its tokenizer
MAKING = {"replace": 2, "fsync": 5}
# of `os.replace`, after that: the list of the start, in the first round two memories, a state and
# its list, in the second the list of the round before, too
SUMMARY, REPORT = MAKING["replace"] + 1 + 4 + 5 + 1, MAKING["replace"] + 1 + 4 + 5 + 2


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
    """The third round is the first after which a state and memories go."""
    carry_out, _ = job
    (plan,) = carry_out("whole-3", ENOUGH, run__rounds=3)
    whole = plan["folder"]
    struck = {"function": "unlink", "when": "before"}
    *killed, _ = carry_out("unlink", struck, ENOUGH, every=True, run__rounds=3)
    assert len(killed) >= 2  # the state of the first round, and the memory of a device
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
    summary = summary_of(whole["folder"])
    assert summary["replies_late"] > 0 == summary["replies_lost"]


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
        "call": REPORT,
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
    ("blow", "workers"), [("TERM", 1), ("TERM", 2), ("TERM to all", 1), ("TERM to all", 2)]
)
def test_a_run_that_gets_a_signal(job, blow, workers) -> None:
    """One line, exit code 143, no worker is left, and the run goes on to the end that it would have
    had.
    """
    carry_out, whole = job
    struck = {"seconds": 0.1, "signal": blow, "slow": 0.1}
    (plan,) = carry_out(f"stopped-{blow}-{workers}", struck, ENOUGH, run__workers=workers)
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (143, 0), plan
    (line,) = first["said"]
    assert line.startswith("fedspine: terminated; ")
    assert line.endswith(f"resume with: fedspine run --resume {plan['folder']}")
    assert plan["orphans"] == []
    assert_same(plan["folder"], whole)


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "code"), [("INT", 0), ("TERM to all", 143)])
def test_a_run_under_nohup(job, blow, code) -> None:
    """It goes on at Ctrl-C, workers included, and ends on a signal."""
    carry_out, whole = job
    struck = {"seconds": 0.1, "signal": blow, "slow": 0.1, "ignores_ctrl_c": True}
    (plan,) = carry_out(f"ignoring-{blow}", struck, ENOUGH, run__workers=2)
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (code, 0), plan
    assert len(first["said"]) == (1 if code else 0)
    assert plan["orphans"] == []
    assert_same(plan["folder"], whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job_number", "how", "workers", "says"),
    [
        (1, "exit", 2, "3 worker processes in a row"),
        (2, "raise", 2, "no room for 8 exabytes"),
        (2, "raise", 1, "no room for 8 exabytes"),
    ],
)
def test_worker_that_fails(job, job_number, how, workers, says) -> None:
    carry_out, whole = job
    (plan,) = carry_out(
        f"worker-{how}-{workers}", {"job": job_number, "how": how}, ENOUGH, run__workers=workers
    )
    first, last = plan["ends"]
    assert (first["code"], last["code"]) == (2, 0), plan
    (line,) = first["said"]
    assert says in line
    assert f"--resume {plan['folder']}" in line
    assert_same(plan["folder"], whole)


@pytest.mark.slow
def test_workers_that_are_killed_are_started_again(job) -> None:
    """Each dies at the second job that it gets, again and again; no job loses three in a row."""
    carry_out, whole = job
    (plan,) = carry_out("worker-again", {"job": 2, "how": "exit"}, run__workers=2)
    assert plan["ends"][0]["code"] == 0, plan
    assert plan["ends"][0]["said"] == []
    assert_same(plan["folder"], whole)


# --- damage ---

FLIPPED = {  # file, and the round to which the run can go back
    "state/round-000002.safetensors": 1,
    "state/memory-*-000001.safetensors": None,  # 1 or 0: whether the first round had it already
    "state/current.json": 1,
    "records.jsonl": 0,
}
BEFORE_SUMMARY = {"function": "replace", "when": "before", "call": SUMMARY}


@pytest.mark.slow
@pytest.mark.parametrize("file", FLIPPED)
def test_a_flipped_bit_ends_in_one_line_and_a_way_back(job, file) -> None:
    carry_out, whole = job
    name = f"flipped-{list(FLIPPED).index(file)}"
    (plan,) = carry_out(name, BEFORE_SUMMARY)
    assert plan["ends"][0]["code"] == -9
    folder = Path(plan["folder"])
    path = sorted(folder.glob(file))[0]
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 3] ^= 4
    path.write_bytes(payload)
    (plan,) = carry_out(name, ENOUGH)
    assert plan["ends"][0]["code"] == 2
    (line,) = plan["ends"][0]["said"]
    advice = re.search(
        rf"is damaged: .*; go back to round (\d) with: fedspine run --resume {folder} "
        r"--from-round \1",
        line,
    )
    assert advice, line
    assert FLIPPED[file] in (None, int(advice[1]))
    (plan,) = carry_out(name, {"more": ["--from-round", advice[1]]})
    assert plan["ends"][0]["code"] == 0, plan
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["current.json", "*"])
def test_a_lost_list_starts_nothing_in_silence(job, lost) -> None:
    carry_out, whole = job
    name = f"lost-{lost.replace('*', 'all')}"
    (plan,) = carry_out(name, BEFORE_SUMMARY)
    folder = Path(plan["folder"])
    for path in (folder / "state").glob(lost):
        path.unlink()
    (plan,) = carry_out(name, ENOUGH)
    (line,) = plan["ends"][0]["said"]
    assert "current.json is missing, though rounds were done; go back to round" in line
    (plan,) = carry_out(name, {"more": ["--from-round", "0"]})
    assert plan["ends"][0]["code"] == 0, plan
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_finished_run_whose_state_is_damaged_goes_back_too(job) -> None:
    carry_out, whole = job
    (plan,) = carry_out("finished", ENOUGH)
    folder = Path(plan["folder"])
    path = folder / "state" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    done = forked("export", folder, "--to", folder / "model")
    assert done.returncode == 2
    assert "is damaged: round-000002.safetensors has other bytes" in done.stderr
    for wrong in ("2", "5"):
        (plan,) = carry_out("finished", {"more": ["--from-round", wrong]})
        assert plan["ends"][0]["code"] == 2
        assert "only to round 1, and to round 0" in plan["ends"][0]["said"][0]
        assert (folder / "summary.json").exists()
    (plan,) = carry_out("finished", {"more": ["--from-round", "1"]})
    assert plan["ends"][0]["code"] == 0, plan
    assert_same(folder, whole)


@pytest.mark.slow
def test_files_that_may_not_grow(job) -> None:
    """The system's own limit, one byte below the size of each file that a run leaves: whatever
    cannot be written, by `fsync` or without, the run ends in one line and goes on.
    """
    carry_out, whole = job
    sizes = {path.stat().st_size for path in Path(whole).rglob("*") if path.is_file()}
    ended = 0
    for size in sorted(size for size in sizes if size > 500)[::2]:
        (plan,) = carry_out(f"limit-{size}", {"file_bytes": size - 1}, ENOUGH)
        first, last = plan["ends"]
        assert (first["code"], last["code"]) in ((2, 0), (0, 0)), plan
        assert len(first["said"]) == (first["code"] != 0), plan
        ended += first["code"] == 2
        assert_same(plan["folder"], whole)
    assert ended >= 3


@pytest.mark.slow
def test_a_folder_that_is_read_only(job) -> None:
    carry_out, whole = job
    (plan,) = carry_out("read-only", BEFORE_SUMMARY)
    folder = Path(plan["folder"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (plan,) = carry_out("read-only", {"read_only": str(folder)})
    assert plan["ends"][0]["code"] == 2
    (line,) = plan["ends"][0]["said"]
    assert "Read-only file system; 2 rounds saved; resume with" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (plan,) = carry_out("read-only-new", {"read_only": str(folder.parent)})
    (line,) = plan["ends"][0]["said"]
    assert "cannot be made (Read-only file system); choose another with --out" in line
    (plan,) = carry_out("read-only", ENOUGH)
    assert plan["ends"][0]["code"] == 0
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(job) -> None:
    carry_out, whole = job
    (plan,) = carry_out("clock", BEFORE_SUMMARY | {"clock": True}, {"clock": True})
    assert [end["code"] for end in plan["ends"]] == [-9, 0]
    assert_same(plan["folder"], whole)
