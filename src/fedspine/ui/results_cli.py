"""`fedspine show`, `fedspine report` and `fedspine compare`: what came of runs."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_on_signal, limit_onednn_cache
from fedspine.ui.options import Json, Reference, RunFolder


@ends_on_signal()
def show(
    folder: RunFolder,
    everyone: Annotated[
        bool,
        typer.Option(
            "--all", help="Score every device's model on the test set and show the scores."
        ),
    ] = False,
    reference: Reference = None,
    json: Json = False,
) -> None:
    """Show a run's summary, or its progress."""
    if everyone:
        if reference is not None:
            raise BadInput("--all cannot be combined with --reference; leave one of them out")
        _show_everyone(folder, json)
        return
    from fedspine.report.tables import print_table, summary_table, unpruned_table
    from fedspine.report.trust import trust_lines, trust_of
    from fedspine.runs.run_dir import status_of
    from fedspine.ui.compare.unpruned import unpruned_runs

    found, unpruned, trusted = status_of(folder), unpruned_runs(folder, reference), trust_of(folder)
    if json:
        more = {"unpruned_runs": unpruned_table(found, unpruned)} if unpruned else {}
        print(jsonlib.dumps(found | trusted | more))
        return
    print_table(summary_table(found, unpruned), sys.stdout)
    for line in trust_lines(trusted):
        print(line)
    for line in found.get("warnings", ()):
        print(f"warning: {line}")
    if "state_sha256" not in found:
        then = found.get("ended", f"resume with: fedspine run --resume {folder}")
        print(f"not finished: {found['rounds_done']} of {found['rounds']} rounds; {then}")


@ends_on_signal()
def report(folder: RunFolder, reference: Reference = None, json: Json = False) -> None:
    """Write a run's report.html again, with an unpruned run of the same budget beside it."""
    from fedspine.report.page import write_page
    from fedspine.ui.compare.unpruned import unpruned_runs
    from fedspine.ui.progress import progress_for

    progress = progress_for(json)
    progress.stage("drawing the report")
    try:
        page = write_page(folder, unpruned_runs(folder, reference))
    finally:
        progress.close()
    print(jsonlib.dumps({"page": str(page)}) if json else f"report: {page}")


def _show_everyone(folder: Path, json: bool) -> None:
    limit_onednn_cache()
    from fedspine.report.tables import device_table
    from fedspine.ui.device_scores import device_scores
    from fedspine.ui.progress import progress_for

    progress = progress_for(json)
    try:
        found = device_scores(folder, progress)
    finally:
        progress.close()
    if json:
        print(jsonlib.dumps({"devices": found}))
        return
    Console().print(device_table(found))


@ends_on_signal()
def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...", help="Folders of runs, or of a sweep.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="auto|X", help="Accuracy (0.7 or 70%) or loss for the time to target."
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for page, table and plots; default: runs/compare-N.")
    ] = None,
    latency: Annotated[
        bool, typer.Option(help="Measure the deployed models on this machine.")
    ] = True,
    json: Json = False,
) -> None:
    """Compare methods over seeds: quality, time and bytes to a target, waiting, memory, latency;
    docs/compare.md.
    """
    from fedspine.ui import python
    from fedspine.ui.compare.terminal import show

    result = python.compare(runs or [], target, latency, json)
    page = result.write(out or python.free_folder("compare"))
    if json:
        print(jsonlib.dumps(result.table() | {"page": str(page)}))
        return
    show(result.report)
    print(f"page: {page}")
