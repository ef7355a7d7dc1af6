"""Runs cells: one in this process, or a grid of them side by side in forked workers.

When a cell is stopped early (never one that is `full`, and with stop_early=False none):

- "spike": its excess over the level has reached 0.8 of the recorded spike's and has come down to half of its own
  highest for 3 steps in a row (a second peak, higher than the first, is then not seen); or it had the spike
  (`Response.present`) and lies in the band again for 5; or has had it for 20 steps; or it was not finite for 10: the
  spike is there
- "quiet": the recorded end is behind by one spike length (end and length count up to 60 steps after the peak), the
  loss never left the band by more than a tenth of the recorded rise, and lies within it for the last 5 steps: no spike
  came, nor is one on its way
- a cell that is neither ends at `Subject.short`

Must not import the lab.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aftershock.replay.footprint import check_undone, footprint
from aftershock.replay.forked import Lost, can_fork, run_forked
from aftershock.replay.loop import Taken, length, take_steps
from aftershock.replay.response import PRESENT_SHARE, Baseline, Response, measure
from aftershock.replay.run import Cell, Run
from aftershock.replay.subject import LONG, Subject, seen_by
from aftershock.signals.untouched import untouched

Stopped = Literal["end", "spike", "quiet", "edit", "budget", "error"]
"""end: ran to its full length; spike, quiet: the answer was clear; edit: it ended itself; budget: out of time, perhaps
before the first step; error: it failed, or its worker died."""

HIGH_SHARE, DOWN_SHARE, DOWN = 0.8, 0.5, 3
QUIET_SHARE, QUIET = 0.1, 5
NONFINITE = 10
STAYS = 20
"""Steps without a finite loss after which a replay is lost."""


class CellResult(NamedTuple):
    """One replay as it ran. `losses`, `grad_norms` (before clipping), `updates` (lengths of the weights' change) and
    `rates` (the schedule's) are by step from `first` on; the cell acted from step `since` on. `error` is what went
    wrong, "" where nothing did.

    `distance`: from the weights at the snapshot to those at the end (not where an edit changed their shapes: nan).
    """

    name: str
    family: str
    first: int
    since: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    updates: tuple[float, ...]
    rates: tuple[float, ...]
    distance: float
    held_out: float | None
    seconds: float
    stopped: Stopped
    error: str = ""

    @property
    def by_step(self) -> dict[int, float]:
        """Losses by step."""
        return dict(enumerate(self.losses, self.first))

    @property
    def rows(self) -> dict[int, Taken]:
        """All that was measured, by step."""
        columns = zip(self.losses, self.grad_norms, self.updates, self.rates, strict=True)
        return {step: Taken(step, *row) for step, row in enumerate(columns, self.first)}

    def response(self, base: Baseline) -> Response | None:
        """Measured against a baseline; None where the replay took no step since it was changed."""
        if self.stopped == "error" or self.first + len(self.losses) <= self.since:
            return None
        return measure(
            self.by_step,
            base,
            since=self.since,
            held_out=self.held_out,
            distance=self.distance,
            path=sum(self.updates[max(0, self.since - self.first) :]),
            complete=self.stopped == "end",
        )


class Prefix(NamedTuple):
    """The steps before a cell acts, run once for all that share them; the state after them is held by the subject."""

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    updates: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()


def run_cell(
    subject: Subject,
    cell: Cell,
    *,
    steps: int | None = None,
    stop_early: bool = True,
    at: int | None = None,
    prefix: Prefix | None = None,
    deadline: float = math.inf,
) -> CellResult:
    """Replay with the cell's one change, and leave the workload as it was, to be restored.

    - `steps`: steps from the start; by default to `Subject.full` for a cell that is `full` or may not be stopped
      early, else to `Subject.short`
    - `at`: the state to start from, by default the suspect one. `deadline`: of `time.monotonic()`
    - `prefix`: what was run already up to the cell's first step, at which the subject then holds a state

    A cell that fails comes back with its `error`. Raises RuntimeError when an edit did not put back what it changed,
    since all replays after it would be of something else.
    """
    begin = time.monotonic()
    first = subject.window.start if at is None else at
    since = max(first, first if cell.edit.first_step is None else cell.edit.first_step)
    stop = _stop(subject, cell, first, steps, stop_early=stop_early)
    before = footprint(subject)
    run = subject.run()
    log = _Log(prefix or Prefix())
    watch = _Watch(subject) if stop_early and not cell.full else None
    stopped, error, distance, held_out = "end", "", math.nan, None
    try:
        subject.restore(at)
        start = [p.detach().clone() for p in run.workload.model.parameters()]
        if prefix is not None:
            subject.restore(since)
        else:
            _train(run, first, min(since, stop), log, None, deadline)
        if len(log.losses) == since - first:
            cell.edit.apply(run)
            stopped = _train(run, since, stop, log, watch, deadline)
        else:
            stopped = "budget"
        distance = _distance(start, list(run.workload.model.parameters()))
        if stopped == "end" and subject.whole and stop >= subject.full:
            held_out = _held_out(run)
    except Exception as failed:  # whatever an edit or anybody's model may raise
        stopped, error = "error", f"{type(failed).__name__}: {failed}"
    finally:
        for undo in reversed(run.undo):
            undo()
    check_undone(before, footprint(subject), cell.name)
    return CellResult(
        cell.name, cell.family, first, since, *log.rows(), distance, held_out, time.monotonic() - begin, stopped, error
    )


def run_grid(
    subject: Subject,
    cells: Sequence[Cell],
    *,
    processes: int = 2,
    minutes: float | None = None,
    steps: int | None = None,
    stop_early: bool = True,
) -> Iterator[CellResult]:
    """The results of `cells` as they come in, begun in the order given: put the most informative first.

    - `processes`: workers of one thread each, forked, with a copy of the subject of their own. One that could not put
      back what its cell changed is not asked again. With 1, and where a GPU is there (a forked process cannot use it),
      cells run in this process one after another
    - `minutes`: then no cell begins, and those under way end where they stand; each cell of the list has its result
    - `steps`, `stop_early`: see `run_cell`

    Steps that cells share because they act later only are run once. A worker that dies is a result with an `error`.
    Raises ValueError for processes below 1, minutes not above 0, or two cells of one name.

    Example:
        for result in run_grid(subject, cells, minutes=5):
            print(result.name, result.stopped)
    """
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if processes < 1 or (minutes is not None and minutes <= 0) or twice:
        raise ValueError(
            f"processes={processes}, minutes={minutes}, names used twice: {twice}; give at least 1, more than 0, and "
            "every cell its own name"
        )
    return _grid(subject, cells, processes, minutes, {"steps": steps, "stop_early": stop_early})


def _grid(
    subject: Subject, cells: Sequence[Cell], processes: int, minutes: float | None, settings: dict[str, Any]
) -> Iterator[CellResult]:
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    forked = processes > 1 and can_fork()
    threads = torch.get_num_threads()
    if forked:
        torch.set_num_threads(1)  # as in the workers: a sum may depend on it
    held = set(subject.states)
    try:
        prefixes = _prefixes(subject, cells, deadline)
        jobs = [
            (cell, settings | {"prefix": prefixes.get(_since(subject, cell)), "deadline": deadline}) for cell in cells
        ]
        if forked:

            def work(number: int) -> CellResult:
                return run_cell(subject, jobs[number][0], **jobs[number][1])

            for number, answer in run_forked(work, len(jobs), processes=processes, deadline=deadline):
                yield _lost(subject, jobs[number][0], answer) if isinstance(answer, Lost) else answer
        else:
            for cell, rest in jobs:
                over = time.monotonic() >= deadline
                yield _nothing(subject, cell, "budget") if over else run_cell(subject, cell, **rest)
    finally:
        torch.set_num_threads(threads)
        for step in set(subject.states) - held:
            del subject.states[step]


# ------------------------------------------------------------------------------------------------------- one cell


class _Log:
    """Rows of steps."""

    def __init__(self, prefix: Prefix) -> None:
        self.losses = list(prefix.losses)
        self._grad_norms, self._updates = list(prefix.grad_norms), list(prefix.updates)
        self._rates = list(prefix.rates)

    def add(self, taken: Taken) -> None:
        self.losses.append(taken.loss)
        self._grad_norms.append(taken.grad_norm)
        self._updates.append(taken.update_norm)
        self._rates.append(taken.lr)

    def rows(self) -> Prefix:
        return Prefix(tuple(self.losses), tuple(self._grad_norms), tuple(self._updates), tuple(self._rates))


class _Watch:
    """Says when the answer is clear; the rule stands at the top of this file."""

    def __init__(self, subject: Subject) -> None:
        self._base = subject.baseline
        self._quiet_from = seen_by(subject.window) + min(subject.window.length, LONG)
        rise = (self._base.threshold - self._base.band) / PRESENT_SHARE  # the recorded one, where that was finite
        self._calm = self._base.band + QUIET_SHARE * rise
        self._high = max(HIGH_SHARE * self._base.height, self._base.threshold)
        self._highest, self._down, self._rest, self._broken, self._over = -math.inf, 0, 0, 0, 0

    def verdict(self, step: int, loss: float) -> Stopped | None:
        excess = self._base.excess(loss)
        self._highest = max(self._highest, excess)
        self._broken = self._broken + 1 if math.isinf(excess) else 0
        self._down = self._down + 1 if excess <= DOWN_SHARE * self._highest else 0
        self._rest = self._rest + 1 if excess <= self._base.band else 0
        self._over = self._over + 1 if excess >= self._base.threshold else 0
        over = self._highest >= self._high and self._down >= DOWN
        passed = self._highest >= self._base.threshold and self._rest >= QUIET
        if over or passed or self._broken >= NONFINITE or self._over >= STAYS:
            return "spike"
        if step >= self._quiet_from and self._highest <= self._calm and self._rest >= QUIET:
            return "quiet"
        return None


def _train(run: Run, start: int, stop: int, log: _Log, watch: _Watch | None, deadline: float) -> Stopped:
    if time.monotonic() >= deadline:
        return "budget"
    for taken in take_steps(run, start, stop):
        log.add(taken)
        clear = None if watch is None else watch.verdict(taken.step, taken.loss)
        if clear is not None:
            return clear
        if time.monotonic() >= deadline and taken.step + 1 < stop:
            return "budget"
        start = taken.step + 1
    return "end" if start >= stop else "edit"


def _stop(subject: Subject, cell: Cell, first: int, steps: int | None, *, stop_early: bool) -> int:
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return first + steps if subject.stop is None else min(first + steps, subject.stop)
    return subject.full if cell.full or not stop_early else subject.short


def _since(subject: Subject, cell: Cell) -> int:
    step = cell.edit.first_step
    return subject.window.start if step is None else max(step, subject.window.start)


def _held_out(run: Run) -> float | None:
    read = run.workload.held_out
    if read is None:
        return None
    with untouched(run.workload.model, evaluate=False):
        return read(run.workload.model)


def _distance(start: list[Tensor], end: list[Tensor]) -> float:
    if [p.shape for p in start] != [p.shape for p in end]:
        return math.nan
    return length(
        [p.detach().to(torch.float64) - old.to(torch.float64) for p, old in zip(end, start, strict=True)]
    ).item()


# --------------------------------------------------------------------------------------------------------- a grid


def _prefixes(subject: Subject, cells: Sequence[Cell], deadline: float) -> dict[int, Prefix]:
    """By first step: the shared steps before it, and the state there kept by the subject. One unchanged run makes all
    of them; a step for which only one cell waits costs no more than running it."""
    start = subject.window.start
    wanted = sorted({_since(subject, cell) for cell in cells} - {start})
    if not wanted:
        return {}
    found: dict[int, Prefix] = {}
    run, log, at = subject.run(), _Log(Prefix()), start
    subject.restore()
    for step in wanted:
        if _train(run, at, step, log, None, deadline) != "end":
            break  # out of time: the cells will say so
        subject.keep(step)
        found[step], at = log.rows(), step
    return found


def _lost(subject: Subject, cell: Cell, lost: Lost) -> CellResult:
    return _nothing(subject, cell, "error" if lost.why == "error" else "budget", error=lost.words)


def _nothing(subject: Subject, cell: Cell, stopped: Stopped, *, error: str = "") -> CellResult:
    start = subject.window.start
    since = _since(subject, cell)
    return CellResult(cell.name, cell.family, start, since, *Prefix(), math.nan, None, 0.0, stopped, error)
