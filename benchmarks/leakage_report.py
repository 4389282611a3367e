"""The tables of leakage.py: results/leakage.json, and results/leakage.md made from it; for data
other than trec6 the file names include the data's.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def write(table: Sequence[dict[str, Any]], how: dict[str, Any], methods: Sequence[str]) -> None:
    """Replace the rows of earlier calls for the same methods, servers and numbers of rows; `how`
    describes the measurement.
    """
    how = how | {"commit": _commit(), "torch": torch.__version__}
    name = "leakage" if how["data"] == "trec6" else f"leakage-{how['data']}"
    kept = HERE / "results" / f"{name}.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"rows": []}
    new = {(row["method"], row["server"], tuple(row["terms"])) for row in table}
    rows = [
        row
        for row in known["rows"]
        if (row["method"], row["server"], tuple(row["terms"])) not in new
    ]
    rows += [row | {"how": how} for row in table]
    rows.sort(key=lambda row: (methods.index(row["method"]), tuple(row["terms"])))
    kept.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    kept.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


TITLES = {
    "tokens": (
        "Tokens",
        "Recall of the distinct tokens of the rows, special ones apart: the mean over answers, its "
        "95 % interval, and the share of answers of which every token was found. *Chance*: the "
        "same tokens held against as many rows that the answer is not about.",
        "recall",
    ),
    "texts": (
        "Texts",
        "The share of rows of which no token is missing among those found, in the same way.",
        "share",
    ),
    "labels": (
        "Labels",
        "The share of rows whose label is among those recovered. *Chance*: the same labels held "
        "against rows that the answer is not about.",
        "share",
    ),
    "members": (
        "Membership",
        "AUC of telling the rows behind an answer from the other candidates; chance is 0.5.",
        "AUC",
    ),
}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of results/leakage.md."""
    ways = {json.dumps(row["how"], sort_keys=True): row["how"] for row in rows}
    lines = ["# What can be read from an answer", ""]
    for how in ways.values():
        command = f"python benchmarks/leakage.py{' --quick' if how['quick'] else ''}"
        command += " --default-terms" if how.get("default_terms") else ""
        lines += [
            f"`{command} --data {how['data']} --layers {how['layers']} --seed {how['seed']}`, "
            f"commit {how['commit']}, torch {how['torch']}: MiniLM's first {how['layers']} blocks, "
            f"fp32, {how['places']} tokens of a text, {how['public']} public rows, "
            f"{how['candidates']} candidates.",
            "",
        ]
    lines += summary(rows)
    for what, (title, text, measure) in TITLES.items():
        lines += [f"## {title}", "", text, ""]
        whole = what == "tokens"
        heads = ["method", "server", "attack", "rows", "answers", measure, "95 %", "chance"]
        heads += ["whole"] if whole else []
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in rows:
            if row["what"] != what:
                continue
            cells = [row["method"], row["server"], row["attack"], _rows(row), row["answers"]]
            cells += [f"{row['mean']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
            chance = f"{row['control']:.2f}"
            if what != "members":
                chance += f" ({row['control_low']:.2f} to {row['control_high']:.2f})"
            cells += [chance] + ([f"{row['whole']:.2f}"] if whole else [])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines + _refused(rows))


def _refused(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a site of the default terms replies instead of an answer."""
    lines = ["## Refused at the default terms", "", "What a site says instead of an answer.", ""]
    lines += ["| method | server | attack | rows | the site's line |", "|" + "---|" * 5]
    for row in rows:
        if row["what"] == "refused":
            cells = [row["method"], row["server"], row["attack"], _rows(row), row["line"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


SERVERS = (
    "curious",
    "hostile",
    "hostile, rank bound",
    "curious, default terms",
    "hostile, default terms",
    "hostile, default terms, 8 times",
)
TERMS = {"1 row": [1, 1], "8 rows": [1, 8], "32 rows": [1, 32], "20 x 32 rows": [20, 32]}


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Two tables with the attack that went furthest beyond chance in each place."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    parts = {
        "Tokens found (by chance); whole texts found": ("tokens", "texts"),
        "Labels found (by chance); AUC of membership": ("labels", "members"),
    }
    lines = ["## The best attack", ""]
    for title, (first, second) in parts.items():
        lines += [f"{title}:", "", "| method | server | " + " | ".join(TERMS) + " |"]
        lines += ["|" + "---|" * (2 + len(TERMS))]
        for method in methods:
            for server in SERVERS:
                cells = [_best(rows, method, server, first, second, t) for t in TERMS.values()]
                if any(cells):
                    lines.append(f"| {method} | {server} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _best(
    rows: Sequence[dict[str, Any]],
    method: str,
    server: str,
    first: str,
    second: str,
    terms: Sequence[int],
) -> str:
    """The text of one cell of the summary; empty if nothing was tried."""

    def furthest(what: str) -> dict[str, Any] | None:
        tried = [
            row
            for row in rows
            if (row["method"], row["server"], row["what"], list(row["terms"]))
            == (method, server, what, list(terms))
        ]
        return max(tried, key=lambda row: row["mean"] - row["control"], default=None)

    best, more = furthest(first), furthest(second)
    if best is None:
        refused = any(
            (row["method"], row["server"], row["what"], list(row["terms"]))
            == (method, server, "refused", list(terms))
            for row in rows
        )
        return "refused" if refused and "default terms" in server else ""
    return f"{best['mean']:.2f} ({best['control']:.2f})" + (f"; {more['mean']:.2f}" if more else "")


def _rows(row: dict[str, Any]) -> str:
    """The rows behind an answer, with the steps where there are several."""
    steps, batch = row["terms"]
    return str(batch) if steps == 1 else f"{steps} x {batch}"
