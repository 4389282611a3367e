"""Memory, cores and signals of this process."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from fedspine.core.errors import Stopped

T = TypeVar("T")
R = TypeVar("R")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
_KEPT = 512 << 20  # bytes of freed memory that the process keeps
_LARGE = 32 << 20  # bytes from which a block is mapped on its own; glibc allows no more
_SAME_SECONDS = 1.0  # `timeout` signals a process and its group, so it gets two within this time

SIGNALS_TO_END = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, from `kill`, a service manager or a batch system; it ends a command as
    Ctrl-C does.
    """


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise Terminated within the block, unless the process ignores it."""
    with handling([signal.SIGTERM], _terminate()):
        yield


def _terminate() -> Callable[[int, FrameType | None], None]:
    last = -_SAME_SECONDS

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _SAME_SECONDS:
            raise Terminated

    return terminate


@contextmanager
def handling(
    signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle these signals by `handler` within the block, except those that the process ignores.

    A process under `nohup`, or in the background of a script, ignores SIGINT, and its user relies
    on that. In a thread other than the main one, which cannot handle signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = (signal.SIG_IGN, None)  # None: a handler that is not Python's
    found = {number: signal.getsignal(number) for number in signals}
    before: dict[signal.Signals, Any] = {n: had for n, had in found.items() if had not in kept}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, had in before.items():
            signal.signal(number, had)


@contextmanager
def ends_on_signal() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM within the block into Stopped, so a command ends with one line."""
    with ends_on_sigterm():
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise Stopped(*farewell(interrupt)) from None


def farewell(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """The last word of an interrupted command and its exit code: 128 plus the signal's number.

    >>> farewell(KeyboardInterrupt()), farewell(Terminated())
    (('interrupted', 130), ('terminated', 143))
    """
    if isinstance(interrupt, Terminated):
        return "terminated", 128 + signal.SIGTERM
    return "interrupted", 128 + signal.SIGINT


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step instead of returning them to the kernel.

    Every product allocates blocks of some megabytes. Mapping their pages again each time took 28 %
    of the time of scoring 64 rows of 64 tokens at once; with 32 rows it makes no difference. It has
    no effect except on Linux with glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGE)


def keeping_freed_memory() -> dict[str, str]:
    """The settings of `keep_freed_memory` as environment variables for child processes.

    In an exchange of 4 MB over NVIDIA FLARE, mapping pages again took a fifth to a third of all
    processor time.
    """
    return {"MALLOC_TRIM_THRESHOLD_": str(_KEPT), "MALLOC_MMAP_THRESHOLD_": str(_LARGE)}


def limit_onednn_cache() -> None:
    """Limit oneDNN's cache to the kernels of 128 shapes; its default of 1024 takes hundreds of
    megabytes per process.

    oneDNN reads the limit once, so call this before torch is imported. A value in the environment
    is kept.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def cores() -> int:
    """The number of cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The function's values in the order of `items`, computed on one thread per core.

    Each thread uses one PyTorch thread, so the values do not depend on the number of cores. The
    threads end with the call, so none is left when processes are forked.
    """
    import torch

    with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        return list(threads.map(function, items))


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had, in bytes."""
    # ru_maxrss starts at the peak of the parent process, unlike VmHWM
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
