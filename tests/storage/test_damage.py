"""A run's folder with a bit flipped, a file gone or one of another time: found when it is read, and
the run can go back.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedspine.core.errors import BadInput
from fedspine.storage.records import Records
from fedspine.storage.store import Saved, Store, write_atomically

ROUNDS = 3


@pytest.fixture
def run(tmp_path):
    """A run of three rounds: device `a` writes memory in all of them, `b` in the first only."""
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    store = Store(run / "state")
    assert store.open() is None
    records = Records(run / "records.jsonl")
    memories = {}
    for number in range(1, ROUNDS + 1):
        records.round = number - 1
        records.write("round", now=float(number))
        for device in "ab" if number == 1 else "a":
            memories[device] = store.put_memory(device, number, f"{device}{number}".encode() * 9)
        save(store, records, number, memories)
    records.close()
    store.close()
    return run


def save(store, records, number, memories):
    store.save(
        Saved(
            round=number,
            state={"weights": np.arange(10.0) * number},
            fleet=None,
            memories=memories,
            records=records.flush(),
            records_sha256=records.sha256,
        )
    )


def flip(path, bit):
    """Flip one bit of a file."""
    payload = bytearray(path.read_bytes())
    payload[bit // 8 % len(payload)] ^= 1 << bit % 8
    path.write_bytes(payload)


def opened(run):
    """What a resume finds."""
    store = Store(run / "state")
    try:
        saved = store.open()
        return saved.round, saved.state["weights"].tolist(), store.undigested
    finally:
        store.close()


def went_back(run, round):
    store = Store(run / "state")
    try:
        store.go_back(round)
    finally:
        store.close()
    return Store(run / "state").rounds()


FLIPPED = {  # file of the run, and the round that a resume can go back to
    "state/round-000003.safetensors": 2,
    "state/memory-a-000003.safetensors": 2,
    "state/memory-b-000001.safetensors": 0,  # which both kept rounds name
    "state/current.json": 2,
}


@pytest.mark.parametrize("file", FLIPPED)
def test_a_flipped_bit_is_found_wherever_it_is(run, file):
    whole, back = (run / file).read_bytes(), FLIPPED[file]
    bits = 8 * len(whole)
    for bit in {0, 7, bits // 3, bits // 2, bits - 20, bits - 1}:
        flip(run / file, bit)
        with pytest.raises(BadInput, match="is damaged: ") as damaged:
            opened(run)
        assert (
            f"go back to round {back} with: fedspine run --resume {run} --from-round {back}"
            in str(damaged.value)
        )
        assert "\n" not in str(damaged.value)
        (run / file).write_bytes(whole)
    assert opened(run)[0] == ROUNDS


def folder_at(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("file", [*FLIPPED, "state/previous.json", "records.jsonl"])
@pytest.mark.parametrize("put", [folder_at, link_to_itself])
def test_what_is_no_file_is_damage_and_going_back_removes_it(run, file, put):
    put(run / file)
    if file == "state/previous.json":  # which only going back needs
        assert opened(run)[0] == ROUNDS
        assert not (run / file).is_dir()  # which no file could replace
        back = 0
    else:
        said = "records.jsonl" if file == "records.jsonl" else Path(file).name
        with pytest.raises(BadInput, match=f"is damaged: {said}.*; go back to round") as damaged:
            opened(run)
        assert "\n" not in str(damaged.value)
        back = int(str(damaged.value).rsplit("--from-round ")[1][0])
    if file != "records.jsonl":  # whose rows no other file has
        assert went_back(run, back) == back


def test_a_list_that_is_nested_too_deep_is_damage(run):
    (run / "state" / "current.json").write_bytes(b"[" * 10**5)
    with pytest.raises(BadInput, match=r"current.json: it is nested too deep; go back to round 2"):
        opened(run)


def test_every_bit_of_the_list_counts(run):
    """Its own digest finds what would still be JSON, such as another round or another length."""
    path = run / "state" / "current.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        flip(path, bit)
        with pytest.raises(BadInput, match="is damaged"):
            Store(run / "state").rounds()
        path.write_bytes(whole)


def test_a_flipped_bit_in_a_memory_is_found_when_it_is_read_in_a_run(run):
    store = Store(run / "state")
    saved = store.open()
    flip(run / "state" / saved.memories["b"], 11)
    with pytest.raises(BadInput, match=f"{saved.memories['b']} has other bytes than were written"):
        store.get_memory(saved.memories["b"])
    assert store.get_memory(saved.memories["a"]) == b"a3" * 9
    store.close()


@pytest.mark.parametrize("file", ["round-000003.safetensors", "memory-a-000003.safetensors"])
@pytest.mark.parametrize("other", ["round-000002.safetensors", "memory-a-000002.safetensors"])
def test_a_whole_file_in_place_of_another_is_found(run, file, other):
    shutil.copy(run / "state" / other, run / "state" / file)
    with pytest.raises(
        BadInput, match=f"{file} has other bytes than were written; go back to round 2"
    ):
        opened(run)


@pytest.mark.parametrize("file", [file for file in FLIPPED if "current" not in file])
def test_a_file_that_is_gone_is_reported(run, file):
    os.unlink(run / file)
    with pytest.raises(BadInput, match=f"is missing; go back to round {FLIPPED[file]} with"):
        opened(run)


def test_the_round_before_is_whole_and_what_it_goes_on_with(run):
    flip(run / "state" / "round-000003.safetensors", 99)
    assert went_back(run, 2) == 2
    assert opened(run) == (2, (np.arange(10.0) * 2).tolist(), False)
    names = {path.name for path in (run / "state").iterdir()}
    assert names == {
        "current.json",
        "lock",
        "round-000002.safetensors",
        "memory-a-000002.safetensors",
        "memory-b-000001.safetensors",
    }
    # and goes on as if nothing had been: the records are cut back to those two rounds
    store = Store(run / "state")
    saved = store.open()
    records = Records(run / "records.jsonl", saved.records)
    assert len((run / "records.jsonl").read_text().splitlines()) == 2
    records.write("round", now=3.0)
    save(store, records, 3, saved.memories)
    records.close()
    store.close()
    assert opened(run)[0] == 3


def test_a_run_can_go_back_to_its_start_and_to_no_other_round(run):
    for round in (1, 3, 7):
        with pytest.raises(BadInput, match="only to round 2, and to round 0"):
            went_back(run, round)
    assert opened(run)[0] == 3
    assert went_back(run, 0) == 0
    assert {path.name for path in (run / "state").iterdir()} == {"current.json", "lock"}
    with pytest.raises(BadInput, match="only to its start, round 0"):
        went_back(run, 2)
    store = Store(run / "state")
    assert store.open() is None
    store.close()


def test_what_is_undone_stays_where_it_cannot_be_undone(run):
    end = run / "summary.json"
    end.write_text("{}")
    store, other = Store(run / "state"), Store(run / "state")
    with pytest.raises(BadInput, match="cannot go back to round 1"):
        store.go_back(1, [end])
    assert end.exists()
    store.go_back(2, [end, run / "not there"])
    assert not end.exists()
    store.close()
    assert other.load().round == 2


def test_both_rounds_damaged_leaves_the_start(run):
    flip(run / "state" / "round-000003.safetensors", 99)
    flip(run / "state" / "round-000002.safetensors", 99)
    with pytest.raises(BadInput, match="go back to round 0 with"):
        opened(run)
    with pytest.raises(BadInput, match="only to its start"):
        went_back(run, 2)


@pytest.mark.parametrize("gone", ["current.json", "current.json previous.json"])
def test_a_lost_list_is_reported_and_nothing_starts_anew(run, gone):
    for name in gone.split():
        os.unlink(run / "state" / name)
    back = 0 if "previous" in gone else 2
    for read in (opened, lambda run: Store(run / "state").rounds()):
        with pytest.raises(
            BadInput, match=rf"current\.json is missing, .* go back to round {back} with"
        ):
            read(run)
    assert (run / "state" / "round-000003.safetensors").exists()
    assert went_back(run, back) == back


def test_a_state_that_is_gone_altogether_is_reported_by_the_records(run):
    for path in (run / "state").iterdir():
        path.unlink()
    with pytest.raises(BadInput, match=r"current\.json is missing"):
        opened(run)


def test_a_run_that_was_killed_in_its_first_round_lost_nothing(tmp_path):
    """Its list is there from the start, so a lost one is not taken for it."""
    store = Store(tmp_path / "state")
    assert store.open() is None
    records = Records(tmp_path / "records.jsonl")
    records.write("round", now=1.0)
    records.flush()
    store.put_memory("a", 1, b"of a round that was not saved")
    write_atomically(tmp_path / "state" / "round-000001.safetensors", b"neither was this")
    records.close()
    store.close()
    again = Store(tmp_path / "state")
    assert again.open() is None
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"current.json", "lock"}
    again.close()


ROW = '{"row": "round", "round": 1, "now": 2.0}'
RECORDS = {
    "a bit of a number": (lambda text: text.replace("2.0", "3.0"), "other bytes than", 0),
    "a line that is no JSON": (lambda text: text.replace('"round"', "'round'", 1), "line 1 of", 0),
    "a line that is no row": (lambda text: text.replace(ROW, "[]".ljust(len(ROW))), "line 2 of", 0),
    "the last line": (lambda text: text.replace('"now": 3.0', '"now" 3.0,'), "line 3 of", 2),
    "lines that are gone": (lambda text: text.splitlines()[0] + "\n", "has lost rows", 0),
    "all lines": (lambda text: "", "has lost rows", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_a_garbled_record_is_found_at_the_start(run, what):
    change, says, back = RECORDS[what]
    path = run / "records.jsonl"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(BadInput, match=rf"is damaged: .*{says}.* go back to round {back} with"):
        opened(run)


def test_what_was_written_after_the_last_round_is_no_damage(run):
    with open(run / "records.jsonl", "a") as file:
        file.write('{"row": "exchange", "torn')
    assert opened(run)[0] == ROUNDS


def test_records_that_are_gone_are_reported(run):
    os.unlink(run / "records.jsonl")
    with pytest.raises(BadInput, match=r"records\.jsonl has lost rows"):
        opened(run)


def as_older_versions_wrote(run):
    listed = json.loads((run / "state" / "current.json").read_text())
    old = {key: listed[key] for key in ("round", "state", "memories", "records")}
    (run / "state" / "current.json").write_text(json.dumps(old))
    os.unlink(run / "state" / "previous.json")
    os.unlink(run / "state" / "round-000002.safetensors")


def test_an_older_version_kept_no_digests_and_that_is_said_once(run):
    as_older_versions_wrote(run)
    store = Store(run / "state")
    saved = store.open()
    assert (saved.round, store.undigested) == (ROUNDS, True)
    records = Records(run / "records.jsonl", saved.records)
    save(store, records, ROUNDS + 1, saved.memories)
    records.close()
    store.close()
    assert opened(run)[::2] == (ROUNDS + 1, False)
    flip(run / "state" / "memory-b-000001.safetensors", 4)
    with pytest.raises(BadInput, match=r"memory-b-000001.* has other bytes"):
        opened(run)


def test_older_versions_records_are_read_at_the_start_too(run):
    as_older_versions_wrote(run)
    path = run / "records.jsonl"
    path.write_text(path.read_text().replace('"round"', "'round'", 1))
    with pytest.raises(BadInput, match="line 1 of records.jsonl is no row"):
        opened(run)


def test_without_hard_links_it_is_the_same(run, monkeypatch):
    def none(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    store = Store(run / "state")
    saved = store.open()
    records = Records(run / "records.jsonl", saved.records)
    save(store, records, ROUNDS + 1, saved.memories)
    records.close()
    store.close()
    assert went_back(run, ROUNDS) == ROUNDS
    assert opened(run)[0] == ROUNDS
