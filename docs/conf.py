"""Sphinx configuration: Markdown pages through MyST, the API from docstrings. Built by `make docs`.

A page's line `% modules: store lab` becomes one section for every module of these rooms, so that no file is forgotten.
Our docstrings are written for people and for `help()`, not in reStructuredText: `_to_rst` turns their few habits
(backticks for code, indented blocks, `>>>` examples) into it, so no markup accident can break a page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"
sys.path.insert(0, str(SOURCE))

import aftershock
from aftershock._version import __version__

project = "Aftershock"
author = "The Aftershock authors"
project_copyright = "The Aftershock authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
default_role = "code"

html_theme = "furo"
html_title = f"Aftershock {release}"
html_show_sphinx = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
autodoc_type_aliases = {"npt.ArrayLike": "ArrayLike"}
maximum_signature_line_length = 88
# ref.python: two rooms may use one word each in its own sense; such a type in a signature then has no link.
suppress_warnings = ["config.cache", "ref.python"]


def setup(app: Any) -> None:
    app.connect("source-read", _fill_in)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _docstring)


def _fill_in(app: Any, name: str, source: list[str]) -> None:
    source[0] = re.sub(r"^% modules: (.+)$", lambda match: _rooms(match[1].split()), source[0], flags=re.MULTILINE)
    source[0] = re.sub(r"^% names$", lambda _: "\n".join(_names()), source[0], flags=re.MULTILINE)


def _rooms(rooms: list[str]) -> str:
    return "\n".join(
        f"## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :ignore-module-all:\n```\n"
        for room in rooms
        for module in _modules(room)
    )


def _modules(room: str) -> Iterator[str]:
    """Dotted names of the room's modules, a package before what it holds; an empty `__init__` is no page."""
    top = SOURCE / "aftershock" / room
    paths = sorted(top.rglob("*.py")) if top.is_dir() else [top.with_suffix(".py")]
    for path in paths:
        if path.read_text(encoding="utf-8").strip():
            yield ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def _names() -> Iterator[str]:
    for name in aftershock.__all__:
        home = getattr(getattr(aftershock, name), "__module__", None)
        yield f"- {{py:obj}}`aftershock.{name} <{home}.{name}>`" if home else f"- `aftershock.{name}`"


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """A NamedTuple's fields stand in its signature; "Alias for field number 0" adds nothing. None: as Sphinx would."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _to_rst(lines)


def _to_rst(lines: list[str]) -> list[str]:
    """Paragraph by paragraph: examples, indented blocks and plain lists keep their shape, the rest is flowing text."""
    done: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.splitlines()
        if paragraph.lstrip().startswith(">>>"):
            done += [".. code-block:: pycon", "", *("   " + row for row in rows), ""]
        elif all(re.match(r"- |  ", row) for row in rows) and rows and rows[0].startswith("- "):
            done += [_escape(row) for row in rows] + [""]
        elif any(row.startswith(" ") for row in rows):
            done += [".. code-block:: text", "", *("   " + row for row in rows), ""]
        else:
            # Joined, because a row that happens to begin with "- " or "4. " would start a list.
            done += [_escape(" ".join(rows)), ""]
    return done


def _escape(text: str) -> str:
    """Backticked spans as literals, every other special character as itself."""
    pieces = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        f"``{piece.strip('`')}``\\ " if piece.startswith("`") and i % 2 else re.sub(r"([\\*|_`])", r"\\\1", piece)
        for i, piece in enumerate(pieces)
    )
