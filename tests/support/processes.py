"""Whether processes of a run that was killed still run."""

import time

import psutil


def alive(processes, seconds):
    """The ids of those that still run after so many seconds. A zombie, which waits to be reaped,
    does not.
    """
    deadline = time.monotonic() + seconds
    while (left := [each.pid for each in processes if running(each)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    return left


def running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
