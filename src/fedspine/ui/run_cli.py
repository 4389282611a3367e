"""`fedspine run`, `fedspine sweep` and `fedspine demo`: what trains."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_when_told, limit_onednn_cache
from fedspine.ui.options import Json, Settings


@ends_when_told()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.toml", help="What to run; default: the embedded job."),
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/METHOD-N.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    from_round: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --resume: go back to round N, as a damaged run says.", min=0
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set run.seed=N.")] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            metavar="KIT", help="Run at the sites of a real fleet; KIT is the operator's."
        ),
    ] = None,
    sites: Annotated[
        int, typer.Option(help="With --fleet: begin when so many sites are connected.", min=1)
    ] = 1,
    quorum: Annotated[
        int,
        typer.Option(
            help="With --fleet: stop where fewer sites reply (a number; fleet.quorum is a share).",
            min=1,
        ),
    ] = 1,
    within: Annotated[
        float, typer.Option(help="With --fleet: seconds that a site has for one order.", min=1)
    ] = 600.0,
    largest_share: Annotated[
        float,
        typer.Option(
            help="With --fleet: what one site of three or more counts for at most, 0 to 1."
        ),
    ] = 0.5,
    json: Json = False,
) -> None:
    """Fine-tune and prune across a simulated fleet; without a recipe, the embedded job (80 devices,
    MiniLM).

    A recipe has the tables [task], [fleet], [method] and [run], and may have
    [privacy]; docs/recipes.md lists all keys.

    fedspine run --set method.sparsity=0.3 --set run.rounds=16

    fedspine run --set task.data=reviews.csv --set task.text=review --set task.label=stars
    """
    limit_onednn_cache()
    from fedspine.runs import config
    from fedspine.ui import python

    if resume is not None and out is not None:
        raise BadInput(
            "--resume goes on in its own folder, so --out "
            "has no place beside it; leave one of them out"
        )
    if resume is None and from_round is not None:
        raise BadInput("--from-round goes back in a run; name its folder with --resume")
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


@ends_when_told()
def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="Methods, settings, data and seeds to run.")
    ],
    jobs: Annotated[int, typer.Option(help="Runs at once, which share the cores.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default: sweeps/NAME OF THE FILE.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what is done; run nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed before.")] = False,
    json: Json = False,
) -> None:
    """Run every method under every setting, data set and seed of a file; what is done already is
    not run again.

    docs/sweeps.md explains the file. Exit code 1: at least one run has failed, and the others are
    done.
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


@ends_when_told()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/demo-N.")
    ] = None,
) -> None:
    """A first look in half a minute: a small run from data to report, an exported model, and what
    it answers.
    """
    limit_onednn_cache()
    from fedspine.ui.demo import demo as first_look
    from fedspine.ui.python import free_folder

    first_look(out or free_folder("demo"))
