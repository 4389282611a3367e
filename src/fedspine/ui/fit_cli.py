"""`fedspine fit`: the most accurate model of some runs that meets a device's limits."""

import dataclasses
import json as jsonlib
import os
import re
import sys
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_on_signal
from fedspine.ui.options import Json, Threads

BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
PLOT = "fit.svg"
NEAREST = 5  # near misses that are shown


@ends_on_signal()
def fit(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that `fedspine run` made.")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the device, such as 256MB.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit for one call, such as 50ms.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows per call.", min=1)] = 1,
    formats: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Formats to try, such as onnx,gguf; default: all."),
    ] = None,
    device_kind: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Predict the latency on this kind (see `fedspine devices`)."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per row; default: 128, or the model's maximum.", min=1),
    ] = None,
    threads: Threads = 1,
    rows: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Data to score on; default: the run's test rows."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Path of the runs' base, if it has moved.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Plot as SVG; default: {PLOT} in the first DIR."),
    ] = None,
    json: Json = False,
) -> None:
    """Find the most accurate deployed model, format and quantisation that fit a device, from one or
    more runs; exit code 2 if nothing fits.
    """
    from fedspine.exports.fit import FitQuery
    from fedspine.exports.fit import fit as find
    from fedspine.ui.progress import progress_for

    query = FitQuery(
        limits=_limits(memory, latency, batch, device_kind),
        formats=tuple(part.strip() for part in formats.split(",")) if formats else (),
        device_kind=device_kind,
        tokens=tokens,
        threads=threads,
        rows=rows,
        base=base,
    )
    if plot is not None and plot.suffix != ".svg":
        raise BadInput(f"--plot {plot} was given, but plots are SVG; name a file ending in .svg")
    if plot is not None and (plot.is_dir() or not os.access(plot.parent, os.W_OK)):
        raise BadInput(f"--plot {plot} cannot be written; name a file in a folder of yours")
    progress = progress_for(json)
    try:
        fits = find(folders, query, progress.stage)
    finally:
        progress.close()
    found = _plain(fits, query)
    found["plot"] = _drawn(found, plot, folders[0])
    if fits.best is None:  # this line first, wherever the streams go
        print(f"fedspine: {_nothing(fits, query)}", file=sys.stderr, flush=True)
    _show(found, json)
    if fits.best is None:
        raise typer.Exit(2)


def quantity(option: str, text: str, units: dict[str, float]) -> float:
    """A positive number with its unit.

    >>> quantity("--memory", "1.5 GB", BYTES), quantity("--latency", "50ms", SECONDS)
    (1500000000.0, 0.05)
    """
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    known = {name.lower(): factor for name, factor in units.items()}
    example = "256MB" if units is BYTES else "50ms"
    if parts is None or parts[2].lower() not in known or not 0 < float(parts[1]) < inf:
        raise BadInput(
            f"{option} {text!r} was given, but a positive number with one of the units "
            f"{', '.join(units)} was expected, such as {option} {example}"
        )
    return float(parts[1]) * known[parts[2].lower()]


def _limits(memory: str | None, latency: str | None, batch: int, kind: str | None) -> Any:
    from fedspine.exports.fit import DeviceLimits
    from fedspine.fleets.hardware import KINDS

    of_kind = KINDS[kind].memory_bytes if kind in KINDS else None
    limits = DeviceLimits(
        memory_bytes=of_kind if memory is None else quantity("--memory", memory, BYTES),
        latency_seconds=None if latency is None else quantity("--latency", latency, SECONDS),
        batch=batch,
    )
    if limits.memory_bytes is None and limits.latency_seconds is None and kind is None:
        raise BadInput("no limit was given; pass --memory, --latency or --device-kind")
    return limits


def _plain(fits: Any, query: Any) -> dict[str, Any]:
    return {
        "measure": fits.measure,
        "rows": fits.rows,
        "rows_from": fits.rows_from,
        "tokens": fits.tokens,
        "batch": query.limits.batch,
        "threads": query.threads,
        "device_kind": query.device_kind,
        "limits": dataclasses.asdict(query.limits),
        "best": None if fits.best is None else dataclasses.asdict(fits.best),
        "candidates": [dataclasses.asdict(one) for one in fits.candidates],
        "nearest": [dataclasses.asdict(one) for one in fits.nearest[:NEAREST]],
        "refused": dict(fits.refused),
    }


def _nothing(fits: Any, query: Any) -> str:
    """The message if nothing fits."""
    one = fits.nearest[0]
    further = "" if fits.tokens is None else ", or prune further"  # nets are not pruned
    numbers = " ".join(filter(None, (one.format, one.quantize)))
    return (
        f"nothing fits {_in_words(query.limits)}; nearest is {one.device} of {one.run} as "
        f"{numbers} with {one.memory_bytes / 1e6:.0f} MB and {1e3 * one.latency_seconds:.1f} ms"
        f"{' (predicted)' if one.predicted else ''}: raise a limit{further}"
    )


def _in_words(limits: Any) -> str:
    parts = []
    if limits.memory_bytes is not None:
        parts.append(f"{limits.memory_bytes / 1e6:g} MB")
    if limits.latency_seconds is not None:
        parts.append(f"{1e3 * limits.latency_seconds:g} ms")
    return f"{' and '.join(parts)} at batch {limits.batch}"


def _drawn(found: dict[str, Any], plot: Path | None, folder: Path) -> str | None:
    from fedspine.report.drawing import svg
    from fedspine.report.fit_report import fit_panel

    text = svg(fit_panel(found), background=True)
    place = folder / PLOT if plot is None else plot
    if plot is None:  # a run's folder may be read-only
        with suppress(OSError):
            place.write_text(text, encoding="utf-8")
            return str(place)
        return None
    place.write_text(text, encoding="utf-8")
    return str(place)


def _show(found: dict[str, Any], json: bool) -> None:
    from fedspine.report.fit_report import fit_table
    from fedspine.storage.records import plain

    if json:
        print(jsonlib.dumps(plain(found)))
        return
    best = found["best"]
    shown = found["nearest"] if best is None else found["candidates"]
    Console().print(fit_table(found, shown))
    by_reason: dict[str, list[str]] = {}
    for name, why in found["refused"].items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        print(f"left out: {', '.join(names)}: {why}")
    if found["plot"] is not None:
        print(f"plot: {found['plot']}")
    if best is not None:
        numbers = f" --quantize {best['quantize']}" if best["quantize"] else ""
        print(
            f"fits best: fedspine export {best['run']} --device {best['device']} --format "
            f"{best['format']}{numbers} --to MODEL"
        )
