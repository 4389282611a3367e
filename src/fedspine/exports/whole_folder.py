"""A folder that appears under its name only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedspine.core.errors import BadInput


def check_new(folder: Path) -> None:
    """Raise BadInput if `folder` exists, before any work on its content."""
    if os.path.lexists(folder):  # a link to nothing, too
        raise BadInput(f"{folder} exists already; choose a new folder, or remove it first")


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder, at any depth."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` to write into; it gets that name at the end. Whoever may
    read the folder may then read its files.

    After a failure nothing remains; an OSError becomes a BadInput.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _as_readable_as_its_folder(partial)
        partial.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{folder} cannot be written: {reason}; check the path and the free space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # the deepest first; those that hold something stay
            with suppress(OSError):
                parent.rmdir()


def _as_readable_as_its_folder(folder: Path) -> None:
    """safetensors writes files that only their owner may read."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
