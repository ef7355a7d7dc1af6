"""The console that tables are printed on. rich is imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
"""Columns of a pipe or a file, which has no width of its own: the tables fit."""


def wide_console() -> Console:
    """The terminal as it is; a pipe or a file as wide as the tables are."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=PIPE_WIDTH)
