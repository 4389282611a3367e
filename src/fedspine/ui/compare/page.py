"""The page of a comparison: verdicts, the table, the figures, all pairs; one HTML file that fetches nothing."""

from collections.abc import Mapping
from html import escape

import fedspine
from fedspine.report.page import PAGE, STYLE, gallery, joined
from fedspine.report.tables import counted
from fedspine.report.traces import colour_of
from fedspine.ui.compare.caveats import about
from fedspine.ui.compare.comparison import Found, Section
from fedspine.ui.compare.numbers import Comparison
from fedspine.ui.compare.render_text import (
    BEYOND,
    WITHIN,
    Cell,
    Sheet,
    Verdict,
    methods_sheet,
    pairs_sheet,
    target_line,
    told_first,
    verdict,
)

BADGES = {BEYOND: "beyond", WITHIN: "within"}

LOOK = """
a { color: var(--accent); }
h2.part { margin-top: 44px; padding-top: 20px; border-top: 1px solid var(--line); font-size: 21px; }
ul.verdicts { margin: 0; padding: 0; list-style: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
ul.verdicts li { padding: 11px 16px; border-top: 1px solid var(--line); }
ul.verdicts li:first-child { border-top: 0; }
.badge { display: inline-block; margin-right: 10px; padding: 1px 9px; border-radius: 99px; font-size: 12px;
  font-weight: 600; white-space: nowrap; background: #e8ecf1; color: #475569; }
.badge.beyond { background: #d1fae5; color: #065f46; }
.target { margin: 14px 0; color: var(--soft); font-size: 13.5px; }
.sort th { padding: 0; vertical-align: top; }
.sort th button { all: unset; box-sizing: border-box; width: 100%; padding: 9px 11px; cursor: pointer; }
.sort th button:hover, .sort th[aria-sort] button { color: var(--accent); }
.sort th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; border-radius: 6px; }
.sort th[aria-sort="ascending"] button::after { content: " \\25B2"; font-size: 9px; }
.sort th[aria-sort="descending"] button::after { content: " \\25BC"; font-size: 9px; }
.sort th small { display: block; font-size: 11.5px; font-weight: 400; white-space: normal; min-width: 6em; }
.sort { font-size: 14px; }
.sort td { padding: 8px 11px; }
.sort th:first-child, .sort td:first-child { position: sticky; left: 0; background: var(--card); }
.sort td:first-child { white-space: normal; min-width: min(15em, 36vw); overflow-wrap: anywhere; }
.sort .badge { margin: 2px 0 0; font-size: 11.5px; }
td.missing { color: var(--soft); }
.about { margin-top: 28px; color: var(--soft); font-size: 13px; }
.about li { margin: 4px 0; }
details { margin-top: 14px; }
details > .table, details > ul.verdicts { border: 0; border-top: 1px solid var(--line); border-radius: 0; }
"""

SORT = """<script>
for (const table of document.querySelectorAll("table.sort")) table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th"), column = head?.cellIndex, body = table.tBodies[0];
  if (!head) return;
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const key = row => row.cells[column].dataset.value, sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((one, two) => {
    const a = key(one), b = key(two);  // what has no number stays last, whichever way
    return a === undefined || b === undefined ? (a === undefined) - (b === undefined) : sign * compare(a, b);
  }));
});
</script>
"""


def page(found: Found) -> str:
    """The page as text."""
    body = (
        _warning(found),
        _contents(found),
        *(_section(found, section) for section in found.sections),
        _about(found),
    )
    methods = {
        standing.method.name
        for section in found.sections
        for standing in section.comparison.standings
    }
    what = f"{counted(len(methods), 'method')}, {counted(found.runs, 'finished run')}, seeds {_seeds(found)}"
    if len(found.sections) > 1:
        what += f", {len(found.sections)} settings"
    return PAGE.substitute(
        title="Comparison"
        if len(found.sections) > 1
        else escape(found.sections[0].comparison.title),
        style=STYLE + LOOK,
        what=escape(what),
        body="\n".join(part for part in body if part),
        footer=escape(
            f"fedspine {fedspine.__version__}. Simulated numbers come from a model of the devices."
        ),
        script=SORT,
    )


def _seeds(found: Found) -> str:
    every = {
        seed
        for section in found.sections
        for each in section.comparison.standings
        for seed in each.final.values
    }
    return ", ".join(map(str, sorted(every)))


def _warning(found: Found) -> str:
    if not found.left_out:
        return ""
    lines = "; ".join(f"{left.folder} ({left.why})" for left in found.left_out)
    return f'<p class="warn">Left out: {escape(lines)}.</p>'


def _contents(found: Found) -> str:
    if len(found.sections) < 2:
        return ""
    links = [
        f'<li><a href="#part-{number}">{escape(section.comparison.title)}</a></li>'
        for number, section in enumerate(found.sections)
    ]
    return joined("<ul>", links, "</ul>")


def _section(found: Found, section: Section) -> str:
    comparison, number = section.comparison, found.sections.index(section)
    several = len(found.sections) > 1
    heading = (
        f'<h2 class="part" id="part-{number}">{escape(comparison.title)}</h2>' if several else ""
    )
    parts = (
        heading,
        _verdicts(comparison),
        f'<p class="target">{escape(target_line(comparison))}</p>',
        _table(methods_sheet(comparison, section.latencies), found.numbers),
        gallery("Figures", section.panels),
        _pairs(comparison),
    )
    return "\n".join(part for part in parts if part)


def _verdicts(comparison: Comparison) -> str:
    if not comparison.pairs:
        return '<p class="warn">One method alone: there is nothing to compare it with.</p>'
    first, rest = (
        joined(
            '<ul class="verdicts">',
            [_verdict(verdict(comparison, pair)) for pair in pairs],
            "</ul>",
        )
        if pairs
        else ""
        for pairs in told_first(comparison)
    )
    if not rest:
        return first
    return f"{first}<details><summary>{counted(len(told_first(comparison)[1]), 'other pair')}</summary>{rest}</details>"


def _verdict(found: Verdict) -> str:
    kind = BADGES.get(found.badge, "")
    return f'<li><span class="badge {kind}">{escape(found.badge)}</span>{escape(found.text)}</li>'


def _table(sheet: Sheet, colours: Mapping[str, int]) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(head)}<small>{escape(hint)}</small></button></th>'
        for head, hint in sheet.head
    )
    rows = (f"<tr>{''.join(_cell(cell, colours) for cell in row)}</tr>" for row in sheet.rows)
    opening = f'<div class="table"><table class="sort"><thead><tr>{heads}</tr></thead><tbody>'
    return joined(opening, rows, "</tbody></table></div>")


def _cell(cell: Cell, colours: Mapping[str, int]) -> str:
    if cell.value is None:
        return f'<td class="missing">{escape(cell.text)}</td>'
    number = colours.get(cell.value) if isinstance(cell.value, str) else None
    dot = (
        ""
        if number is None
        else f'<span class="dot" style="background:{colour_of(number)}"></span>'
    )
    worth = (
        ""
        if cell.badge is None
        else f'<br><span class="badge {BADGES.get(cell.badge, "")}">{cell.badge}</span>'
    )
    return f'<td data-value="{escape(str(cell.value))}">{dot}{escape(cell.text)}{worth}</td>'


def _pairs(comparison: Comparison) -> str:
    if not comparison.pairs:
        return ""
    return f"<h2>Every pair</h2>\n{_table(pairs_sheet(comparison), {})}"


def _about(found: Found) -> str:
    lines = (f"<li>{escape(line)}</li>" for line in about(found))
    return joined('<h2>How to read this</h2>\n<ul class="about">', lines, "</ul>")
