"""Files of a run, where something else may lie in their place."""

import errno
import shutil
import stat
from pathlib import Path


def bytes_of(path: Path) -> bytes:
    """The content of a file; raises ValueError for a folder, and for a link to itself."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):
            raise ValueError(f"{path.name} is no file") from None
        raise


def is_special(path: Path) -> bool:
    """Whether a pipe, a socket or a device lies here, which could block whoever opens it.

    It looks once, so that a file that a running process removes meanwhile is none of these.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # gone, a link to nothing, or not to be looked at, which reading it says
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def remove(path: Path) -> None:
    """Remove what is there, if anything, even a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
