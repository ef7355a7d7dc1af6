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


def print_result(study_folder: str | Path, *, console: Console | None = None) -> None:
    """Print the headline and the result table of a study.

    Raises ValueError when there is no study, or it lists no runs.
    """
    from rich.console import Console

    numbers = study_numbers(study_folder, series=False)
    console = Console() if console is None else console
    console.print()
    console.print(f"[bold]{_plain(numbers['headline']['main'])}[/]", highlight=False)
    for detail in numbers["headline"]["details"]:
        console.print(_plain(detail), highlight=False)
    console.print()
    console.print(result_table(numbers))
    console.print(
        "[dim]Loss in nats, mean over seeds; [bold]best[/] rate bold; [red]x[/] diverged, [red]n/m x[/] that many "
        "seeds; [red]red[/]: fails; [dim].[/] no result yet.[/]",
        highlight=False,
    )


def result_table(numbers: Mapping[str, Any]) -> Table:
    """The table alone: a row per size and arm, a column per rate, then the LR sensitivity with its interval."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("size", "arm"):
        table.add_column(title, no_wrap=True)
    for lr in numbers["rates"]:
        table.add_column(rate(lr), justify="right", no_wrap=True)
    table.add_column("LR sensitivity", justify="right", no_wrap=True)
    previous = ""
    for group in numbers["groups"]:
        points = {point["lr"]: point for point in group["points"]}
        cells = [_cell(points.get(lr), best=lr == group["best_lr"]) for lr in numbers["rates"]]
        table.add_row(_text(group["size"], "bold" if group["size"] != previous else "dim"), _text(group["arm"]), *cells,
                      _sensitivity(group))  # fmt: skip
        previous = group["size"]
    return table


def _cell(point: Mapping[str, Any] | None, *, best: bool) -> Text:
    if point is None or point["verdict"] == "unknown":
        return _text(".", "dim")
    if point["num_diverged"] == point["num_judged"]:
        return _text("x", "bold red")
    style = "red" if point["verdict"] == "fails" else "bold" if best else ""
    text = _text(loss(point["loss"]), style)
    if point["num_diverged"]:
        text.append(f" {point['num_diverged']}/{point['num_judged']} x", style="red")
    return text


def _sensitivity(group: Mapping[str, Any]) -> Text:
    if group["lr_sensitivity"] is None:
        return _text(group["note"] or "-", "dim")
    text = _text(f"{group['lr_sensitivity']:.3f}", "bold")
    if group["interval"] is not None:
        low, high = group["interval"]
        text.append(f"  {low:.2f} to {high:.2f}", style="dim")
    return text


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(value, style=style)


def _plain(text: str) -> str:
    """Square brackets in names are not markup."""
    from rich.markup import escape

    return escape(text)
