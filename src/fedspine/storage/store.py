"""A run's state on disk: written beside the old one and swapped in atomically, so that a kill loses
nothing.

`state/` holds one file per saved round, the devices' memories in files that are never written
twice, and `current.json`, which names what belongs together. Whatever it does not name is left over
from a kill and is swept.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack

CURRENT, LOCK = "current.json", "lock"


@dataclass(frozen=True)
class Saved:
    """All that a resume needs: the method's state after `round` rounds, the fleet's snapshot, the
    records' length.
    """

    round: int
    state: Any
    fleet: Any
    memories: Mapping[str, str]  # device to file name
    records: int


class Store:
    """The folder `state/` of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: BinaryIO | None = None

    def open(self) -> Saved | None:
        """Make the folder ready for writing and return the current state; leftovers of a kill are
        removed.

        Raises BadInput where another process has it open.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self._folder / LOCK, f"the run in {self._folder.parent}")
        saved = self.load()
        self._sweep({} if saved is None else {_name(saved.round), *saved.memories.values()})
        return saved

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def save(self, saved: Saved) -> None:
        """Make `saved` the current state. Raises OSError, with the last state intact, if it cannot
        be written.
        """
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
        """The current state, None if no round was saved; raises BadInput if it is damaged."""
        entry = self._entry()
        if entry is None:
            return None
        try:
            kept = unpack((self._folder / entry["state"]).read_bytes())
            return Saved(
                round=entry["round"],
                state=kept["state"],
                fleet=kept["fleet"],
                memories=entry["memories"],
                records=entry["records"],
            )
        except FileNotFoundError:
            if (
                self._entry() != entry
            ):  # the run is still going and has saved another round meanwhile
                return self.load()
            raise self._damaged(f"{entry['state']} is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(str(error)) from None

    def rounds(self) -> int:
        """The number of saved rounds."""
        entry = self._entry()
        return 0 if entry is None else entry["round"]

    def put_memory(self, device: str, version: int, payload: bytes) -> str:
        """Write one device's memory, which becomes current with the next `save`. Returns the file's
        name.
        """
        name = f"memory-{device}-{version:06d}.safetensors"
        write_atomically(self._folder / name, payload)
        return name

    def get_memory(self, name: str) -> bytes:
        """The bytes that `put_memory` wrote under this name; raises BadInput if missing."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            raise self._damaged(f"{name} is missing") from None

    def _entry(self) -> dict[str, Any] | None:
        try:
            entry = json.loads((self._folder / CURRENT).read_bytes())
            if not isinstance(entry["round"], int):
                raise TypeError("its round is no number")
            return entry
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{CURRENT}: {error}") from None

    def _damaged(self, why: str) -> BadInput:
        return BadInput(
            f"the state in {self._folder} is damaged ({why}); "
            "restore it from a copy, or start a new run"
        )

    def _sweep(self, keep: Iterable[str]) -> None:
        wanted = {*keep, CURRENT, LOCK}
        for entry in os.scandir(self._folder):
            if entry.name not in wanted:
                os.unlink(entry.path)


def _name(round: int) -> str:
    return f"round-{round:06d}.safetensors"


def lock(path: Path, what: str) -> BinaryIO:
    """An open file that no other process can lock; however this process ends, the lock ends with
    it.

    Raises BadInput, which names `what` is being worked on, where another process holds it.
    """
    file = open(path, "wb")  # noqa: SIM115 - held for as long as the work takes
    try:
        import fcntl

        # unlike flock, not inherited by worker processes
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise BadInput(f"another process is working on {what}; wait for it or end it") from None
    except (
        ImportError,
        OSError,
    ):  # no locks on this system, or on this file system: the user has to take care
        pass
    return file


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that its name holds either the old bytes or all of the new ones, even after a
    power failure.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
