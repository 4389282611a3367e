"""The files that runs leave on a site's disk, and their limits: memories, activations, tokens,
ledgers.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MEMORY, PREFIXES, TOKENS = "memory", "prefixes", "tokens"  # folders; a run has one in the first two
LEDGERS = "privacy"  # the folder of what was spent and answered, which is never removed
LOG = "fedspine-worker.log"  # in the site's folder: the worker's output, refusals in full
LOG_BYTES = 16 << 20
RUNS_KEPT = 16  # memories of so many runs are kept, those used last


def keep_newest(folder: Path, kept: int) -> None:
    """Make the folder the newest among its siblings, and remove all but the newest `kept`."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for old in _by_age(folder.parent)[:-kept]:
        shutil.rmtree(old, ignore_errors=True)


def used(folder: Path, cache: Path) -> dict[str, int]:
    """Bytes that runs have left at a site, by kind."""
    places = {
        MEMORY: folder / MEMORY,
        PREFIXES: folder / PREFIXES,
        TOKENS: cache / TOKENS,
        LEDGERS: folder / LEDGERS,
    }
    return {kind: sum(_sizes(place)) for kind, place in places.items()}


def room(folder: Path, cache: Path, run: str, most: int, needed: int) -> int:
    """The free bytes within the quota `most`, after files were removed until `needed` bytes are
    free: first kept activations, then tokens, then memories of other runs, each the oldest first.
    """
    free = most - sum(used(folder, cache).values())
    for place in (folder / PREFIXES, cache / TOKENS, folder / MEMORY):
        for old in _by_age(place):
            if free >= needed:
                return free
            if place.name == MEMORY and old.name == run:
                continue
            free += sum(_sizes(old))
            shutil.rmtree(old, ignore_errors=True)
    return free


def shorten(log: Path) -> None:
    """Cut a log of more than `LOG_BYTES` to its last half of that; its writer must append."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        with open(log, "r+b") as file:
            file.seek(-LOG_BYTES // 2, os.SEEK_END)
            end = file.read()
            file.truncate(0)
            file.seek(0)
            file.write(end)


def _by_age(place: Path) -> list[Path]:
    return (
        sorted(place.iterdir(), key=lambda path: path.stat().st_mtime_ns) if place.exists() else []
    )


def _sizes(place: Path) -> Iterator[int]:
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                yield os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
