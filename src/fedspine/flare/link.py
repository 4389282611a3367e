"""The connection from a run to its sites over NVIDIA FLARE: the operator's session and the relay
job that it submits.

A lost relay is replaced by a new one, which serves all sites connected at that time, including new
ones.
"""

import logging
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.signal import Signal
from nvflare.collab import CollabRecipe
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.flare_api.flare_api import Session

from fedspine.core.errors import BadInput, one_line
from fedspine.flare.app import (
    ASK,
    CHANNEL,
    GRACE_SECONDS,
    LEAVE,
    SECRET,
    UNREACHABLE,
    Relay,
    SiteApp,
)
from fedspine.flare.site_state import RelayLost
from fedspine.flare.startup_kit import OVER, kit_at, logged_in

JOB = "fedspine"
HELLO_SECONDS = 2.0  # for the relay to answer a sign of life
SIGN_SECONDS = 2.0  # between two signs of life
SIGNS_MISSED = 3  # in a row, after which the relay counts as lost
START_SECONDS = 120.0  # for a job to be under way
FRESH_SECONDS = 25.0  # sites report every 10


class FlareLink:
    """The operator's session and a running relay; may be used from many threads. Raises BadInput if
    the login fails.
    """

    def __init__(self, kit: Path, fewest: int) -> None:
        logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # the fleet records losses itself
        self._kit, self._fewest = kit, fewest
        self._session = _logged_in(kit)
        self._job: str | None = None
        self._secret, self._sites, self._lost = "", (), Signal()
        self._mending, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    @property
    def relay(self) -> str | None:
        """The id of the relay's job."""
        return self._job

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the current relay's sites."""
        return self._sites

    def connected(self) -> tuple[str, ...]:
        """The sites connected to the server now, whether the relay serves them or not; empty if the
        server does not answer.
        """
        try:
            clients = self._session.get_connected_client_list()
        except Exception:  # whatever an unreachable server raises: the next call tries again
            return ()
        # by the server's clock
        last = max((client.last_connect_time for client in clients), default=0.0)
        return tuple(
            sorted(
                client.name for client in clients if last - client.last_connect_time < FRESH_SECONDS
            )
        )

    def wait_for(self, sites: int, seconds: float) -> None:
        """Start the first relay once this many sites are connected; raises BadInput after
        `seconds`.
        """
        end = time.monotonic() + seconds
        while len(here := self.connected()) < sites:
            if time.monotonic() > end:
                raise BadInput(
                    f"{len(here)} sites are connected, {sites} "
                    "are needed; start them, or ask for fewer"
                )
            time.sleep(1.0)
        try:
            self.mend(None, lambda: True)
        except RelayLost as error:
            raise BadInput(f"the sites cannot be reached: {error}") from None

    def exchange(self, site: str, payload: bytes, seconds: float) -> tuple[str, bytes]:
        """A site's status ("done", "died", "late", "refused" or "unreachable") and its reply, empty
        unless "done"; raises RelayLost.
        """
        reply = self._asked(
            ASK, seconds + 2 * GRACE_SECONDS, site=site, payload=payload, seconds=float(seconds)
        )
        return reply.get("outcome", UNREACHABLE), reply.get("reply") or b""

    def ping(self, site: str, seconds: float) -> bool:
        """Whether the site answers; raises RelayLost."""
        return self.exchange(site, b"", seconds)[0] == "done"

    def mend(self, broken: str | None, give_up: Callable[[], bool]) -> None:
        """Replace the relay `broken`, unless another thread has done so; raises RelayLost once
        `give_up()` is true.
        """
        with self._mending:
            if self._job != broken:
                return None
            while not self._closed.is_set():
                try:
                    return self._start_relay()
                except RelayLost:
                    if give_up():
                        raise
                    self._closed.wait(2.0)
            raise RelayLost("the run has ended")

    def close(self) -> None:
        """End the relay's job and log out; threads that wait for a reply get RelayLost."""
        self._closed.set()
        try:
            if self._job is not None:
                self._asked(LEAVE, HELLO_SECONDS)
        except RelayLost:
            pass
        finally:
            self._lost.trigger("the run has ended")
            self._session.close()

    def _start_relay(self) -> None:
        self._abort()
        secret = secrets.token_hex(16)
        try:
            job = _submitted(self._session, secret, self._fewest)
        except Exception as error:
            self._log_in_again()
            raise RelayLost(f"no job can be started: {one_line(error)}") from error
        self._job, self._secret, self._lost = job, secret, Signal()
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and not self._closed.is_set():
            try:
                self._sites = tuple(self._asked(ASK, HELLO_SECONDS)["sites"])
                return
            except RelayLost:
                if self._over(job):
                    break
                time.sleep(0.2)
        raise RelayLost("the relay's job did not start; the server's log says why")

    def _abort(self) -> None:
        if self._job is None:
            return
        try:
            if not self._over(self._job):
                self._session.abort_job(self._job)
        except Exception:  # it cannot be reached; it ends by itself when no message comes
            self._log_in_again()

    def _over(self, job: str) -> bool:
        try:
            return str(self._session.get_job_status(job)).startswith(OVER)
        except Exception:
            return False

    def _log_in_again(self) -> None:
        try:
            fresh = _logged_in(self._kit)
        except BadInput:
            return
        self._session.close()
        self._session = fresh

    def _asked(self, topic: str, timeout: float, **values: Any) -> dict[str, Any]:
        cell = self._session.api.get_cell()
        if cell is None or self._job is None:
            raise RelayLost("not connected")
        reply = cell.send_request(
            channel=CHANNEL,
            topic=topic,
            target=FQCN.join([FQCN.ROOT_SERVER, self._job]),
            request=new_cell_message({}, {"secret": self._secret, **values}),
            timeout=timeout,
            optional=True,
            abort_signal=self._lost,
        )
        if reply.get_header(MessageHeaderKey.RETURN_CODE, ReturnCode.OK) != ReturnCode.OK:
            raise RelayLost(
                f"the relay does not answer ({reply.get_header(MessageHeaderKey.RETURN_CODE)})"
            )
        if not isinstance(reply.payload, dict):
            raise RelayLost("the relay's answer cannot be read")
        return reply.payload

    def _keep_alive(self) -> None:
        """Send the relay signs of life, and wake the threads that wait for a lost relay."""
        missed = 0
        while not self._closed.wait(SIGN_SECONDS):
            if self._job is None or self._mending.locked():
                missed = 0
                continue
            job, lost = self._job, self._lost
            try:
                self._asked(ASK, HELLO_SECONDS)
                missed = 0
            except Exception:  # any error means that no answer came
                missed += 1
                if missed >= SIGNS_MISSED or self._over(job):
                    lost.trigger("the relay shows no sign of life")
                    missed = 0


def _logged_in(kit: Path) -> Session:
    return logged_in(kit_at(kit, "admin"))


def _submitted(session: Session, secret: str, fewest: int) -> str:
    recipe = CollabRecipe(JOB, server=Relay(), client=SiteApp(), min_clients=fewest)
    recipe.set_server_prop(SECRET, secret)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # about a secret in a job: it belongs to this relay, and only the server gets it
        warnings.simplefilter("ignore")
        recipe.export(folder)
        for code in Path(folder).rglob("custom"):  # a site runs only what is installed there
            shutil.rmtree(code)
        return session.submit_job(str(Path(folder) / JOB))
