"""Live progress of a sweep on the terminal, with the time left. Imports rich when used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aftershock.lab.sweep import SweepProgress


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[SweepProgress], None]]:
    """A bar on the terminal; where there is none, a line every tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console.print)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[runs]}"),
        TextColumn("[dim]{task.fields[left]}  {task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=1.0, runs="", left="", note="")

        def update(state: SweepProgress) -> None:
            left = "" if state.left_s is None else f"{clock(state.left_s)} left"
            runs = f"{state.num_done}/{state.num_runs} runs"
            bar.update(task, completed=state.fraction, runs=runs, left=left, note=state.note)

        yield update


class _Lines:
    """Progress for logs: one line a tenth."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._next = write, 0.0

    def __call__(self, state: SweepProgress) -> None:
        if state.fraction >= self._next:
            self._next = (int(state.fraction * 10) + 1) / 10
            left = "" if state.left_s is None else f", {clock(state.left_s)} left"
            self._write(
                f"{state.fraction:4.0%}  {state.num_done}/{state.num_runs} runs, {clock(state.elapsed_s)}{left}"
            )


def clock(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
