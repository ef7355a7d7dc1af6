"""What every page is made with: the templates' environment, the files a page carries, and writing it whole.

jinja2 is imported inside.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_HOME = resources.files("aftershock.report")


def environment() -> Environment:
    """Templates of `report/templates`, strict and escaping."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (_HOME / "templates" / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(path: str) -> Markup:
    """A file of this room as it is, for a page to carry."""
    from markupsafe import Markup

    return Markup((_HOME / path).read_text(encoding="utf-8"))


def embedded(json: str) -> Markup:
    """JSON for a <script>: only "</" and "<!--" could end it early, and \\u003c is the same string to a JSON parser."""
    from markupsafe import Markup

    return Markup(json.replace("<", "\\u003c"))


def ascii_html(page: str) -> str:
    """The page with everything else as character references, so that no encoding can spoil it."""
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def write_whole(path: Path, text: str) -> Path:
    """Write whole or not at all: a page that is open in a browser is never half new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)
    return path
