"""`fedspine plan`: the cost of a recipe for each kind of device, before anything is loaded."""

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedspine.core.process import ends_on_signal
from fedspine.ui.options import Json, SettingsOption


@ends_on_signal()
def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE",
            help="As for `fedspine run`; default: the embedded job of a classifier.",
        ),
    ] = None,
    settings: SettingsOption = None,
    seed: Annotated[int | None, typer.Option(help="Shorthand for --set run.seed=N.")] = None,
    device_kind: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Assume that all devices are of this kind."),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            help="Number of classes of the task; default: from its data, if that can be read.",
            min=1,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a recipe would cost each kind of simulated device: peak memory, seconds and bytes
    of a round, without loading weights or training.

    A model of any size can be planned from its configuration, such as a folder with config.json.

    fedspine plan --set task.model=./llama-1b --set task.kind=causal-lm --set method.name=fedlora
    """
    from fedspine.report.plan_report import kind_table, summary_lines
    from fedspine.runs import config
    from fedspine.runs.plan import plan as planned_run

    planned = dataclasses.asdict(
        planned_run(config.load(recipe, settings, seed), classes=classes, kind=device_kind)
    )
    if json:
        print(jsonlib.dumps(planned))
        return
    Console().print(kind_table(planned))
    for line in summary_lines(planned):
        print(line)
