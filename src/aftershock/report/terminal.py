"""A study's result as a table for the terminal: final loss per rate for each size and arm, and its LR sensitivity.

Needs no series, so it is quick enough to show while a sweep is running. rich is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftershock.report.numbers import study_numbers
from aftershock.report.words import loss, rate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


WIDE = 110
"""Terminal columns from which on the table shows everything."""


def print_result(study_folder: str | Path, *, console: Console | None = None) -> None:
    """Print the headline and the result table of a study.

    Raises ValueError when there is no study, or it lists no runs.
    """
    from rich.console import Console

    numbers = study_numbers(study_folder, series=False)
    out = Console() if console is None else console
    out.print()
    out.print(_text(numbers["headline"]["main"], "bold"))
    for detail in numbers["headline"]["details"]:
        out.print(_text(detail))
    out.print()
    out.print(result_table(numbers, width=out.width))
    for group in numbers["groups"]:
        if group["note"]:
            out.print(_text(f"{group['size']} {group['arm']}: {group['note']}", "dim"))
    out.print(
        "[dim]Loss in nats, mean over seeds; [bold]best[/] rate bold; [red]x[/] diverged, [red]n/m x[/] that many "
        "seeds; [red]red[/] fails; . no result yet.[/]",
        highlight=False,
    )


def result_table(numbers: Mapping[str, Any], *, width: int = WIDE) -> Table:
    """The table alone: a row per size and arm, a column per rate, then the LR sensitivity.

    Below `WIDE` columns of `width` the interval is left out and losses have two decimals.
    """
    from rich.table import Table

    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="dim")
    for title in ("size", "arm"):
        table.add_column(title, overflow="fold", min_width=6)
    for lr in numbers["rates"]:
        table.add_column(rate(lr), justify="right", no_wrap=True)
    table.add_column("LR sensitivity" if wide else "sens.", justify="right", no_wrap=True)
    previous = ""
    for group in numbers["groups"]:
        points = {point["lr"]: point for point in group["points"]}
        cells = [_cell(points.get(lr), best=lr == group["best_lr"], wide=wide) for lr in numbers["rates"]]
        table.add_row(_text(group["size"], "bold" if group["size"] != previous else "dim"), _text(group["arm"]), *cells,
                      _sensitivity(group, wide=wide))  # fmt: skip
        previous = group["size"]
    return table


def _cell(point: Mapping[str, Any] | None, *, best: bool, wide: bool) -> Text:
    if point is None or point["verdict"] == "unknown":
        return _text(".", "dim")
    if point["num_diverged"] == point["num_judged"]:
        return _text("x", "bold red")
    style = "red" if point["verdict"] == "fails" else "bold" if best else ""
    text = _text(loss(point["loss"]) if wide else f"{point['loss']:.2f}", style)
    if point["num_diverged"]:
        text.append(f" {point['num_diverged']}/{point['num_judged']} x", style="red")
    return text


def _sensitivity(group: Mapping[str, Any], *, wide: bool) -> Text:
    if group["lr_sensitivity"] is None:
        return _text("none", "dim")
    text = _text(f"{group['lr_sensitivity']:.3f}", "bold")
    if wide and group["interval"] is not None:
        low, high = group["interval"]
        text.append(f"  {low:.2f} to {high:.2f}", style="dim")
    return text


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(value, style=style)
