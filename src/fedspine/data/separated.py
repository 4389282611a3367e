"""Delimited text: every cell is a string, and only an empty one is missing.

With commas or semicolons, quotes enclose values; with tabs, a quote is an ordinary character,
unless the rows fit the header only if quotes enclose values.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from fedspine.core.errors import BadInput
from fedspine.data.parts import Empty, FilePart, Pick, Unreadable, counted

Numbered = tuple[int, list[str]]  # the line that a row begins in, counted from 1, and its cells
SEPARATORS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t", ",", ";", "|")}  # as they are tried
_CALLED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_ALONE = re.compile(r"\r(?!\r*\n)")  # a carriage return that no line feed follows


def part(text: str, suffix: str, pick: Pick) -> FilePart:
    """The picked columns of a text with a header; `suffix` is that of its format, ".csv" or ".tsv".

    Separators are commas, semicolons, tabs or vertical bars, whichever the header has. Raises
    Unreadable for a text without a header, for rows with more or fewer cells than the header, and
    for a quote that is never closed, with the line.
    """
    alone = len(_ALONE.findall(text)) if "\n" in text else 0
    if not alone:
        return _part(text, suffix, pick)[0]
    try:  # it ends lines if the rows then fit the header, which any line of one column does
        found, width = _part(text, suffix, pick)
        if width > 1:
            return found
    except Unreadable:
        pass
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    found, _ = _part(_ALONE.sub(mark, text), suffix, pick)
    columns = {
        name: [cell and cell.replace(mark, "\r") for cell in cells]
        for name, cells in found.columns.items()
    }
    note = f"read as text: {counted(alone, 'carriage return')} that no line feed follows"
    return replace(found, columns=columns, notes=(*found.notes, note))


def _part(text: str, suffix: str, pick: Pick) -> tuple[FilePart, int]:
    """The picked columns of a text in which each line end ends a line, and how many columns there
    are.
    """
    lines = list(io.StringIO(text, newline=""))
    filled = [number for number, line in enumerate(lines) if line.strip()]
    # as Excel has it
    said = re.fullmatch(r"\"?sep=(.)\"?\s*", lines[filled[0]]) if filled else None
    if len(filled) <= bool(said):
        raise Empty
    first = filled[bool(said)]
    marks = (said[1],) if said else SEPARATORS[suffix]
    separator = _separator(lines[first], marks, pick)
    numbered, notes = _rows(lines, first, separator)
    header = numbered[0][1] if numbered else []
    rows = [row for _, row in numbered[1:]]
    columns = {name: [row[place] or None for row in rows] for name, place in pick(header).items()}
    if separator != SEPARATORS[suffix][0]:
        notes.insert(0, f"values are separated by {_CALLED.get(separator, repr(separator))}")
    return FilePart(columns=columns, rows=len(rows), notes=tuple(notes)), len(header)


def _separator(header: str, marks: Sequence[str], pick: Pick) -> str:
    """The first mark in the header that separates the names of the wanted columns, else the first
    one in it.
    """
    there = [mark for mark in marks if mark in header]
    for mark in there if len(there) > 1 else ():
        with suppress(BadInput, csv.Error, StopIteration):
            pick(next(csv.reader([header.rstrip("\r\n")], delimiter=mark, skipinitialspace=True)))
            return mark
    return there[0] if there else marks[0]


def _is_blank(row: Sequence[str], width: int) -> bool:
    """Whether a line is no row: it has no cell, or white space where the header has columns."""
    return not row or (width > 1 and len(row) == 1 and not row[0].strip())


def _rows(lines: list[str], first: int, separator: str) -> tuple[list[Numbered], list[str]]:
    """The header and all rows, and remarks; every row is as long as the header."""
    if separator != "\t":
        return _enclosed(lines, first, separator)
    plain = [
        (number, line.rstrip("\r\n").split("\t"))
        for number, line in enumerate(lines[first:], start=first + 1)
        if line.strip("\r\n")
    ]
    plain = [row for row in plain if not _is_blank(row[1], len(plain[0][1]))]
    quoted_header = all(re.fullmatch('".+"', name) for name in plain[0][1])
    if quoted_header or _first_unequal(plain) is not None:
        enclosed = _all_enclosed(lines, first, separator)
        if enclosed is not None:
            return enclosed
    _refuse_unequal(plain)
    return plain, []


def _all_enclosed(
    lines: list[str], first: int, separator: str
) -> tuple[list[Numbered], list[str]] | None:
    """The rows with quotes that enclose values, or None if any row does not fit the header then."""
    try:
        with _any_length():
            rows = list(csv.reader(lines[first:], delimiter=separator, strict=True))
    except csv.Error:
        return None
    rows = [(0, row) for row in rows if not _is_blank(row, len(rows[0]))]
    if _first_unequal(rows) is not None:
        return None
    found, notes = _enclosed(lines, first, separator)
    return found, ["values are enclosed in quotes", *notes]


def _enclosed(lines: list[str], first: int, separator: str) -> tuple[list[Numbered], list[str]]:
    """The header and all rows, where a quote at the start of a cell encloses it up to the next
    unpaired quote.

    A quote that is never closed, or that is closed in the middle of a cell, encloses nothing: its
    line is read as a row with the quote as text, if it has as many cells as the header.
    """
    rows: list[Numbered] = []
    # if spaces follow separators in the header, they may in the rows, too
    spaced = bool(re.search(re.escape(separator) + r" +\S", lines[first]))
    settings = {"delimiter": separator, "skipinitialspace": spaced}
    begin, unclosed, several, spanned = first, 0, 0, 0
    with _any_length():
        while begin < len(lines):
            start = begin
            reader = csv.reader(
                map(lines.__getitem__, range(start, len(lines))), strict=True, **settings
            )
            try:
                for row in reader:
                    end = start + reader.line_num
                    if not _is_blank(row, len(rows[0][1]) if rows else 0):
                        rows.append((begin + 1, row))
                    if end - begin > 1:
                        several, spanned = several + 1, spanned + end - begin
                    begin = end
                break
            except csv.Error as error:
                torn = "unexpected end" in str(error)
                merged = (len(lines) if torn else start + reader.line_num) - begin
                width = len(rows[0][1]) if rows else None
                row = _as_it_stands(lines[begin], settings, width)
                # any line of text would fit a single column, and the last line may be cut off
                unsure = width == 1 or (torn and not any(map(str.strip, lines[begin + 1 :])))
                if row is None or (unsure and (torn or merged > 1)):
                    where = "and is never closed" if torn else "and is closed in the middle of one"
                    raise Unreadable(
                        f"a quote opens a value in line {begin + 1} {where}, so that "
                        f"{counted(merged, 'line')} would be one row",
                        "close the quote, or double it to keep it as text",
                    ) from None
                rows.append((begin + 1, row))
                begin, unclosed = begin + 1, unclosed + 1
    _refuse_unequal(rows)
    notes = []
    if unclosed:
        notes.append(
            f"a quote that does not enclose a whole value is read as text in "
            f"{counted(unclosed, 'line')}"
        )
    if several:
        notes.append(
            f"quotes enclose {counted(several, 'row')} of several lines each, {spanned:,} in all"
        )
    return rows, notes


def _as_it_stands(line: str, settings: dict, width: int | None) -> list[str] | None:
    """The cells of one line, with a quote that encloses no whole cell read as text; None if they do
    not fit the header.
    """
    tries = [{"quoting": csv.QUOTE_NONE}, {}]
    if '\\"' in line:
        tries.insert(0, {"escapechar": "\\", "doublequote": False, "strict": True})
    for more in tries:
        try:
            row = next(csv.reader([line], **settings, **more), [])
        except csv.Error:
            continue
        if width is None or len(row) == width:
            return row
    return None


def _first_unequal(rows: Sequence[Numbered]) -> Numbered | None:
    """The first row that is not as long as the header; empty cells beyond it do not count."""
    width = len(rows[0][1]) if rows else 0
    return next(
        (
            (number, row)
            for number, row in rows
            if len(row) != width and (len(row) < width or any(row[width:]))
        ),
        None,
    )


def _refuse_unequal(rows: Sequence[Numbered]) -> None:
    if found := _first_unequal(rows):
        number, row = found
        raise Unreadable(
            f"line {number} has {counted(len(row), 'value')}, the header {len(rows[0][1])}",
            "put values that contain a separator in quotes, or fix the line",
        )


@contextmanager
def _any_length() -> Iterator[None]:
    """Lift the csv module's limit on the length of a cell, which holds for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
