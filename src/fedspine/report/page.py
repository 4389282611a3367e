"""The page a run leaves behind: one HTML file with its style and figures inside, that fetches nothing."""

import json
import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.report import drawing, figures
from fedspine.report.drawing import Panel
from fedspine.report.rows import Rows, read_rows
from fedspine.report.series import DeviceClass, device_classes, summary_so_far, troubles
from fedspine.report.tables import (
    MISSING,
    Headline,
    bytes_text,
    counted,
    decimal,
    headlines,
    percent,
    seconds_text,
    summary_line,
)

TEXTS = ("Class", "Last reason")  # columns whose cells are words
REPORT, RECORDS, SUMMARY, RECIPE = "report.html", "records.jsonl", "summary.json", "recipe.toml"

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="what">$what</p>
</header>
$body
<footer>
<p>$footer</p>
</footer>
</main>
$script</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f9; --card: #fff; --ink: #0f172a; --soft: #5b6779; --line: #e2e7ee;
  --accent: #7c3aed; --warn: #fff7e6; --warn-line: #f3c46b; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1320; --card: #172033; --ink: #e8edf5; --soft: #9aa7bb;
  --line: #2a3650; --accent: #a78bfa; --warn: #33290f; --warn-line: #8a6a1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 20px 48px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 18px; letter-spacing: -0.005em; }
.what { margin: 6px 0 24px; color: var(--soft); }
.warn { margin: 0 0 20px; padding: 10px 14px; border: 1px solid var(--warn-line); border-radius: 10px;
  background: var(--warn); }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(200px, 46%), 1fr)); margin: 0; }
.card, figure, .table, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 14px 16px; }
.card dt { color: var(--soft); font-size: 13px; }
.card dd { margin: 0; }
.card .value { font-size: 23px; font-weight: 650; letter-spacing: -0.015em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.card:first-child { border-color: var(--accent); }
.card:first-child .value { color: var(--accent); }
.card .note { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.figures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.figures figure { margin: 0; padding: 16px 18px 14px; max-width: 760px; display: flex; flex-direction: column; }
figure h3 { margin: 0 0 10px; font-size: 15.5px; }
figure .plot { background: #fff; border-radius: 8px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { margin-top: 10px; color: var(--soft); font-size: 13px; line-height: 1.45; }
@media (prefers-color-scheme: dark) { figure .plot { padding: 8px; } }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 16px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-size: 13px; font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; }
td.text:last-child { min-width: 12em; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
details { margin-top: 36px; }
summary { padding: 12px 16px; cursor: pointer; font-weight: 600; }
pre { margin: 0; padding: 4px 16px 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
footer { margin-top: 28px; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 24px 12px 32px; } .card { padding: 11px 12px; } .card .value { font-size: 19px; }
  .figures figure { padding: 12px 10px; } th, td { padding: 8px 12px; } }
"""


def write_page(folder: Path) -> Path:
    """Write `folder`/report.html from what the run left there so far, at once or not at all; returns its path.

    Raises BadInput where the folder has neither records nor a summary, or where one of them cannot be read.
    """
    records, summary_file, recipe = folder / RECORDS, folder / SUMMARY, folder / RECIPE
    if not records.exists() and not summary_file.exists():
        raise BadInput(
            f"a run's folder with {RECORDS} was expected, {folder} has none; name the folder of a run"
        )
    rows = read_rows(records) if records.exists() else Rows()
    summary = _read_summary(summary_file) if summary_file.exists() else None
    text = page(
        folder.resolve().name, rows, summary, recipe.read_text("utf-8") if recipe.exists() else ""
    )
    part = folder / f".{REPORT}.part"
    part.write_text(text, "utf-8")
    os.replace(part, folder / REPORT)
    return folder / REPORT


def page(title: str, rows: Rows, summary: Mapping[str, Any] | None, recipe: str) -> str:
    """The page as text; a run without a `summary` is shown as unfinished, from its rows alone."""
    numbers = summary_so_far(rows) | {
        name: value for name, value in (summary or {}).items() if value is not None
    }
    unfinished = (
        ""
        if summary
        else '<p class="warn">This run has not finished: what follows is its records so far.</p>'
    )
    body = (
        unfinished,
        *_warnings(rows, numbers),
        _cards(headlines(numbers)),
        _figures(rows, numbers),
        _classes(rows),
        _troubles(rows),
    )
    return PAGE.substitute(
        title=escape(title),
        style=STYLE,
        what=escape(summary_line(numbers)),
        body="\n".join(part for part in (*body, _recipe(recipe)) if part),
        footer=escape(_footer(numbers)),
        script="",
    )


def _warnings(rows: Rows, numbers: Mapping[str, Any]) -> list[str]:
    """What was said of a run that does not learn, at its end or so far."""
    lines = numbers.get("warnings") or [warned.line for warned in rows.warnings]
    return [f'<p class="warn"><strong>Warning:</strong> {escape(line)}.</p>' for line in lines]


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"a JSON object was expected, {path.name} is none; remove it to see the records alone"
        ) from error


def _cards(lines: Iterable[Headline]) -> str:
    cards = [
        f'<div class="card"><dt>{escape(line.label)}</dt><dd class="value">{escape(line.value)}</dd>'
        f'<dd class="note">{escape(line.note)}</dd></div>'
        for line in lines
    ]
    return joined('<dl class="cards">', cards, "</dl>") if cards else ""


def _figures(rows: Rows, summary: Mapping[str, Any]) -> str:
    return gallery("Figures", figures.panels(rows, summary))


def gallery(title: str, panels: Iterable[Panel]) -> str:
    """Figures side by side under a heading; nothing where there are none."""
    drawn = [
        f'<figure><h3>{escape(panel.title)}</h3><div class="plot">{drawing.svg(panel)}</div>'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        for panel in panels
    ]
    return (
        joined(f'<h2>{escape(title)}</h2>\n<div class="figures">', drawn, "</div>") if drawn else ""
    )


def _classes(rows: Rows) -> str:
    found = device_classes(rows)
    colours = figures.class_colours([line.kind for line in found])
    head = (
        "Class",
        "Devices",
        "Sparsity, last noted",
        "Mean rank",
        "Simulated time per exchange",
        "Down",
        "Up",
    )
    return _table(
        "Device classes", head, [_class_cells(line, colours[line.kind]) for line in found]
    )


def _class_cells(line: DeviceClass, colour: str) -> list[str]:
    texts = (
        f"{line.devices:,}",
        percent(line.sparsity),
        decimal(line.rank, 1),
        seconds_text(line.seconds),
        bytes_text(line.bytes_down),
        bytes_text(line.bytes_up),
    )
    dot = f'<span class="dot" style="background:{colour}"></span>'
    return [f"<td>{dot}{escape(line.kind)}</td>", *(f"<td>{escape(text)}</td>" for text in texts)]


def _troubles(rows: Rows) -> str:
    lines = [
        [
            f"<td>{escape(line.device)}</td>",
            f'<td class="text">{escape(line.kind)}</td>',
            f"<td>{line.lost} of {counted(line.exchanges, 'exchange')}</td>",
            f"<td>{counted(line.left_out, 'time') if line.left_out else MISSING}</td>",
            f'<td class="text">{escape(line.reason or MISSING)}</td>',
        ]
        for line in troubles(rows)
    ]
    return _table("Lost or left out", ("Device", "Class", "Lost", "Left out", "Last reason"), lines)


def _table(title: str, head: Iterable[str], lines: list[list[str]]) -> str:
    """A table of cells that are HTML already; nothing where there are no lines."""
    if not lines:
        return ""
    names = "".join(
        f'<th scope="col"{" class=text" * (name in TEXTS)}>{escape(name)}</th>' for name in head
    )
    opening = f'<h2>{escape(title)}</h2>\n<div class="table"><table><thead><tr>{names}</tr></thead><tbody>'
    return joined(
        opening, (f"<tr>{''.join(cells)}</tr>" for cells in lines), "</tbody></table></div>"
    )


def joined(opening: str, parts: Iterable[str], closing: str) -> str:
    """Parts of a page, one a line, between an opening and a closing."""
    return "\n".join((opening, *parts, closing))


def _recipe(text: str) -> str:
    if not text:
        return ""
    return f"<details><summary>Recipe, complete and replayable</summary><pre>{escape(text)}</pre></details>"


def _footer(summary: Mapping[str, Any]) -> str:
    state = summary.get("state_sha256")
    clock = "Simulated numbers come from a model of the devices, not from measuring them."
    return f"{clock} State sha256 {state}." if state else clock
