"""Options and arguments that several commands share, and the table that they print."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedspine.core.errors import BadInput
from fedspine.core.process import cores

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change one value of the recipe; may be repeated.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `fedspine run` made.")]
Reference = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Unpruned run of the same data, seed and budget."),
]


def _of_machine(threads: int) -> int:
    if threads > cores():  # with thousands of them, libraries crash
        raise BadInput(
            f"--threads is {threads}, but this process may use {cores()} cores; give at most so "
            "many, as more would only wait for each other"
        )
    return threads


Threads = Annotated[int, typer.Option(help="CPU threads.", min=1, callback=_of_machine)]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that `fedspine export` made.")
]


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    Console().print(table)
