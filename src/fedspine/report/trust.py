"""What a run's records say about trust: the epsilon that each device has spent, the noise that it
added, the devices whose change was bounded, and those left out.
"""

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from fedspine.report.rows import RunRows, read_rows
from fedspine.report.series import troubles
from fedspine.report.tables import counted, percent

RECORDS, RECIPE = "records.jsonl", "recipe.toml"
MOST = 8  # devices that a line names


def epsilon_spent(rows: RunRows) -> dict[str, float]:
    """What each device has spent so far of the epsilon that the run promises it."""
    return {
        exchange.device: exchange.epsilon
        for exchange in rows.exchanges
        if exchange.epsilon is not None
    }


def noise_added(rows: RunRows) -> dict[str, float]:
    """The least noise that each device added to an answer, beside the change of its weights."""
    least: dict[str, float] = {}
    for exchange in rows.exchanges:
        if exchange.noise is not None:
            least[exchange.device] = min(exchange.noise, least.get(exchange.device, inf))
    return least


def bounded_devices(rows: RunRows) -> dict[str, dict[str, Any]]:
    """For each device whose change was larger than a usual one the rounds in which it was scaled
    down, and the smallest share that counted.
    """
    shares: dict[str, dict[int, float]] = defaultdict(dict)
    for note in rows.notes:
        if note.bounded is not None:
            share = 1.0 if note.share is None else note.share
            shares[note.device][note.round] = min(share, shares[note.device].get(note.round, 1.0))
    return {
        device: {"rounds": len(found), "smallest_share": min(found.values())}
        for device, found in sorted(shares.items(), key=lambda item: -len(item[1]))
    }


def left_out_devices(rows: RunRows) -> dict[str, dict[str, Any]]:
    """For each device that was left out how often, and the reason that was noted last."""
    return {
        line.device: {"times": line.left_out, "reason": line.reason}
        for line in troubles(rows)
        if line.left_out
    }


def promised_in(recipe: str) -> dict[str, Any] | None:
    """`[privacy]` of a recipe in TOML; None where it promises nothing, or is no recipe."""
    with suppress(tomllib.TOMLDecodeError):
        return tomllib.loads(recipe).get("privacy")
    return None


def trust(rows: RunRows, promised: Mapping[str, Any] | None) -> dict[str, Any]:
    """All of it as plain data, without empty entries; `promised` is `[privacy]` of the run's
    recipe.
    """
    privacy = {"privacy": {**promised, "epsilon_spent": epsilon_spent(rows)}} if promised else {}
    found = {"noise": noise_added(rows), "bounded": bounded_devices(rows)}
    found |= {"left_out": left_out_devices(rows)}
    return privacy | {name: devices for name, devices in found.items() if devices}


def trust_of(folder: Path) -> dict[str, Any]:
    """The same for a run's folder, finished or not."""
    records, recipe = folder / RECORDS, folder / RECIPE
    rows = read_rows(records) if records.exists() else RunRows()
    return trust(rows, promised_in(recipe.read_text("utf-8") if recipe.exists() else ""))


def trust_lines(found: Mapping[str, Any]) -> list[str]:
    """The same as lines of text.

    >>> privacy = {"level": "rows", "epsilon": 8.0, "delta": 1e-5, "epsilon_spent": {"a": 2.5}}
    >>> trust_lines({"privacy": privacy, "bounded": {"b": {"rounds": 2, "smallest_share": 0.25}}})
    ... # doctest: +NORMALIZE_WHITESPACE
    ['privacy of rows: epsilon 8 at delta 1e-05 promised to each device; spent: a 2.5',
     'bounded to a usual change: b in 2 rounds (25.0 % counted at least)']
    """
    lines = []
    if (privacy := found.get("privacy")) is not None:
        spent = [f"{device} {value:.3g}" for device, value in privacy["epsilon_spent"].items()]
        lines.append(
            f"privacy of {privacy['level']}: epsilon {float(privacy['epsilon']):g} at delta "
            f"{privacy['delta']:g} promised to each device; spent: {_named(spent) or 'nothing yet'}"
        )
    if noise := found.get("noise"):
        listed = [f"{device} {least:.2g}" for device, least in noise.items()]
        lines.append(f"noise beside the change of weights that left, at least: {_named(listed)}")
    if bounded := found.get("bounded"):
        listed = [
            f"{device} in {counted(each['rounds'], 'round')} "
            f"({percent(each['smallest_share'])} counted at least)"
            for device, each in bounded.items()
        ]
        lines.append(f"bounded to a usual change: {_named(listed)}")
    if left_out := found.get("left_out"):
        listed = [
            f"{device} {counted(each['times'], 'time')}"
            + (f" ({each['reason']})" if each["reason"] else "")
            for device, each in left_out.items()
        ]
        lines.append(f"left out: {_named(listed)}")
    return lines


def _named(devices: Sequence[str]) -> str:
    """The first of many devices, and the number of the others."""
    more = len(devices) - MOST
    return ", ".join(devices[:MOST]) + (f", and {more} more" if more > 0 else "")
