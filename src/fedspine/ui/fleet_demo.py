"""`fedspine fleet demo`: a whole fleet on one machine, with the same commands as on several.

The embedded data is shared out over site folders, kits are made, server and sites started as
processes of their own, and a short FedLoRA recipe is run over them.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Dataset, Rows
from fedspine.data.partition import partition
from fedspine.flare import startup_kit as kits
from fedspine.flare.provision import Kits, Project, create, write_site_file
from fedspine.runs import config
from fedspine.runs.assemble import dataset
from fedspine.runs.config import Recipe

UP_SECONDS = 120.0  # for all sites to connect
ALPHA = 1.0  # of the Dirichlet draw that shares classes out
SETTINGS = [
    "method.name=fedlora", "method.learning_rate=4e-3", "method.steps=8", "method.batch=16",
    "run.rounds=3", "run.evaluate_every=1", "run.evaluate_rows=256", "run.precision=fp32",
]  # fmt: skip


@dataclass(frozen=True)
class Federation:
    """A running server and its sites; `admin` is the operator's kit."""

    folder: Path
    admin: Path
    sites: tuple[str, ...]
    processes: dict[str, "subprocess.Popen[bytes]"]


def demo(sites: int, out: Path | None) -> int:
    """Run the whole demo; returns the exit code of the run."""
    kits.needs_flare()
    folder = (out or _free_folder()).absolute()
    if folder.exists():
        raise BadInput(f"{folder} exists; choose another folder with --out")
    names = tuple(f"site-{number + 1}" for number in range(sites))
    recipe = demo_recipe(sites)
    print(f"1. kits for a server, {sites} sites and you: {folder / 'kits'}", flush=True)
    made = create(
        Project(name="demo", host="127.0.0.1", port=free_port(), sites=names), folder / "kits"
    )
    print("2. each site gets its own part of the embedded data, unequal and skewed", flush=True)
    data = dataset(recipe)
    for name, rows in share_out(data, names).items():
        give_rows(made.folder / name, name, rows, data)
        print(f"   {name}: {len(rows.texts)} texts, a file in its own folder")
    (folder / "recipe.toml").write_text(recipe.toml(), encoding="utf-8")
    print(
        "3. server and sites start, each a process of its own; all traffic is mutual TLS",
        flush=True,
    )
    with running(made) as federation:
        command = [
            "run",
            str(folder / "recipe.toml"),
            "--fleet",
            str(federation.admin),
            "--out",
            str(folder / "run"),
        ]
        print(f"4. fedspine {' '.join(command)}", flush=True)
        code = _carried_out(command)
        print("5. stopping server and sites", flush=True)
    return code


def _carried_out(command: list[str]) -> int:
    """The exit code of a command in its own process, which ends with this one in good order."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedspine", *command],
        start_new_session=True,  # Ctrl-C is for the demo, which ends its run
    )
    try:
        return process.wait()
    finally:
        kits.end(process)


def demo_recipe(sites: int, *settings: str) -> Recipe:
    """A short FedLoRA run over so many sites, all of them in every round."""
    fleet = [f"fleet.devices={sites}", f"fleet.per_round={sites}"]
    return config.load(None, [*SETTINGS, *fleet, *settings])


def share_out(data: Dataset, names: tuple[str, ...], seed: int = 0) -> dict[str, Rows]:
    """The training rows of each site: every row at one of them, classes in unequal parts."""
    train = data.train
    shares = partition(
        "dirichlet",
        devices=len(names),
        rows=len(train),
        labels=train.labels,
        groups=None,
        alpha=ALPHA,
        seed=seed,
    )
    return {name: _rows(train, share) for name, share in zip(names, shares, strict=True)}


def give_rows(folder: Path, name: str, rows: Rows, data: Dataset) -> None:
    """Write a site's rows, and the file that says so, into its kit."""
    labels = [data.label_names[label] for label in rows.labels.tolist()]
    pq.write_table(pa.table({"text": rows.texts, "label": labels}), folder / "rows.parquet")
    write_site_file(folder, name=name, data={"path": "rows.parquet"})


@contextmanager
def running(made: Kits) -> Iterator[Federation]:
    """The server and all sites of these kits, started as `fedspine fleet start` would, connected,
    and ended after.
    """
    names = tuple(
        name for name in (*made.made, *made.kept) if name not in ("server", kits.ADMIN_KIT)
    )
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        for name in ("server", *names):
            processes[name] = stack.enter_context(_started(made.folder / name, name))
        federation = Federation(made.folder, made.folder / kits.ADMIN_KIT, names, processes)
        wait_until_connected(federation)
        yield federation


@contextmanager
def _started(kit: Path, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "fedspine", "fleet", "start", name, "--kit", str(kit)]
    with open(kit / "start.log", "ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        yield process
    finally:
        kits.end(process)


def wait_until_connected(federation: Federation, seconds: float = UP_SECONDS) -> None:
    """Return once all sites are connected; raises BadInput if one ended or `seconds` are over."""
    admin, end = kits.kit_at(federation.admin, "admin"), time.monotonic() + seconds
    while kits.check_reach(admin):
        _refuse_ended(federation, end)
        time.sleep(0.5)
    with kits.session(admin) as session:
        while len(kits.fleet_status(session)["sites"]) < len(federation.sites):
            _refuse_ended(federation, end)
            time.sleep(0.5)


def _refuse_ended(federation: Federation, end: float) -> None:
    for name, process in federation.processes.items():
        if process.poll() is not None:
            log = (federation.folder / name / "start.log").read_text(
                encoding="utf-8", errors="replace"
            )
            raise BadInput(f"{name} ended: {(log.strip().splitlines() or ['it said nothing'])[-1]}")
    if time.monotonic() > end:
        raise BadInput(
            f"not all of {', '.join(federation.sites)} are "
            f"connected; see the logs in {federation.folder}"
        )


def _rows(train: Rows, share: np.ndarray) -> Rows:
    texts = tuple(train.texts[row] for row in share)
    return Rows(texts=texts, pairs=None, labels=train.labels[share], columns={})


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _free_folder() -> Path:
    number = 1
    while (folder := Path("runs") / f"fleet-demo-{number}").exists():
        number += 1
    return folder
