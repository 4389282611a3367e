"""The set-up for faults: a server and three sites over NVIDIA FLARE, one of them behind a link that
can be cut.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import fault_replay
import psutil

from fedspine.flare import startup_kit as kits
from fedspine.flare.provision import Project, create, write_site_file
from fedspine.lm.tiny import write_tiny
from fedspine.ui.fleet_demo import Federation, free_port, wait_until_connected

HERE = Path(__file__).parent
SITES = ("east", "north", "west")
AWAY, NAMESPACE, LINK = (
    "north",
    "fedspine-faults",
    "fsfault",
)  # the site behind a link that can be cut


@dataclass
class Place:
    """Kits with rows in them, and the processes that were started from them."""

    folder: Path
    separate: bool  # whether one site has a network of its own
    cut_seconds: float = 30.0  # that its network is cut
    within: float = 15.0  # seconds that an order may take
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    def start(self, name: str) -> None:
        """Start the server or a site, as its owner would."""
        command = [
            sys.executable,
            "-m",
            "fedspine",
            "fleet",
            "start",
            name,
            "--kit",
            str(self.kits / name),
        ]
        prefix = ["ip", "netns", "exec", NAMESPACE] if self.separate and name == AWAY else []
        with open(self.kits / name / "start.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix, *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kill a site and whatever it started, at once."""
        hit(family(str(self.kits / name)))
        self.processes[name].wait()

    def close(self) -> None:
        for process in self.processes.values():
            kits.end(process)


@contextmanager
def ground(folder: Path) -> Iterator[Place]:
    """A connected fleet, ended after."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE / "exchange_site"), os.environ.get("PYTHONPATH")])
    )
    os.environ[fault_replay.SPOIL] = str(folder / "spoil")
    (folder / "spoil").mkdir()
    with ExitStack() as stack:
        host = stack.enter_context(network())
        model, place = write_tiny(folder / "tiny", "bert"), Place(folder, host != "127.0.0.1")
        made = create(Project(name="faults", host=host, port=free_port(), sites=SITES), place.kits)
        draw = random.Random(1)
        for number, site in enumerate(SITES):
            (made.folder / site / "rows.csv").write_text(rows(draw, 60 + 20 * number))
            write_site_file(
                made.folder / site,
                name=site,
                data={"path": "rows.csv"},
                models={"tiny": str(model)},
                # which grows with the answers that a site has given, in other runs as well; a
                # replay has its own sites
                allow={"noise": 0.0},
            )
        (folder / "data.csv").write_text(rows(draw, 60))
        stack.callback(place.close)
        for name in ("server", *SITES):
            place.start(name)
        wait_until_connected(
            Federation(made.folder, made.folder / kits.ADMIN_KIT, SITES, place.processes)
        )
        yield place


def rows(draw: random.Random, count: int) -> str:
    """Lines of a CSV file of two kinds of texts."""
    words = {"fine": ("good", "the", "very"), "fault": ("bad", "not", "small")}
    fillers = ["in", "is", "with", "at"]
    lines = [
        f"{' '.join(draw.choices(words[kind], k=3) + draw.choices(fillers, k=3))},{kind}"
        for kind, _ in zip(itertools.cycle(words), range(count), strict=False)
    ]
    return "\n".join(["text,label", *lines]) + "\n"


@contextmanager
def network() -> Iterator[str]:
    """A second network namespace and a cable to it; yields the address by which both reach the
    server.
    """
    made = [
        f"netns add {NAMESPACE}",
        f"link add {LINK}0 type veth peer name {LINK}1",
        f"link set {LINK}1 netns {NAMESPACE}",
        f"addr add 10.77.9.1/24 dev {LINK}0",
        f"link set {LINK}0 up",
        f"-n {NAMESPACE} addr add 10.77.9.2/24 dev {LINK}1",
        f"-n {NAMESPACE} link set {LINK}1 up",
        f"-n {NAMESPACE} link set lo up",
    ]
    try:
        _remove()  # what a killed call left
        for line in made:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield "127.0.0.1"
        return
    try:
        yield "10.77.9.1"
    finally:
        _remove()


def _remove() -> None:
    for line in (f"link del {LINK}0", f"netns del {NAMESPACE}"):
        subprocess.run(["ip", *line.split()], check=False, capture_output=True)


def family(*words: str) -> list[int]:
    """Processes whose command lines hold all of these words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.pid != os.getpid() and all(word in line for word in words):
            found.append(process.pid)
    return found


def hit(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def cut(down: bool) -> None:
    """Cut the link to the site that is away, or mend it."""
    subprocess.run(["ip", "link", "set", f"{LINK}0", "down" if down else "up"], check=True)
