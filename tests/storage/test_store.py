"""The state on disk: damage is reported, and one process at a time works on it. Kills are in
test_resume.py.
"""

import json
import os

import numpy as np
import pytest
from runs import python

from fedspine.core.errors import BadInput
from fedspine.storage.store import Saved, Store, write_atomically


def saved(round, **memories):
    return Saved(
        round=round,
        state={"weights": np.arange(round)},
        fleet=None,
        memories=memories,
        records=17 * round,
    )


@pytest.fixture
def store(tmp_path):
    """A store after two rounds, the second of which replaced one of two memories."""
    made = Store(tmp_path / "state")
    assert made.open() is None
    first = {id: made.put_memory(id, 1, b"one") for id in ("a", "b")}
    made.save(saved(1, **first))
    made.save(saved(2, **first | {"a": made.put_memory("a", 2, b"two")}))
    yield made
    made.close()


def test_what_is_saved_comes_back_and_nothing_else_stays(store, tmp_path) -> None:
    found = store.load()
    assert (found.round, found.records, found.state["weights"].tolist()) == (2, 34, [0, 1])
    assert {id: store.get_memory(name) for id, name in found.memories.items()} == {
        "a": b"two",
        "b": b"one",
    }
    # memories and states of two rounds, which name one memory together, two lists and the lock
    assert len(os.listdir(tmp_path / "state")) == 3 + 2 + 2 + 1


def test_leftovers_are_swept(store, tmp_path) -> None:
    before = set(os.listdir(tmp_path / "state"))
    store.put_memory("c", 3, b"of a round that was not saved")
    (tmp_path / "state" / "round-000003.safetensors.part").write_bytes(b"half")
    store.close()
    again = Store(tmp_path / "state")
    assert again.open().round == 2
    assert set(os.listdir(tmp_path / "state")) == before
    again.close()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("current.json", b"{"),
        ("current.json", b"[]"),
        ("current.json", b'{"round": "x"}'),
        ("current.json", b'{"round": 2, "state": "gone", "memories": {}, "records": 0}'),
        ("round-000002.safetensors", b""),
        ("round-000002.safetensors", b"torn"),
    ],
)
def test_damage_is_reported(store, tmp_path, file, content) -> None:
    (tmp_path / "state" / file).write_bytes(content)
    with pytest.raises(BadInput, match="is damaged"):
        store.load()


def test_a_memory_that_is_gone_is_reported(store) -> None:
    with pytest.raises(BadInput, match="memory-a-000009 is missing"):
        store.get_memory("memory-a-000009")


def test_reading_while_another_round_is_saved(store, tmp_path, monkeypatch) -> None:
    """Whoever reads between two rounds gets one of them, whole."""
    whole, current = Store._entry, [json.loads((tmp_path / "state" / "current.json").read_text())]
    current[0] |= {"round": 1, "state": "round-000001.safetensors"}  # swept meanwhile
    monkeypatch.setattr(Store, "_entry", lambda self: current.pop() if current else whole(self))
    assert store.load().round == 2


def test_one_process_at_a_time(store, tmp_path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedspine.core.errors import BadInput\n"
        "from fedspine.storage.store import Store\n"
        "store = Store(Path(sys.argv[1]))\ntry:\n    store.open()\n"
        "except BadInput as error:\n    print(error)\n"
    )
    assert "another process is working" in python("-c", code, tmp_path / "state").stdout
    store.close()
    assert python("-c", code, tmp_path / "state").stdout == ""


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as full_disk:
        write_atomically(path, b"new")
    assert full_disk.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
