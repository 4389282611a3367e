"""The application that NVIDIA FLARE starts: the object that each site publishes, and the server's
relay to the sites.

The run loop stays in the operator's process. Its orders go over the operator's FLARE connection to
the relay, a job on the server, and from there to the sites by the Collab API. Neither the relay nor
the site object decodes messages or imports torch. A job carries no code: a site runs what is
installed on it.
"""

import hmac
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvflare.collab import CollabCallError, collab
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.f3.message import Message

from fedspine.flare.framing import MOST_BYTES
from fedspine.flare.worker_process import WorkerProcess

CHANNEL, ASK, LEAVE = "fedspine", "ask", "leave"  # of the cell messages between a run and its relay
# property of the server app; only the run also knows it, and the relay serves nobody else
SECRET = "fedspine_run"
SILENCE_SECONDS = 120.0  # without a message, after which the relay ends its job
GRACE_SECONDS = 5.0  # for a reply to travel, beyond the time limit of the work
CALLS = 64  # concurrent asks
UNREACHABLE = "unreachable"  # beside a worker's statuses: the site did not answer


class SiteApp:
    """The object that a site publishes. It passes bytes to the worker process, and answers pings
    while the worker is busy.
    """

    def __init__(self) -> None:
        self._worker: WorkerProcess | None = None

    @collab.init
    def start(self) -> None:
        """Start the worker of the site whose kit this process was started from."""
        self._worker = WorkerProcess(Path(collab.workspace.get_root_dir()))

    @collab.final
    def stop(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()

    @collab.publish
    def ping(self) -> bool:
        """Whether the site is reachable; costs a few hundred bytes."""
        return self._worker is not None

    @collab.publish
    def exchange(self, payload: bytes, seconds: float) -> tuple[str, bytes]:
        """The worker's `ExchangeStatus` within `seconds`, and its packed reply if it is "done"."""
        if self._worker is None or collab.caller != "server" or len(payload) > MOST_BYTES:
            return "refused", b""
        return self._worker.exchange(payload, seconds)


class Relay:
    """The server's side: forwards the run's messages to the sites, until the run leaves or falls
    silent.
    """

    @collab.main
    def relay(self) -> None:
        """Serve one run."""
        secret = collab.get_app_prop(SECRET)
        self._sites = {proxy.name: proxy for proxy in collab.clients}
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="fedspine")
        self._closed, self._last_seen = threading.Event(), time.monotonic()
        cell = collab.fl_ctx.get_engine().get_cell()
        cell.register_request_cb(channel=CHANNEL, topic="*", cb=self._on_request, secret=secret)
        while not (collab.is_aborted or self._closed.wait(1.0)):
            if time.monotonic() - self._last_seen > SILENCE_SECONDS:
                break
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _on_request(self, request: Message, secret: str) -> "Message | Future[Message]":
        asked = request.payload
        if not isinstance(asked, dict) or not hmac.compare_digest(str(asked.get("secret")), secret):
            return make_reply(ReturnCode.UNAUTHENTICATED)
        self._last_seen = time.monotonic()
        if request.get_header(MessageHeaderKey.TOPIC) == LEAVE:
            self._closed.set()
            return new_cell_message({}, {"sites": []})
        site = asked.get("site")
        if site is None:  # a sign of life, whose answer lists the sites
            return new_cell_message({}, {"sites": sorted(self._sites)})
        return self._calls.submit(self._pass_on, self._sites.get(site), asked)

    def _pass_on(self, proxy: Any, asked: dict[str, Any]) -> Message:
        began, payload, seconds = time.monotonic(), asked["payload"], float(asked["seconds"])
        outcome, reply = UNREACHABLE, b""
        try:
            if proxy is not None and payload:
                outcome, reply = proxy(timeout=seconds + GRACE_SECONDS).exchange(payload, seconds)
            elif proxy is not None:
                outcome = "done" if proxy(timeout=seconds).ping() else UNREACHABLE
        except CollabCallError:
            pass
        self._last_seen = time.monotonic()
        return new_cell_message(
            {}, {"outcome": outcome, "reply": reply, "seconds": time.monotonic() - began}
        )
