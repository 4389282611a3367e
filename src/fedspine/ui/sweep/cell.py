"""A cell's own process, which ends with the sweep that started it, however that ends.

`python -m fedspine.ui.sweep.cell PARENT MODULE ARGUMENT...` is `python -m MODULE ARGUMENT...` as a
child of process PARENT.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent ends


def end_with(parent: int) -> None:
    """Be killed when the process `parent` ends; a run that is killed loses nothing that was saved.

    Linux alone can do this. Elsewhere the run of a killed sweep goes on to its end, and the next
    sweep waits for it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this
        sys.exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
