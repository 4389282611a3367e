"""A run's state on disk: written beside the old one and swapped in atomically, so that a kill loses
nothing.

`state/` holds one file for each of the last two saved rounds, the devices' memories in files that
are never overwritten, and two lists of the files of a round with their SHA-256: `current.json` for
the last round and `previous.json` for the one before. Files that neither list names are left over
from a kill and are removed. A digest is checked whenever its file is read, and all digests when a
run resumes. If one is wrong, the run can go back to the round before, or to its start.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.strict import parsed
from fedspine.storage.files import bytes_of, remove
from fedspine.storage.records import RECORDS, flaw, has_rounds

CURRENT, PREVIOUS, LOCK = "current.json", "previous.json", "lock"
STATE_SPARE_BYTES = 8 << 30  # that decoding a state may take; its digest was checked
DIGEST = "digest"  # of the rest of a list
SHA256_BYTES = 32
MEMORY = ".safetensors"  # the end of the name of a device's memory


@dataclass(frozen=True)
class Saved:
    """All that a resume needs: the method's state after `round` rounds, the fleet's snapshot, the
    files of device memories, the length of the records in bytes and their SHA-256.
    """

    round: int
    state: Any
    fleet: Any
    memories: Mapping[str, str]  # device to file name
    records: int
    records_sha256: str | None = None


class Store:
    """The folder `state/` of one run, which also has the digest of the records beside it.

    `undigested` says that an older version saved the state, without digests.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: BinaryIO | None = None
        self._sha256: dict[str, str] = {}  # of the files that are, or will be, in a list
        self._current = self._before = _start()  # the lists, once the folder is open
        self.undigested = False

    def open(self) -> Saved | None:
        """Lock the folder for writing and return the current state, None if no round was saved;
        leftovers of a kill are removed.

        Raises BadInput if another process has it open, or if the state, a device's memory or a
        record is damaged.
        """
        self._lock_folder()
        entry = self._entry()
        if entry is None:
            entry = _start()
            write_atomically(self._folder / CURRENT, _listed(entry))
        if why := self._flaw(entry):
            raise self._damaged(why)
        self.undigested = bool(entry["round"]) and "sha256" not in entry
        for name in entry["memories"].values() if self.undigested else ():
            self._sha256[name] = _sha256((self._folder / name).read_bytes())
        saved = self.load()
        self._current, self._before = entry, self._earlier_list() or _start()
        self._sweep()
        return saved

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save(self, saved: Saved) -> None:
        """Make `saved` the current state; raises OSError if it cannot be written, and then leaves
        the last state intact.
        """
        name = _name(saved.round)
        payload = pack({"state": saved.state, "fleet": saved.fleet}).payload
        write_atomically(self._folder / name, payload)
        sha256 = {name: _sha256(payload)}
        if saved.records_sha256 is not None:
            sha256[RECORDS] = saved.records_sha256
        sha256 |= {file: self._sha256[file] for file in saved.memories.values()}
        entry = _entry_of(saved.round, name, saved.memories, saved.records, sha256)
        if self._current["round"]:  # the start needs no list
            self._keep_previous()
            self._before = self._current
        write_atomically(self._folder / CURRENT, _listed(entry))
        self._current = entry
        self._sweep()

    def load(self) -> Saved | None:
        """The current state, None if no round was saved; raises BadInput if it is damaged."""
        entry = self._entry()
        if entry is None or not entry["round"]:
            return None
        sha256 = entry.get("sha256", {})
        try:
            payload = bytes_of(self._folder / entry["state"])
            if "sha256" in entry and _sha256(payload) != sha256[entry["state"]]:
                raise ValueError(f"{entry['state']} has other bytes than were written")
            kept = unpack(payload, spare_bytes=STATE_SPARE_BYTES)
            saved = Saved(
                round=entry["round"],
                state=kept["state"],
                fleet=kept["fleet"],
                memories=entry["memories"],
                records=entry["records"],
                records_sha256=sha256.get(RECORDS),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            if self._entry() != entry:  # the run is still going and has saved another round
                return self.load()
            gone = isinstance(error, FileNotFoundError)
            raise self._damaged(f"{entry['state']} is missing" if gone else str(error)) from None
        self._sha256 |= sha256
        return saved

    def rounds(self) -> int:
        """The number of saved rounds."""
        entry = self._entry()
        return 0 if entry is None else entry["round"]

    def put_memory(self, device: str, version: int, payload: bytes) -> str:
        """Write one device's memory, which becomes current with the next `save`. Returns the file's
        name.
        """
        name = f"memory-{device}-{version:06d}{MEMORY}"
        write_atomically(self._folder / name, payload)
        self._sha256[name] = _sha256(payload)
        return name

    def get_memory(self, name: str) -> bytes:
        """The bytes that `put_memory` wrote under this name; raises BadInput if the file is missing
        or damaged.
        """
        try:
            payload = bytes_of(self._folder / name)
        except FileNotFoundError:
            raise self._damaged(f"{name} is missing") from None
        except ValueError as error:
            raise self._damaged(str(error)) from None
        if self._sha256.get(name, known := _sha256(payload)) != known:
            raise self._damaged(f"{name} has other bytes than were written")
        return payload

    # --- going back ---

    def go_back(self, round: int, undone: Iterable[Path] = ()) -> None:
        """Make `round` the current one, 0 for the start; first the files `undone` are removed, then
        all that belongs to later rounds.

        Raises BadInput, and changes nothing, unless `round` is 0 or an undamaged saved round, or if
        another process has the folder open.
        """
        self._lock_folder()
        earlier = self._earlier()
        if round not in (0, earlier):
            kept = f"round {earlier}, and to round 0" if earlier else "its start, round 0"
            raise BadInput(f"{self._folder.parent} cannot go back to round {round}, only to {kept}")
        for path in undone:
            remove(path)
        listed = (self._folder / PREVIOUS).read_bytes() if round else _listed(_start())
        if (self._folder / CURRENT).is_dir():  # which no file can replace
            remove(self._folder / CURRENT)
        write_atomically(self._folder / CURRENT, listed)
        remove(self._folder / PREVIOUS)
        self._current, self._before = self._entry() or _start(), _start()
        self._sweep()

    def _earlier(self) -> int:
        """The round before the current one, if it is saved and undamaged; else 0."""
        entry = self._earlier_list()
        try:
            return 0 if entry is None or self._flaw(entry) else entry["round"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _earlier_list(self) -> dict[str, Any] | None:
        try:
            return self._read(PREVIOUS)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep_previous(self) -> None:
        """Make `previous.json` a copy of `current.json`, atomically."""
        current, previous = self._folder / CURRENT, self._folder / PREVIOUS
        partial = previous.with_name(previous.name + ".part")
        try:
            os.link(current, partial)  # which is on the disk already
        except OSError:  # this file system has no hard links
            write_atomically(previous, current.read_bytes())
            return
        os.replace(partial, previous)

    # --- what is there ---

    def _entry(self) -> dict[str, Any] | None:
        """The current list; None in a new folder. Raises BadInput if it is damaged or missing."""
        try:
            entry = self._read(CURRENT)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{CURRENT}: {error}") from None
        if entry is None and self._was_saved():
            raise self._damaged(f"{CURRENT} is missing, though rounds were done")
        return entry

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            entry = parsed(bytes_of(self._folder / name))
        except FileNotFoundError:
            return None
        if not isinstance(entry["round"], int):
            raise TypeError("its round is not a number")
        if ("sha256" in entry or DIGEST in entry) and entry != _with_digest(entry):
            raise ValueError("its digest is that of another list")
        return entry

    def _was_saved(self) -> bool:
        """Whether there are traces of a saved round, so that `current.json` should exist."""
        states = self._folder.glob(_name(0).replace("000000", "*"))
        return (
            (self._folder / PREVIOUS).exists()
            or any(states)
            or has_rounds(self._folder.parent / RECORDS)
        )

    def _flaw(self, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with a file that this list names; None if nothing is."""
        if not entry["round"]:
            return None
        sha256 = entry.get("sha256", {})
        for name in _files(entry):
            try:
                payload = bytes_of(self._folder / name)
            except FileNotFoundError:
                return f"{name} is missing"
            except ValueError as error:
                return str(error)
            if "sha256" in entry and _sha256(payload) != sha256.get(name):
                return f"{name} has other bytes than were written"
        return flaw(self._folder.parent / RECORDS, entry["records"], sha256.get(RECORDS))

    def _damaged(self, why: str) -> BadInput:
        run, back = self._folder.parent, self._earlier()
        return BadInput(
            f"the run in {run} is damaged: {why}; go back to round {back} with: fedspine "
            f"run --resume {run} --from-round {back}, or restore it from a copy"
        )

    def _lock_folder(self) -> None:
        if self._lock is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._folder / LOCK, f"the run in {self._folder.parent}")

    def _sweep(self) -> None:
        """Remove files that neither list names, and folders, which are never ours."""
        wanted = {CURRENT, PREVIOUS, LOCK, *_files(self._current), *_files(self._before)}
        for found in os.scandir(self._folder):
            if found.name not in wanted or found.is_dir(follow_symlinks=False):
                remove(Path(found.path))
        self._sha256 = {name: digest for name, digest in self._sha256.items() if name in wanted}


def _entry_of(
    round: int,
    state: str | None,
    memories: Mapping[str, str],
    records: int,
    sha256: Mapping[str, str],
) -> dict[str, Any]:
    """The list of a round's files."""
    return {
        "round": round,
        "state": state,
        "memories": dict(memories),
        "records": records,
        "sha256": dict(sha256),
    }


def _start() -> dict[str, Any]:
    return _entry_of(0, None, {}, 0, {})


def _files(entry: Mapping[str, Any]) -> list[str]:
    return [entry["state"], *entry["memories"].values()] if entry["round"] else []


def _with_digest(entry: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in entry.items() if name != DIGEST}
    return rest | {DIGEST: _sha256(json.dumps(rest).encode())}


def _listed(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(_with_digest(entry)).encode()


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def sealed(payload: bytes) -> bytes:
    """A packed message followed by its SHA-256, for a file whose digest is in no list."""
    return payload + hashlib.sha256(payload).digest()


def unsealed(stored: bytes) -> bytes:
    """The message that was given to `sealed`; raises NotAMessage if any bit of it changed.

    A message without a digest, as older versions wrote it, is returned as it is. It is recognised
    because it ends where its header says.
    """
    payload, digest = stored[:-SHA256_BYTES], stored[-SHA256_BYTES:]
    if hashlib.sha256(payload).digest() == digest:
        return payload
    unpack(stored, spare_bytes=STATE_SPARE_BYTES)
    return stored


def version_of(memory: str | None) -> int:
    """The version in the name of a device's memory; 0 if it has none.

    >>> version_of("memory-nx-02-000007.safetensors"), version_of(None)
    (7, 0)
    """
    return 0 if memory is None else int(memory.removesuffix(MEMORY).rpartition("-")[2])


def _name(round: int) -> str:
    return f"round-{round:06d}.safetensors"


def lock(path: Path, what: str) -> BinaryIO:
    """An open file on which this process holds a lock, which ends with the process at the latest.

    Raises BadInput, which names `what` is being worked on, if another process holds the lock. On a
    system without locks, the file is not locked.
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


def write_atomically(path: Path, payload: bytes, *, sync: bool = True) -> None:
    """Write a file so that it has either the old bytes or all of the new ones after a kill of the
    process and, with `sync`, which takes milliseconds, after a power failure. Raises OSError.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            file.write(payload)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        error.filename = str(path)  # an error of writing names no file
        raise
