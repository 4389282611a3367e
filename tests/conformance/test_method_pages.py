"""The table of settings on each method's page in docs/methods: the fields and the defaults of the
method's class, and of the parts that the page describes.
"""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from fedspine.core import parts
from fedspine.methods import all_methods, comes_with_fedspine

DOCS = Path(__file__).parents[2] / "docs"
METHODS = {name: cls for name, cls in all_methods().items() if comes_with_fedspine(name)}


def page_of(name):
    return (DOCS / "methods" / f"{name.replace('-', '_')}.md").read_text()


def rows(page, *header):
    """The cells of every row of the page's tables whose header begins with these columns."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        found = [
            [cell.strip() for cell in line.strip("|\n").split(" | ")]
            for line in table.replace("| |", "|  |").splitlines()
        ]
        if tuple(found[0][: len(header)]) == header:
            yield from found[2:]


def named(cell):
    """The settings that a cell names: `rank`, or `[method.selection]`."""
    return re.findall(r"`(?:\[method\.)?(\w+)\]?`", cell)


def said(field, text):
    return f"`{field}`" in text or f"`[method.{field}]`" in text


def defaults(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


def own(cls):
    """The fields that a method's class itself declares, not those of a base it shares."""
    return [name for name in vars(cls).get("__annotations__", {}) if name in defaults(cls)]


def same(text, default):
    """Whether a cell says this default: a number, a word with or without quotes, a part's name, or
    a tuple, a long one shortened to its first two and its last value.
    """
    text = text.strip("`").strip('"')
    if parts.is_part(default):
        return text == default.name
    if isinstance(default, tuple):
        ends = (*default[:2], "...", default[-1]) if len(default) > 4 else default
        return text == ", ".join(map(str, ends))
    if isinstance(default, bool | str):
        return text == str(default).lower()
    return math.isclose(float(text), default)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_page_has_the_methods_own_settings_with_their_defaults(name):
    cls, told = METHODS[name], set()
    known = defaults(cls)
    for fields, default, *_ in rows(page_of(name), "field", "default"):
        names = [each for each in named(fields) if each in known]
        one_each = default.split(", ") if len(names) > 1 else [default]
        if default.startswith("as ") or len(names) != len(one_each):
            continue  # said elsewhere, which is not enough for an own setting
        assert [
            n for n, text in zip(names, one_each, strict=True) if not same(text, known[n])
        ] == []
        told |= set(names)
    assert set(own(cls)) - told == set()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_page_names_all_settings_or_links_where_they_are(name):
    """Those that methods share stand on the page, or on one that it links."""
    page = page_of(name)
    linked = [DOCS / "methods" / link for link in re.findall(r"\]\(([\w./]+\.md)", page)]
    texts = [page, *(place.read_text() for place in linked)]
    silent = {f for f in defaults(METHODS[name]) if not any(said(f, text) for text in texts)}
    assert silent == set()


def test_parts_have_the_defaults_that_pages_give():
    """The tables of a composed setting's choices: name, and settings with defaults behind them."""
    told = 0
    for name, cls in METHODS.items():
        for field, choices in parts.choices_of(cls).items():
            for part, settings, *_ in rows(page_of(name), f"`{field}.name`", "settings"):
                known = defaults(choices[part.strip("`")])
                for setting, text in re.findall(r"`(\w+)` ([\w.-]+)", settings):
                    assert same(text, known[setting]), (name, part, setting)
                    told += 1
                assert set(known) == set(named(settings)), (name, part)
    assert told
