"""One run as a single self-contained page: `render(gather(folders, run))` is the whole of `report.html`.

Sources: WCAG 2.2 (contrast, names for pictures), CSP level 3. The page loads nothing, runs nothing and
treats every text from data as hostile. What was not measured is shown as missing, never as zero. It does
not know the store, the recipe's types or torch, and it writes no file.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from luthier.report.folders import ReportInput, gather
from luthier.report.view import contents

__all__ = ["ReportInput", "gather", "render"]

_HERE = Path(__file__).parent


@cache
def _template() -> Template:
    shelf = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return shelf.get_template("page.html")


def render(record: ReportInput) -> str:
    """The page as text that is sure to encode as UTF-8."""
    style = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    page = _template().render(style=style, **contents(record))
    return page.encode("utf-8", "replace").decode("utf-8")
