"""What NVIDIA FLARE starts: the thin object that each site publishes, and the server's relay to those objects.

A run's loop is in the process of the person who runs it. Its orders go over the person's own FLARE connection to the
relay, a job on the server, and from there to the sites by the Collab API. Neither the relay nor the thin object reads
a message or imports torch. No code travels: a site runs what is installed on it.
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
from fedspine.flare.worker_process import Resident

CHANNEL, ASK, LEAVE = "fedspine", "ask", "leave"  # of the cell messages between a run and its relay
SECRET = "fedspine_run"  # the server app's property that only the run knows besides: whoever shows it is heard
SILENCE_SECONDS = 120.0  # after which the relay takes its run for dead and ends the job
GRACE_SECONDS = 5.0  # that a reply may take to come back beyond the time the work was given
CALLS = 64  # asks under way at once
UNREACHABLE = "unreachable"  # besides the outcomes of a worker: the site did not answer


class SiteApp:
    """The object a site publishes. It hands bytes to the resident worker and answers pings while that works."""

    def __init__(self) -> None:
        self._resident: Resident | None = None

    @collab.init
    def start(self) -> None:
        """Start the worker of the site whose kit this process was started from."""
        self._resident = Resident(Path(collab.workspace.get_root_dir()))

    @collab.final
    def stop(self) -> None:
        """End the worker."""
        if self._resident is not None:
            self._resident.close()

    @collab.publish
    def ping(self) -> bool:
        """Whether the site can be asked at all; costs a few hundred bytes."""
        return self._resident is not None

    @collab.publish
    def exchange(self, payload: bytes, seconds: float) -> tuple[str, bytes]:
        """What the worker makes of a packed message within `seconds`: an `Outcome` and, where it is "done", a reply."""
        if self._resident is None or collab.caller != "server" or len(payload) > MOST_BYTES:
            return "refused", b""
        return self._resident.exchange(payload, seconds)


class Relay:
    """The server's side: passes what its run asks on to the sites, until the run leaves or falls silent."""

    @collab.main
    def relay(self) -> None:
        """Serve one run."""
        secret = collab.get_app_prop(SECRET)
        self._sites = {proxy.name: proxy for proxy in collab.clients}
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="fedspine")
        self._left, self._heard = threading.Event(), time.monotonic()
        cell = collab.fl_ctx.get_engine().get_cell()
        cell.register_request_cb(channel=CHANNEL, topic="*", cb=self._hear, secret=secret)
        while not (collab.is_aborted or self._left.wait(1.0)):
            if time.monotonic() - self._heard > SILENCE_SECONDS:
                break
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _hear(self, request: Message, secret: str) -> "Message | Future[Message]":
        asked = request.payload
        if not isinstance(asked, dict) or not hmac.compare_digest(str(asked.get("secret")), secret):
            return make_reply(ReturnCode.UNAUTHENTICATED)
        self._heard = time.monotonic()
        if request.get_header(MessageHeaderKey.TOPIC) == LEAVE:
            self._left.set()
            return new_cell_message({}, {"sites": []})
        site = asked.get("site")
        if site is None:  # a sign of life, which also tells who is there
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
        self._heard = time.monotonic()
        return new_cell_message(
            {}, {"outcome": outcome, "reply": reply, "seconds": time.monotonic() - began}
        )
