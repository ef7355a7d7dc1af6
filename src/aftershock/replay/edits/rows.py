"""Which rows of which batches are guilty: the smallest set without which the spike stays away, found by bisection.

Must not import the runner: how a cell is run, and what counts as the spike, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from aftershock.replay.edits.data import Row, WithoutRows, num_rows, suspects
from aftershock.replay.run import Cell
from aftershock.replay.subject import Subject

MOST_CELLS = 64


class Guilty(NamedTuple):
    """`rows`: without them the spike does not come; `cells`: how many replays that took.

    `smallest`: whether leaving out any one row fewer brings it back, as far as asked; False where `most_cells` ran out.
    """

    rows: tuple[Row, ...]
    cells: int
    smallest: bool


def suspect_rows(subject: Subject) -> list[Row]:
    """Every row of the suspect batches, in order. Raises ValueError when batches have no rows."""
    found: list[Row] = []
    for step in suspects(subject.window):
        batch = subject.batch(step)
        parts = [batch] if subject.workload.accumulate == 1 else list(batch)
        found += [Row(step, part, row) for part, piece in enumerate(parts) for row in range(num_rows(piece))]
    return found


def guilty_rows(
    subject: Subject,
    run: Callable[[Cell], bool],
    *,
    rows: Sequence[Row] | None = None,
    most_cells: int = MOST_CELLS,
) -> Guilty | None:
    """The smallest set of `rows` (by default all of the suspects') that must be taken out for the spike to stay away.

    `run(cell)` replays it and says whether the spike is there. Delta debugging (Zeller and Hildebrandt 2002, "ddmin"):
    pieces of the set, then what is left without a piece, in ever finer pieces; about log2(rows) replays for one row,
    more for several. None when the spike comes even without all of them: then no row of theirs is the cause.

    Example:
        guilty_rows(subject, lambda cell: run_cell(subject, cell).response(subject.baseline).present)
    """
    if most_cells < 1:
        raise ValueError(f"most_cells is {most_cells}; at least one replay is needed")
    left = list(suspect_rows(subject) if rows is None else rows)
    known: dict[frozenset[Row], bool] = {}

    def calm_without(some: Sequence[Row]) -> bool:
        key = frozenset(some)
        if key not in known:
            name = f"rows:{len(known)}"
            known[key] = not run(Cell(name=name, family="data", edit=WithoutRows(rows=key)))
        return known[key]

    if not calm_without(left):
        return None
    pieces = 2
    while len(left) > 1:
        cut = [left[i * len(left) // pieces : (i + 1) * len(left) // pieces] for i in range(pieces)]
        others = [[row for row in left if row not in piece] for piece in cut] if pieces > 2 else []
        for kept, finer in [(piece, 2) for piece in cut] + [(rest, max(2, pieces - 1)) for rest in others]:
            if len(known) >= most_cells and frozenset(kept) not in known:
                return Guilty(tuple(left), len(known), smallest=False)
            if calm_without(kept):
                left, pieces = list(kept), finer
                break
        else:
            if pieces >= len(left):
                break
            pieces = min(len(left), 2 * pieces)
    return Guilty(tuple(left), len(known), smallest=True)
