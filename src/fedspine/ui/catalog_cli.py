"""`fedspine methods` and `fedspine devices`: what a recipe can name."""

import dataclasses
import json as jsonlib
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fedspine
from fedspine.core.errors import one_line
from fedspine.ui.options import Json, print_table


def methods(
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="Show only this method.")
    ] = None,
    json: Json = False,
) -> None:
    """List the methods and their settings, including those of installed packages."""
    from fedspine.core import parts
    from fedspine.methods import all_methods, broken, find, packages

    found = {
        name: {
            "what": one_line(_said_of(cls).strip().split("\n\n")[0]),
            "package": packages().get(name, f"fedspine {fedspine.__version__}"),
            "settings": {
                field.name: parts.table_of(field.default) for field in dataclasses.fields(cls)
            },
            "choices": {
                key: {name: parts.table_of(part()) for name, part in choices.items()}
                for key, choices in parts.choices_of(cls).items()
                if len(choices) > 1
            },
        }
        for name, cls in (all_methods() if method is None else {method: find(method)}).items()
    }
    for one in broken() if method is None else ():
        print(f"fedspine: {one.line}", file=sys.stderr)
    if json:
        print(jsonlib.dumps(found))
        return
    for name, entry in found.items():
        rows = [
            ("", entry["what"]),
            ("package", entry["package"]),
            ("settings", _lines(parts.dotted(entry["settings"]))),
        ]
        for key, choices in entry["choices"].items():
            tables = (_lines(parts.dotted({key: table})) for table in choices.values())
            rows.append((f"choices of {key}", "\n\n".join(tables)))
        print_table(name, rows)


def devices(json: Json = False) -> None:
    """List the kinds of simulated devices and the default mix."""
    from fedspine.fleets.hardware import DEFAULT_MIX, GROUP_MBPS, KINDS, UTILISATION

    found = {
        kind.name: {
            "default_count": DEFAULT_MIX[kind.name],
            "memory_bytes": kind.memory_bytes,
            "peak_tflops_by_mode": list(kind.peaks_tflops),
        }
        for kind in KINDS.values()
    }
    if json:
        print(
            jsonlib.dumps(
                {"kinds": found, "link_mbps": list(GROUP_MBPS), "utilisation": UTILISATION}
            )
        )
        return
    table = Table(
        "kind", "of 80", "memory", "fp16 peak by power mode, TFLOP/s", title="simulated devices"
    )
    for name, kind in found.items():
        peaks = ", ".join(f"{peak:g}" for peak in kind["peak_tflops_by_mode"])
        table.add_row(
            name, str(kind["default_count"]), f"{kind['memory_bytes'] / 2**30:.0f} GiB", peaks
        )
    Console().print(table)
    print(f"links: four Wi-Fi groups of mean {', '.join(f'{mbps:g}' for mbps in GROUP_MBPS)} Mb/s")


def _said_of(cls: type) -> str:
    return sys.modules[cls.__module__].__doc__ or cls.__name__


def _lines(settings: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {jsonlib.dumps(value)}" for key, value in settings.items())
