"""What a process that trains or scores sets up once."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
_KEPT = 512 << 20  # bytes of freed memory that the process keeps
_LARGE = 32 << 20  # bytes from which a block is mapped on its own; glibc allows no more


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks, which the next step needs again, instead of returning them to the kernel.

    Every product makes blocks of some megabytes. Getting their pages anew each time took a third of the time of
    scoring. Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGE)
