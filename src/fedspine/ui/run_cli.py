"""`fedspine run`, `fedspine sweep` and `fedspine demo`: what trains."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_on_signal, limit_onednn_cache
from fedspine.ui.options import Json, SettingsOption


@ends_on_signal()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE",
            help="What to run: a TOML file, or `chat`, the embedded job of a language model; "
            "default: the embedded job of a classifier.",
        ),
    ] = None,
    settings: SettingsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/METHOD-N.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    from_round: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --resume: go back to round N of a damaged run first.", min=0
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Shorthand for --set run.seed=N.")] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            metavar="KIT",
            help="Run at the sites of a real fleet; KIT is the operator's start-up kit.",
        ),
    ] = None,
    sites: Annotated[
        int, typer.Option(help="With --fleet: start once this many sites are connected.", min=1)
    ] = 1,
    quorum: Annotated[
        int,
        typer.Option(
            help="With --fleet: stop if fewer sites reply (a count; fleet.quorum is a share).",
            min=1,
        ),
    ] = 1,
    within: Annotated[
        float, typer.Option(help="With --fleet: seconds that a site has to answer an order.", min=1)
    ] = 600.0,
    largest_share: Annotated[
        float,
        typer.Option(help="With --fleet: largest weight of one site out of three or more, 0 to 1."),
    ] = 0.5,
    json: Json = False,
) -> None:
    """Fine-tune and prune a model across a simulated fleet; without a recipe, run the embedded job
    (80 devices, MiniLM).

    A recipe has the tables [task], [fleet], [method] and [run], and may have
    [privacy]; docs/recipes.md lists all keys.

    fedspine run --set method.sparsity=0.3 --set run.rounds=16

    fedspine run chat

    fedspine run --set task.data=reviews.csv --set task.text=review --set task.label=stars
    """
    limit_onednn_cache()
    from fedspine.runs import config
    from fedspine.ui import python

    if resume is not None and out is not None:
        raise BadInput(
            "--resume writes to the folder of the run, so it cannot be combined with --out; leave "
            "one of them out"
        )
    if resume is None and from_round is not None:
        raise BadInput("--from-round needs a run to go back in; name its folder with --resume")
    place = _backend(fleet, sites, quorum, within, largest_share)
    if resume is None:
        result = python.run(config.load(recipe, settings, seed), out, json, sites=place)
    else:
        wanted = _wanted(recipe, settings, seed, resume)
        result = python.resume(resume, wanted, json, sites=place, from_round=from_round)
    print(jsonlib.dumps(result.summary) if json else f"report: {result.report}")


def _backend(kit: Path | None, sites: int, quorum: int, within: float, largest_share: float) -> Any:
    """The real sites, None for simulated devices."""
    from fedspine.flare.site_state import Timeouts
    from fedspine.runs.backend import RealSites

    if not 0 < largest_share <= 1:
        raise BadInput(
            f"--largest-share is {largest_share}, but a share above 0 and up to 1 was expected"
        )
    if kit is None:
        return None
    timeouts = Timeouts(
        sites=max(sites, quorum), quorum=quorum, within=within, largest_share=largest_share
    )
    return RealSites(kit, timeouts)


def _wanted(recipe: Path | None, settings: list[str] | None, seed: int | None, folder: Path) -> Any:
    """The recipe given with a resume, laid over the folder's own unless it is a file."""
    from fedspine.runs import config
    from fedspine.runs.run_dir import RECIPE, recipe_of

    if recipe is None and not settings and seed is None:
        return None
    recipe_of(folder)
    return config.load(recipe or folder / RECIPE, settings, seed)


@ends_on_signal()
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.toml", help="File with methods, settings, data sets and seeds."
        ),
    ],
    jobs: Annotated[int, typer.Option(help="Runs at a time; they share the cores.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default: sweeps/ and the file's name.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Show the status of all runs; run nothing.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also run those that failed before.")
    ] = False,
    json: Json = False,
) -> None:
    """Run every combination of the methods, settings, data sets and seeds in a file; finished runs
    are not repeated.

    docs/sweeps.md explains the file. Exit code 1: at least one run failed; all others are done.
    """
    from fedspine.ui.sweep.display import print_overview, sweep_progress_for
    from fedspine.ui.sweep.work import carry_out, listed, overview_of

    if only_list:
        found = overview_of(file, out)
    else:
        found = carry_out(
            file, out, jobs=jobs, retry=retry, progress=lambda: sweep_progress_for(json)
        )
    if json:
        print(jsonlib.dumps(found.table()))
    else:
        print_overview(listed(found), found.folder, found.unlisted, everything=only_list)
    if found.counts["failed"] and not only_list:
        raise typer.Exit(1)


@ends_on_signal()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/demo-N.")
    ] = None,
) -> None:
    """A first look in half a minute: a small run from data to report, an exported model, and its
    predictions.
    """
    limit_onednn_cache()
    from fedspine.ui.demo import demo as first_look
    from fedspine.ui.python import free_folder

    first_look(out or free_folder("demo"))
