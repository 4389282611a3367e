"""The worker process of a site, which holds torch, the base, the site's rows and its memory. It may
die.

`WorkerProcess` runs in the process that FLARE started and imports no torch. It passes packed
messages over a socket, kills a worker that does not answer in time, and replaces one that died for
any reason, including the kernel's out-of-memory killer. A worker writes its memory to disk before
it replies.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from fedspine.flare.framing import receive, send
from fedspine.flare.site_disk import LOG

PARENT_CHECK_SECONDS = 1.0
START_SECONDS = 300.0  # for a worker to come up
ExchangeStatus: TypeAlias = Literal["done", "died", "late"]


class WorkerProcess:
    """The worker of the site in `folder`, replaced when it dies; `pid` is the current one's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.Lock()
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, payload: bytes, seconds: float) -> tuple[ExchangeStatus, bytes]:
        """A status, and the worker's reply to a packed message, empty unless "done".

        "late": there was no reply within `seconds`, which includes the wait for a busy or starting
        worker; a worker that was at this message was killed and replaced. "died": the worker ended
        before it replied and was replaced.
        """
        end = time.monotonic() + seconds
        if not self._turn.acquire(timeout=seconds):
            return "late", b""
        try:
            if self._process.poll() is not None:  # it died while idle, so nothing is lost
                self._restart()
            if not self._ready(end):
                return "late", b""
            send(self._socket, payload, end)
            return "done", receive(self._socket, end)
        except TimeoutError:
            self._restart()
            return "late", b""
        except OSError:
            self._restart()
            return "died", b""
        finally:
            self._turn.release()

    def _ready(self, end: float) -> bool:
        """Whether the worker is up by `end`; one that is still starting is not killed, and raises
        TimeoutError only after START_SECONDS.
        """
        if not self._up:
            try:
                receive(self._socket, min(end, self._started + START_SECONDS))
            except TimeoutError:
                if time.monotonic() > self._started + START_SECONDS:
                    raise
                return False
            self._up = True
        return True

    def close(self) -> None:
        """End the worker."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _restart(self) -> None:
        self.close()
        self._start()

    def _start(self) -> None:
        self._up, self._started = False, time.monotonic()
        self._socket, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            __name__,
            str(self._folder),
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        with theirs, open(self._folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def work(folder: Path, connection: socket.socket, parent: int) -> None:
    """Serve the site's orders until the parent process is gone."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from fedspine.flare.site import load_site

    load_site(folder)  # before seconds of imports, so that a broken file is reported at once
    from fedspine.flare.site_worker import open_site_worker

    worker = open_site_worker(folder)
    with suppress(ConnectionError):
        send(connection, b"")  # it is up
        while True:
            send(connection, worker.answer(receive(connection)))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even in the middle of work."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    work(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
