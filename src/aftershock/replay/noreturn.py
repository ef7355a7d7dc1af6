"""Until when a spike could have been averted: the step that commits the run to it, and each remedy's last useful step.

    found = point_of_no_return(subject, cells(["lr*0.5", "skip"], subject))
    print(found.words())

Must not import the lab.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from aftershock.replay.cells import cells
from aftershock.replay.edits.data import Skipped
from aftershock.replay.response import measure
from aftershock.replay.run import CONTROL, Cell, Edit, Run, Unchanged
from aftershock.replay.runner import CellResult, run_grid
from aftershock.replay.subject import Subject

PERTURBED = 3
"""Replays with other rounding that must all spike from a step on which the spike is certain."""
MOST_STATES = 8
"""States held at a time for replays that begin in the middle."""
OUT_OF_TIME = "the time was up"


class Turn(NamedTuple):
    """The last step at which an answer is yes, found by bisection, which takes it to turn from yes to no once.

    - `last`: that step; None where the answer is no from the first step on, and where it is not `finished`
    - `low`, `high`: yes at `low` (None: nowhere as yet), no at `high`, or it is the first step not asked about. Where
      it is not finished the last step is in [low, high)
    - `odd`: steps at which the answer does not fit, of those asked in the middle of either side afterwards
    - `asked`: every answer by step; `error`: what kept it from being asked, "" where nothing did
    """

    last: int | None
    low: int | None
    high: int
    finished: bool
    odd: tuple[int, ...]
    asked: dict[int, bool]
    error: str = ""


class NoReturn(NamedTuple):
    """Until when the spike could have been averted; steps are those from which something is otherwise.

    - `committed`: first step from which it comes under each of 3 changes of all weights by 1 ulp, continued unchanged;
      None where even at the onset one of them removes it, and where `perturbed` is not finished
    - `perturbed`: until when one of them does remove it, asked from the snapshot to the onset
    - `remedies`: by cell, until when the spike is removed, asked from the snapshot to the peak
    """

    start: int
    onset: int
    peak: int
    committed: int | None
    perturbed: Turn
    remedies: dict[str, Turn]

    def words(self) -> str:
        """A sentence on the spike and one on each remedy."""
        return " ".join([self._committed(), *(self._remedy(name, turn) for name, turn in self.remedies.items())])

    def _committed(self) -> str:
        turn = self.perturbed
        if not turn.finished:
            low = self.start if turn.low is None else turn.low + 1
            why = turn.error or OUT_OF_TIME
            return f"The step from which the spike is certain was not found ({why}); it is {low} at least."
        if self.committed is None:
            said = f"Up to its onset at step {self.onset} a change of one ulp can remove the spike"
        elif turn.last is None:
            said = f"The spike is certain from the snapshot at step {self.start} on, if nothing is done"
        else:
            said = (
                f"The spike is certain from step {self.committed} on ({self._when(self.committed)}), if nothing is done"
            )
        return f"{said}{_odd(turn)}."

    def _remedy(self, name: str, turn: Turn) -> str:
        if not turn.finished:
            low = self.start if turn.low is None else turn.low
            there = ", if there is one" if turn.low is None else ""
            why = turn.error or OUT_OF_TIME
            return f"The last step from which {name} removes the spike lies in [{low}, {turn.high}){there} ({why})."
        if turn.last is None:
            return f"{name} does not remove the spike, not even from the snapshot at step {self.start}{_odd(turn)}."
        if turn.last == self.peak:
            return f"{name} removes the spike even if it begins at its peak, step {self.peak}{_odd(turn)}."
        by = f"step {turn.last} ({self._when(turn.last)})"
        return f"{name} removes the spike if it begins by {by}, not later{_odd(turn)}."

    def _when(self, step: int) -> str:
        before = self.onset - step
        if before == 0:
            return "its onset"
        return f"{abs(before)} step{'s' if abs(before) > 1 else ''} {'before' if before > 0 else 'after'} its onset"


def point_of_no_return(
    subject: Subject,
    remedies: Sequence[Cell],
    *,
    steps_each: int | None = None,
    deadline: float = math.inf,
    processes: int = 2,
) -> NoReturn:
    """Bisect for the step from which the spike is certain, and for the last one from which each remedy removes it.

    Asked of a step: the recorded steps up to it, then the remedy (or an ulp) from it on. The spike is removed where
    nowhere in that run, its unchanged steps included, the loss rises to half of the recorded height (`Response`), up
    to `Subject.short`: what comes later than that counts as removed. A remedy with a first step of its own acts from
    the later of the two; of batches to leave out only those not yet trained on are left out; one that learns its level
    from the run (clip*2, policy:..) begins to learn at the step.

    - `steps_each`: length of every replay from the snapshot on, by default up to `Subject.short`
    - `deadline`: of `time.monotonic()`; what was not finished then is a range. `processes`: see `run_grid`

    Cost: about log2(steps) + 3 replays a remedy, three times that for the ulps. Memory: up to 8 states beside the
    subject's own, forgotten afterwards. The workload stands at the snapshot afterwards. Raises ValueError when the
    spike does not come back unchanged, steps_each ends before its peak, or two remedies have one name.
    """
    window = subject.window
    names = [cell.name for cell in remedies]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or (steps_each is not None and window.start + steps_each <= window.peak):
        raise ValueError(
            f"remedies named twice: {twice}, steps_each={steps_each}; give each its own name, and more than "
            f"{window.peak - window.start} steps, which end at the peak"
        )
    ulps = cells([f"sham:ulp#{draw}" for draw in range(1, PERTURBED + 1)], subject)
    perturbed = _Search(ulps, range(window.start, window.onset + 1))
    searches = [perturbed, *(_Search([cell], range(window.start, window.peak + 1)) for cell in remedies)]
    asking = _Asking(subject, steps_each, processes, deadline)
    asking.control()
    while time.monotonic() < deadline:
        wanted = [(search, step) for search in searches for step in search.questions()]
        if not wanted:
            break
        asking.ask(wanted)
    subject.restore()
    turn = perturbed.turn()
    certain = window.start if turn.last is None else turn.last + 1
    return NoReturn(
        start=window.start,
        onset=window.onset,
        peak=window.peak,
        committed=certain if turn.finished and certain <= window.onset else None,
        perturbed=turn,
        remedies={name: search.turn() for name, search in zip(names, searches[1:], strict=True)},
    )


# ----------------------------------------------------------------------------------------------------- bisection


class _Search:
    """One bisection over `steps`: is the spike removed when one of `cells` acts from a step on?"""

    def __init__(self, cells: Sequence[Cell], steps: range) -> None:
        self.cells, self._steps = cells, steps
        self._asked: dict[int, bool] = {}
        self._checked: dict[int, bool] = {}
        self._error, self._over = "", False

    def questions(self) -> list[int]:
        """The steps to ask about next; none when all is known."""
        if self._over:
            return []
        if not self._asked:
            return [self._steps.start]
        low, high = self._bracket()
        if low is not None and high - low > 1:
            return [(low + high) // 2]
        return [] if self._checked else self._middles()

    def answer(self, step: int, removed: bool) -> None:
        (self._asked if self._open() else self._checked)[step] = removed

    def give_up(self, error: str) -> None:
        """It cannot be asked any further: out of time, or for the reason given."""
        self._error, self._over = error, True

    def turn(self) -> Turn:
        low, high = self._bracket()
        finished = not self._open()
        odd = tuple(sorted(step for step, removed in self._checked.items() if removed != (step < high)))
        asked = self._asked | self._checked
        return Turn(low if finished else None, low, high, finished, odd, dict(sorted(asked.items())), self._error)

    def _open(self) -> bool:
        low, high = self._bracket()
        return not self._asked or (low is not None and high - low > 1)

    def _bracket(self) -> tuple[int | None, int]:
        """The last step with a yes, and the first with a no or beyond all."""
        low = max((step for step, removed in self._asked.items() if removed), default=None)
        return low, min((step for step, removed in self._asked.items() if not removed), default=self._steps.stop)

    def _middles(self) -> list[int]:
        """In the widest gap between the steps asked, one on the side of yes and one on that of no."""
        _, high = self._bracket()
        yes = sorted(step for step in self._asked if step < high)
        no = [*sorted(step for step in self._asked if step >= high), self._steps.stop]
        gaps = [max(pairwise(side), key=lambda gap: gap[1] - gap[0], default=(0, 0)) for side in (yes, no)]
        return [(a + b) // 2 for a, b in gaps if b - a > 1]


def _odd(turn: Turn) -> str:
    if not turn.odd:
        return ""
    steps = ", ".join(f"{'removed' if turn.asked[step] else 'not removed'} from step {step}" for step in turn.odd)
    return f" (yet {steps}: it does not turn once only)"


# ------------------------------------------------------------------------------------------------------- replays


class _Asking:
    """Runs what the searches want to know, and tells them."""

    def __init__(self, subject: Subject, steps: int | None, processes: int, deadline: float) -> None:
        self._subject, self._steps = subject, steps
        self._processes, self._deadline = processes, deadline
        self._base = subject.baseline

    def control(self) -> None:
        """Raises ValueError when the unchanged replay has no spike."""
        (result,) = self._run([CONTROL])
        if result.stopped != "budget" and not self._spiked(result):
            why = result.error or "its loss does not rise to half of the recorded height"
            raise ValueError(f"the spike does not come back in the unchanged replay ({why}), so nothing can avert it")

    def ask(self, wanted: Sequence[tuple[_Search, int]]) -> None:
        steps = sorted({step for _, step in wanted})
        for i in range(0, len(steps), MOST_STATES):
            some = [(search, step) for search, step in wanted if step in steps[i : i + MOST_STATES]]
            begun = {
                f"{cell.name} from step {step}": _from(cell, step) for search, step in some for cell in search.cells
            }
            results = {result.name: result for result in self._run(list(begun.values()))}
            for search, step in some:
                self._tell(search, step, [results[f"{cell.name} from step {step}"] for cell in search.cells])

    def _tell(self, search: _Search, step: int, results: Sequence[CellResult]) -> None:
        spiked = [self._spiked(result) for result in results]
        unknown = [result for result, spike in zip(results, spiked, strict=True) if not spike and not _ended(result)]
        if any(not spike and _ended(result) for result, spike in zip(results, spiked, strict=True)):
            search.answer(step, True)
        elif unknown:
            search.give_up(unknown[0].error)
        else:
            search.answer(step, False)

    def _spiked(self, result: CellResult) -> bool:
        """Anywhere in the replay, its unchanged steps included."""
        return bool(result.losses) and measure(result.by_step, self._base, since=self._subject.window.start).present

    def _run(self, chosen: Sequence[Cell]) -> list[CellResult]:
        left = self._deadline - time.monotonic()
        minutes = None if math.isinf(left) else max(left, 1e-3) / 60
        return list(run_grid(self._subject, chosen, processes=self._processes, minutes=minutes, steps=self._steps))


def _ended(result: CellResult) -> bool:
    return result.stopped not in ("budget", "error")


class _From(Edit):
    """Another edit, from a step on."""

    def __init__(self, edit: Edit, step: int) -> None:
        self._edit, self._step = edit, step

    @property
    def first_step(self) -> int:
        own = self._edit.first_step
        return self._step if own is None else max(own, self._step)

    def apply(self, run: Run) -> None:
        self._edit.apply(run)


def _from(cell: Cell, step: int) -> Cell:
    """The cell from a step on, with a name of its own."""
    edit = cell.edit
    if isinstance(edit, Skipped):  # for what is trained on already it would leave out later batches instead
        left = tuple(one for one in edit.steps if one >= step)
        edit = dataclasses.replace(edit, steps=left) if left else Unchanged()
    return Cell(name=f"{cell.name} from step {step}", family=cell.family, edit=_From(edit, step))
