"""`fedspine fleet`: start-up kits, processes and status of a fleet of real machines."""

import json as jsonlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_on_signal, ends_on_sigterm
from fedspine.ui.options import Json

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "A fleet of real machines over NVIDIA FLARE (the "
        "extra 'flare'); docs/real-devices.md is the guide."
    ),
)

Operator = Annotated[Path, typer.Option("--kit", metavar="DIR", help="The operator's kit.")]
CONSOLE_LOG = "console.log"  # in a kit: the output of its process


@app.command()
def create(
    project: Annotated[
        Path, typer.Argument(metavar="PROJECT.toml", help="Name, host and sites of the fleet.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the kits; default: NAME, beside the file."),
    ] = None,
) -> None:
    """Make certificates and start-up kits: one for the server, one for each site, and one for the
    operator.

    Run again after a site is added, it makes only that site's kit.
    """
    from fedspine.flare import provision

    wanted = provision.load_project(project)
    kits = provision.create(wanted, out or project.parent / wanted.name)
    for name in kits.made:
        print(f"made {kits.folder / name}")
    for name in kits.kept:
        print(f"kept {kits.folder / name}")
    print(
        "Copy each kit to its machine over a channel that you trust, keep "
        f"{kits.folder / provision.AUTHORITY} private, and open port {wanted.port} of "
        f"{wanted.host}."
    )


@app.command()
def start(
    name: Annotated[str, typer.Argument(metavar="server|SITE", help="Process to run.")],
    kit: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Start-up kit; default: ./NAME.")
    ] = None,
) -> None:
    """Run the server or a site until Ctrl-C or `fedspine fleet stop`, and restart it when it
    dies.
    """
    from fedspine.flare import startup_kit as kits

    kits.needs_flare()
    found = kits.kit_at(kit or Path(name), "server" if name == "server" else "site")
    if found.name != name:
        raise BadInput(f"{found.folder} is the kit of {found.name!r}; {name!r} was asked for")
    if found.role == "site":
        kits.check_site(found)
        if problem := kits.check_reach(found):
            print(f"{problem}; the site keeps trying")
    log = found.folder / CONSOLE_LOG
    with kits.only_one(found), open(log, "ab") as file, _until_signal() as interrupts:
        print(f"{name} is running; its log is {log}; stop it with Ctrl-C", flush=True)
        code = kits.serve(found, file)
    if interrupts:  # a requested stop is no failure
        print(f"{name} stopped")
    elif code == 0:
        print(f"{name} was stopped by the operator")
    else:
        print(
            f"fedspine: {name} ended {kits.TRIES} times within minutes; see {log}",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@app.command()
def status(
    site: Annotated[
        str | None,
        typer.Argument(metavar="SITE", help="Show the disk use of this site, on its machine."),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Start-up kit; default: ./admin, with SITE ./SITE."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the connected sites and running jobs; with SITE, the disk use of runs on that site."""
    from fedspine.flare import startup_kit as kits

    if site is not None:
        _show_disk(kits.site_status(kits.kit_at(kit or Path(site), "site")), json)
        return
    with kits.session(kits.kit_at(kit or Path("admin"), "admin")) as session:
        found = kits.fleet_status(session)
    if json:
        print(jsonlib.dumps(found))
        return
    table = Table("site", "last seen", title="connected sites", title_justify="left")
    for site in found["sites"]:
        table.add_row(escape(site["name"]), escape(site["last_heard_of"]))
    Console().print(table)
    print(f"server: up since {found['server_up_since']}")
    for job in found["jobs"]:
        print(f"job {job['id']}: {job['status']}, submitted {job['submitted']}")
    if not found["jobs"]:
        print("no job is running")


def _show_disk(found: dict[str, Any], json: bool) -> None:
    if json:
        print(jsonlib.dumps(found))
        return
    parts = ", ".join(f"{kind} {_mb(size)}" for kind, size in found["by_kind"].items())
    share = f"{_mb(found['used_bytes'])} of {_mb(found['disk_bytes'])} MB"
    print(f"{found['site']}: runs use {share} of disk space ({parts})")


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="all|server|SITE", help="What to stop.")] = "all",
    kit: Operator = Path("admin"),
) -> None:
    """Stop the whole fleet, the server, or one site, from any machine with the operator's kit."""
    from fedspine.flare import startup_kit as kits

    with kits.session(kits.kit_at(kit, "admin")) as session:
        stopped = kits.stop(session, name)
    print(f"stop requested: {', '.join(stopped) or 'none, nothing is connected'}")


@app.command()
@ends_on_signal()
def demo(
    sites: Annotated[int, typer.Option(help="Sites on this machine.", min=2, max=16)] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder; default: runs/fleet-demo-N.")
    ] = None,
) -> None:
    """Run a whole fleet on this machine: partition the embedded data, make kits, start, run
    FedLoRA, stop.
    """
    from fedspine.ui.fleet_demo import demo as run_demo

    raise typer.Exit(run_demo(sites, out))


@contextmanager
def _until_signal() -> Iterator[list[KeyboardInterrupt]]:
    """Ctrl-C and SIGTERM both end the block; the list is then not empty."""
    interrupts: list[KeyboardInterrupt] = []
    with ends_on_sigterm():
        try:
            yield interrupts
        except KeyboardInterrupt as interrupt:
            interrupts.append(interrupt)
