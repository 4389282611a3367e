"""Texts of separated values: every cell is a string, and only an empty one is missing.

Between commas or semicolons a quote encloses a value; between tabs it is text like any other
character, unless the rows only fit the header with quotes that enclose values.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedspine.data.parts import FilePart, Pick, Unreadable, counted

Numbered = tuple[int, list[str]]  # the line that a row begins in, counted from 1, and its cells
SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}  # in the order they are tried
_CALLED = {",": "commas", ";": "semicolons", "\t": "tabs"}


def part(text: str, suffix: str, pick: Pick) -> FilePart:
    """The picked columns of a text with a header; `suffix` is that of its format, ".csv" or ".tsv".

    Separators are commas, semicolons or tabs, whichever the header has. Raises Unreadable for a
    text without a header, for rows of another number of cells, and for a quote that is never
    closed, each with its line.
    """
    lines = list(io.StringIO(text, newline=""))
    filled = [number for number, line in enumerate(lines) if line.strip()]
    said = re.fullmatch(r"sep=(.)\s*", lines[filled[0]]) if filled else None  # as Excel has it
    if len(filled) <= bool(said):
        raise Unreadable("it is empty", "give a file with rows")
    first = filled[bool(said)]
    marks = (said[1],) if said else SEPARATORS[suffix]
    separator = next((mark for mark in marks if mark in lines[first]), marks[0])
    numbered, notes = _rows(lines, first, separator)
    header = numbered[0][1] if numbered else []
    rows = [row for _, row in numbered[1:]]
    columns = {name: [row[place] or None for row in rows] for name, place in pick(header).items()}
    if separator != SEPARATORS[suffix][0]:
        notes.insert(0, f"{_CALLED.get(separator, repr(separator))} separate its values")
    return FilePart(columns=columns, rows=len(rows), notes=tuple(notes))


def _rows(lines: list[str], first: int, separator: str) -> tuple[list[Numbered], list[str]]:
    """The header and all rows, and remarks; every row is as long as the header."""
    if separator != "\t":
        return _enclosed(lines, first, separator)
    plain = [
        (number, line.rstrip("\r\n").split("\t"))
        for number, line in enumerate(lines[first:], start=first + 1)
        if line.strip("\r\n")
    ]
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
    """The rows if quotes enclose values, or None where a single one does not fit that."""
    try:
        with _any_length():
            rows = list(csv.reader(lines[first:], delimiter=separator, strict=True))
    except csv.Error:
        return None
    if _first_unequal([(0, row) for row in rows if row]) is not None:
        return None
    found, notes = _enclosed(lines, first, separator)
    return found, ["quotes enclose its values", *notes]


def _enclosed(lines: list[str], first: int, separator: str) -> tuple[list[Numbered], list[str]]:
    """The header and all rows, where a quote at the beginning of a cell encloses it up to the next
    single quote.

    A quote that nothing closes, or that is closed in the middle of a cell, encloses nothing: its
    line is a row of its own and holds it as text, if it has as many cells as the header.
    """
    rows: list[Numbered] = []
    spaced = bool(re.search(re.escape(separator) + r" +\S", lines[first]))  # so may be the rows
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
                    if row:
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
                    where = (
                        "and nothing closes it" if torn else "and is closed in the middle of one"
                    )
                    raise Unreadable(
                        f"a quote opens a value in line {begin + 1} {where}, so that "
                        f"{counted(merged, 'line')} would be one row",
                        "close the value, or write a quote in it twice",
                    ) from None
                rows.append((begin + 1, row))
                begin, unclosed = begin + 1, unclosed + 1
    _refuse_unequal(rows)
    notes = []
    if unclosed:
        notes.append(
            f"a quote encloses no whole value in {counted(unclosed, 'line')}, so it is read as "
            "text there"
        )
    if several:
        notes.append(
            f"{counted(several, 'row')} of several lines each, {spanned:,} in all, since quotes "
            "enclose them"
        )
    return rows, notes


def _as_it_stands(line: str, settings: dict, width: int | None) -> list[str] | None:
    """The cells of one line in which a quote encloses no whole cell; None where they do not fit the
    header.
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
            "enclose a value that holds a separator in quotes, or mend the line",
        )


@contextmanager
def _any_length() -> Iterator[None]:
    """Within it, a cell may be of any length; the limit is one of the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
