"""A start-up kit: its owner, the check against its server, the process that it starts, and the
operator's session.
"""

import fcntl
import importlib.util
import io
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fedspine.core.errors import BadInput, one_line, unknown
from fedspine.core.process import keeping_freed_memory
from fedspine.core.task import BUILT_IN_DATA
from fedspine.flare.site import SITE_FILE, load_site
from fedspine.flare.site_disk import used

ADMIN_KIT = "admin"  # folder of the operator's kit
STARTUP = {"server": "fed_server.json", "site": "fed_client.json", "admin": "fed_admin.json"}
PROGRAM = {"server": "server.server_train", "site": "client.client_train"}
LOCK = "running.lock"
OVER = (
    "FINISHED",
    "FAILED",
    "ABORTED",
    "ABANDONED",
)  # prefixes of the states of a job that has ended
REACH_SECONDS, LOGIN_SECONDS = 5.0, 15.0
SETTLE_SECONDS = 5.0  # for a process to end on its own
TRIES, WITHIN_SECONDS = 5, 300.0  # gives up after so many deaths within so many seconds


@dataclass(frozen=True)
class StartupKit:
    """A folder made by `fedspine fleet create`; `name` is "server", a site's or the operator's."""

    folder: Path
    role: Literal["server", "site", "admin"]
    name: str
    project: str
    host: str  # of the server; empty in the server's own kit
    port: int

    @property
    def command(self) -> list[str]:
        """The command that starts FLARE's process for this kit."""
        settings = ["secure_train=true", "org=fedspine", "config_folder=config"]
        settings += [f"uid={self.name}"] if self.role == "site" else []
        program = f"nvflare.private.fed.app.{PROGRAM[self.role]}"
        return [
            sys.executable,
            "-u",
            "-m",
            program,
            "-m",
            str(self.folder),
            "-s",
            STARTUP[self.role],
            "--set",
            *settings,
        ]


def needs_flare() -> None:
    """Raise BadInput if NVIDIA FLARE is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise BadInput("a fleet of real machines needs NVIDIA FLARE: pip install 'fedspine[flare]'")


def kit_at(folder: Path, role: str | None = None) -> StartupKit:
    """The kit in `folder`; raises BadInput if there is none, or one of another role than `role`."""
    for found, file in STARTUP.items():
        path = folder / "startup" / file
        if path.is_file():
            if role is not None and found != role:
                raise BadInput(
                    f"{folder} is the kit of a {found}, the kit of a {role} was expected"
                )
            try:
                return _read(folder.resolve(), found, json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, IndexError, TypeError):
                raise BadInput(
                    f"the kit {folder} is damaged ({path.name} cannot be read); copy it again"
                ) from None
    raise BadInput(f"{folder} is no start-up kit; name a folder that `fedspine fleet create` made")


def _read(folder: Path, role: str, settings: dict[str, Any]) -> StartupKit:
    if role == "admin":
        admin = settings["admin"]
        return StartupKit(
            folder,
            "admin",
            admin["username"],
            admin["project_name"],
            admin["host"],
            int(admin["port"]),
        )
    first = settings["servers"][0]
    host, _, port = first["service"]["target"].rpartition(":")
    if role == "server":
        return StartupKit(folder, "server", "server", first["name"], "", int(port))
    return StartupKit(folder, "site", settings["client"]["fqsn"], first["name"], host, int(port))


# --- before anything is started ---


def check_site(kit: StartupKit) -> None:
    """Raise BadInput if the site's file does not fit its kit, or names missing data."""
    site = load_site(kit.folder)
    if site.name != kit.name:
        raise BadInput(
            f"{kit.folder / SITE_FILE} is of site {site.name!r}, "
            f"the kit is of {kit.name!r}; copy the right one"
        )
    local = site.data.path not in BUILT_IN_DATA and Path(site.data.path).is_absolute()
    looks_local = local or Path(site.data.path).suffix != ""
    if looks_local and not Path(site.data.path).exists():
        raise BadInput(
            f"{kit.folder / SITE_FILE} names the data "
            f"{site.data.path}, which does not exist; set data.path"
        )


def check_reach(kit: StartupKit) -> str | None:
    """Try a TLS handshake with the server, with the kit's certificates.

    Returns why the server is unreachable at the moment, or None; raises BadInput if the kit and the
    server belong to different projects, which waiting does not fix.
    """
    startup = kit.folder / "startup"
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    context.set_alpn_protocols(["h2"])
    where = f"{kit.host}:{kit.port}"
    try:
        with (
            socket.create_connection((kit.host, kit.port), REACH_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=kit.host) as secure,
            suppress(TimeoutError),
        ):
            secure.settimeout(1.0)
            secure.recv(1)  # by then a server that rejects the certificate has said so
    except ssl.SSLCertVerificationError as error:
        raise BadInput(
            f"the server at {where} does not belong to this kit "
            f"({error.verify_message}); use the kit that was made with it"
        ) from None
    except ssl.SSLError:
        raise BadInput(
            f"the server at {where} refuses this kit's certificate; "
            "use a kit that was made with the server's"
        ) from None
    except OSError as error:
        return f"{where} does not answer ({error.strerror or error})"
    return None


# --- the process ---


@contextmanager
def only_one(kit: StartupKit) -> Iterator[None]:
    """Hold the kit's lock, so that it cannot be started twice; raises BadInput if it is held."""
    with open(kit.folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{kit.name} is already running from {kit.folder}; stop that first"
            ) from None
        yield


def serve(kit: StartupKit, log: IO[bytes]) -> int:
    """Run the kit's process until FLARE or a signal stops it; restart it if it dies.

    Returns 0, or 1 if it died TRIES times within WITHIN_SECONDS. Its output goes to `log`.
    """
    own_storage(kit)
    failures: list[float] = []
    while True:
        process = subprocess.Popen(
            kit.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ
            | keeping_freed_memory(),  # of messages of some megabytes, several copies each
        )
        try:
            code = process.wait()
        finally:  # of a signal, too
            end(process)
        if code == 0 and not (kit.folder / "restart.fl").exists():
            return 0
        now = time.monotonic()
        failures = [at for at in failures if now - at < WITHIN_SECONDS] + [now]
        if len(failures) >= TRIES:
            return 1
        time.sleep(2.0)


def own_storage(kit: StartupKit) -> None:
    """Keep a server's jobs in its kit; by default two servers on one machine share a folder."""
    path = kit.folder / "local" / "resources.json"
    if kit.role != "server":
        return
    resources = json.loads(path.read_text(encoding="utf-8"))
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(
        kit.folder / "storage" / "snapshots"
    )
    for part in resources["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit.folder / "storage" / "jobs")
    path.write_text(json.dumps(resources, indent=1), encoding="utf-8")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants, including jobs and their workers."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    with suppress(ProcessLookupError):
        process.terminate()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(family, timeout=SETTLE_SECONDS)
    for child in alive:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    try:
        process.wait(SETTLE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- the operator ---


def logged_in(kit: StartupKit, timeout: float = LOGIN_SECONDS) -> Any:
    """The operator's FLARE session, to be closed; raises BadInput if the server does not answer or
    refuses the login.
    """
    needs_flare()
    if problem := check_reach(kit):
        raise BadInput(f"{problem}; start the server, or check the network and its firewall")
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # the caller reports failures
    try:
        with redirect_stdout(io.StringIO()):  # it announces itself
            return new_secure_session(
                kit.name, str(kit.folder), timeout=timeout, auto_login_max_tries=1
            )
    except Exception as error:  # FLARE's errors have no common type
        raise BadInput(
            f"the server at {kit.host}:{kit.port} refuses {kit.folder}: {one_line(error)}"
        ) from None


@contextmanager
def session(kit: StartupKit, timeout: float = LOGIN_SECONDS) -> Iterator[Any]:
    """`logged_in` as a context manager, which closes the session."""
    made = logged_in(kit, timeout)
    try:
        yield made
    finally:
        with suppress(Exception):  # the server may just have been stopped
            made.close()


def fleet_status(session: Any) -> dict[str, Any]:
    """Connected sites and running jobs: `server_up_since`, `sites` and `jobs`."""
    info = session.get_system_info()
    jobs = [job for job in session.list_jobs() if not str(job["status"]).startswith(OVER)]
    return {
        "server_up_since": time.ctime(info.server_info.start_time),
        "sites": [
            {"name": client.name, "last_heard_of": time.ctime(client.last_connect_time)}
            for client in sorted(info.client_info, key=lambda client: client.name)
        ],
        "jobs": [
            {"id": job["job_id"], "status": job["status"], "submitted": job["submit_time"]}
            for job in jobs
        ],
    }


def site_status(kit: StartupKit) -> dict[str, Any]:
    """What runs have left on the disk of the site whose kit this is, in bytes, and its quota."""
    site = load_site(kit.folder)
    left = used(kit.folder, Path(site.caches.folder))
    return {
        "site": kit.name,
        "disk_bytes": site.limits.disk_bytes,
        "used_bytes": sum(left.values()),
        "by_kind": left,
    }


def stop(session: Any, name: str) -> list[str]:
    """Stop "all", "server" or one site; returns what was asked to stop. BadInput for a site that is
    not connected.
    """
    connected = sorted(client.name for client in session.get_system_info().client_info)
    if name not in ("all", "server", *connected):
        raise unknown("name of what is connected", name, ["all", "server", *connected])
    sites = connected if name == "all" else [] if name == "server" else [name]
    # without waiting: FLARE's server would take a site's last sign of life for its return
    if sites:
        session.shutdown("client", sites, wait=False)
    if name in ("all", "server"):
        session.shutdown("server", wait=False)
        sites = [*sites, "server"]
    return sites
