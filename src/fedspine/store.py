"""A run's state on disk: written beside the old one and put in its place in one step, so that a kill loses nothing.

`state/` holds one file per saved round, the devices' memories in files that are never written twice, and
`current.json`, which names what belongs together. Whatever it does not name is left over from a kill and is swept.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.message import pack, unpack

CURRENT = "current.json"


@dataclass(frozen=True)
class Saved:
    """Everything needed to go on: the method's state after `round` rounds, the fleet's snapshot, the records' length."""

    round: int
    state: Any
    fleet: Any
    memories: Mapping[str, str]  # device to file name
    records: int


class Store:
    """The folder `state/` of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, saved: Saved) -> None:
        """Make `saved` the current state. Raises OSError, with the last state intact, where it cannot be written."""
        name = _name(saved.round)
        payload = pack({"state": saved.state, "fleet": saved.fleet}).payload
        write_atomically(self._folder / name, payload)
        entry = {
            "round": saved.round,
            "state": name,
            "memories": dict(saved.memories),
            "records": saved.records,
        }
        write_atomically(self._folder / CURRENT, json.dumps(entry).encode())
        self._sweep({name, *saved.memories.values()})

    def load(self) -> Saved | None:
        """The current state, None where no round was ever saved."""
        path = self._folder / CURRENT
        if not path.exists():
            return None
        entry = json.loads(path.read_text())
        kept = unpack((self._folder / entry["state"]).read_bytes())
        return Saved(
            round=entry["round"],
            state=kept["state"],
            fleet=kept["fleet"],
            memories=entry["memories"],
            records=entry["records"],
        )

    def put_memory(self, device: str, version: int, payload: bytes) -> str:
        """Keep one device's memory; it counts from the next `save` on. Returns the file's name."""
        name = f"memory-{device}-{version:06d}.safetensors"
        write_atomically(self._folder / name, payload, durable=False)
        return name

    def get_memory(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def open(self) -> Saved | None:
        """Make the folder ready for writing and return the current state; leftovers of a kill are removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        saved = self.load()
        self._sweep({} if saved is None else {_name(saved.round), *saved.memories.values()})
        return saved

    def _sweep(self, keep: Iterable[str]) -> None:
        wanted = {*keep, CURRENT}
        for entry in os.scandir(self._folder):
            if entry.name not in wanted:
                os.unlink(entry.path)


def _name(round: int) -> str:
    return f"round-{round:06d}.safetensors"


def write_atomically(path: Path, payload: bytes, *, durable: bool = True) -> None:
    """Write a file so that its name holds either the old bytes or all of the new ones."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            file.write(payload)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
