"""Pages of HTML from the templates beside this file; whatever is put into one is escaped.

The only file that knows jinja2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fedspine.report.drawing import Panel, svg

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Figure:
    """A figure of a page; `svg` is an element that goes into it as it is."""

    title: str
    caption: str
    svg: str

    @classmethod
    def of(cls, panel: Panel) -> "Figure":
        return cls(panel.title, panel.caption, svg(panel))


def rendered(template: str, **values: Any) -> str:
    """A template filled with these values; a value that is missing is an error."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template(template).render(values)
