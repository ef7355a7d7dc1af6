"""Explains a spike: controls, shams and cells, what they answer, where it began, until when it could be averted.

    explanation = replay("guard/incidents/0001", workload, minutes=5)
    print(explanation.verdict.words)

Must not import the lab: whoever has a workload can ask.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from aftershock.replay.candidates import candidates
from aftershock.replay.cells import grid
from aftershock.replay.controls import Controls, control_cells, judge_controls
from aftershock.replay.edits.rows import Guilty, guilty_rows
from aftershock.replay.localise import Places, localise
from aftershock.replay.noreturn import NoReturn, point_of_no_return
from aftershock.replay.remedies import Remedy, remedies
from aftershock.replay.response import Baseline, Effect, Response, effect
from aftershock.replay.run import Cell, Window
from aftershock.replay.runner import CellResult, Stopped, run_cell, run_grid
from aftershock.replay.subject import Subject
from aftershock.replay.symptoms import Symptoms, symptoms
from aftershock.replay.thinking import Thinking, thinking
from aftershock.replay.verdict import Verdict, answers, judge, judge_struck, zero_line
from aftershock.workload import Workload

Part = Literal["places", "no_return", "thinking", "rows"]
PARTS: tuple[Part, ...] = ("places", "no_return", "thinking", "rows")
"""What is asked beside the grid, in this order."""
GRID_SHARE = 0.6
"""Of a budget of minutes, what controls and grid may use; the parts share the rest."""
MOST_REMEDIES = 3
"""Remedies whose last useful step is looked for."""
Progress = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and how much there is."""
FoundT = TypeVar("FoundT")


class Asked(NamedTuple):
    """One cell as it answered. `response` and `effect` (against the shams) are None where it did not run."""

    name: str
    family: str
    response: Response | None
    effect: Effect | None
    stopped: Stopped
    error: str
    seconds: float


class Explanation(NamedTuple):
    """Everything that was found. A part that was not asked for, or not reached, is None; `notes` say why.

    - `recorded`: losses by step; `curves`: those of the replays, by cell
    - `left_out`: cells that mean nothing for this workload, and why
    - `places`: where it began; `no_return`: until when it could be averted; `thinking`: what the model predicted
      meanwhile; `guilty`: the smallest set of rows without which it does not come
    """

    window: Window
    baseline: Baseline
    recorded: dict[int, float]
    controls: Controls
    symptoms: Symptoms
    cells: tuple[Asked, ...]
    curves: dict[str, dict[int, float]]
    left_out: dict[str, str]
    verdict: Verdict
    remedies: tuple[Remedy, ...]
    places: Places | None
    no_return: NoReturn | None
    thinking: Thinking | None
    guilty: Guilty | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def words(self) -> str:
        """The verdict, the smallest change that helps, and the policy to go on with."""
        said = [self.verdict.words]
        if self.remedies:
            first = self.remedies[0]
            said.append(f"Smallest change that removes it: {first.words}. To go on: {first.policy}.")
        elif self.verdict.kind in ("decided", "undecided") and self.controls.came_back:
            said.append("No change that was tried removes it.")
        return "\n".join(said)


def replay(
    incident: str | Path | Subject,
    workload: Workload | None = None,
    *,
    cells: Sequence[str] = (),
    most: int = 40,
    minutes: float | None = None,
    processes: int = 2,
    parts: Sequence[Part] = PARTS,
    decode: Callable[[Sequence[int]], str] | None = None,
    on_progress: Progress | None = None,
    **reading: Any,
) -> Explanation:
    """Explain an incident of a guard, or a `Subject` that `recording.record` gave.

    - `workload`: as it was built for the recorded run; needed with a folder. `reading`: as for `Subject.from_incident`
    - `cells`: names of what to try, by default the `most` most informative that mean something for the workload
    - `minutes`: what is not reached by then is left out, the least informative first
    - `parts`: what to ask beside the grid; `decode`: tokens' ids to text

    Raises ValueError, with what can still be done, for an incident that cannot be replayed and an unknown cell or part.

    Example:
        replay("guard/incidents/0001", workload).words
    """
    wrong = [part for part in parts if part not in PARTS]
    if wrong:
        raise ValueError(f"unknown part {wrong[0]!r}; there are {', '.join(PARTS)}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    if isinstance(incident, Subject):
        subject = incident
    elif workload is None:
        raise ValueError(f"{incident} is replayed with its workload: build model, optimizer and batches as the run did")
    else:
        subject = Subject.from_incident(incident, workload, **reading)
    return _Explaining(subject, minutes, processes, decode, on_progress).all(cells, most, parts)


class _Explaining:
    """One explanation under way."""

    def __init__(
        self,
        subject: Subject,
        minutes: float | None,
        processes: int,
        decode: Callable[[Sequence[int]], str] | None,
        on_progress: Progress | None,
    ) -> None:
        self._subject, self._processes, self._decode = subject, processes, decode
        self._report = on_progress or (lambda what, done, total: None)
        self._began = time.monotonic()
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._notes = list(subject.notes)

    def all(self, names: Sequence[str], most: int, parts: Sequence[Part]) -> Explanation:
        subject, base = self._subject, self._subject.baseline
        chosen = grid(subject, names or None)
        wanted = chosen.cells[1 : most + 1]  # the controls are run anyway
        controls = judge_controls(subject, self._grid("controls", control_cells()))
        seen = symptoms(subject, controls.results[0].rows)
        results: list[CellResult] = []
        if controls.came_back:
            results = self._grid("cells", wanted)
        subject.restore()  # a cell that ran in this process has left settings of its own
        answered = {r.name: r.response(base) for r in results}
        responses = {name: response for name, response in answered.items() if response is not None}
        shams = [responses[r.name] for r in results if r.family == "sham" and r.name in responses]
        verdict = self._judge(controls, seen, responses, chosen.left_out, shams, results)
        curves = {r.name: r.by_step for r in [*controls.results, *results]}
        found = remedies(
            responses,
            curves,
            {r.name: r.since for r in results},
            shams=shams,
            control=controls.results[0].by_step,
            base=base,
            eps=float(subject.workload.optimizer.param_groups[0].get("eps", math.nan)),
        )
        asked = tuple(_asked(r, responses.get(r.name), shams) for r in results)
        extra = parts if controls.came_back else ()
        return Explanation(
            window=subject.window,
            baseline=base,
            recorded=subject.recorded,
            controls=controls,
            symptoms=seen,
            cells=asked,
            curves=curves,
            left_out=chosen.left_out,
            verdict=verdict,
            remedies=tuple(found),
            places=self._part("places", extra, self._places),
            no_return=self._part("no_return", extra, lambda: self._no_return(found)),
            thinking=self._part("thinking", extra, self._thinking),
            guilty=self._part("rows", extra, lambda: self._rows(responses)),
            notes=tuple(self._notes),
            seconds=time.monotonic() - self._began,
        )

    # ---- the grid

    def _grid(self, what: str, cells: Sequence[Cell]) -> list[CellResult]:
        left = GRID_SHARE * self._seconds - (time.monotonic() - self._began)
        minutes = None if math.isinf(left) else max(left, 1e-6) / 60
        found: list[CellResult] = []
        for result in run_grid(self._subject, cells, processes=self._processes, minutes=minutes):
            found.append(result)
            self._report(what, len(found), len(cells))
        missed = [r.name for r in found if r.stopped == "budget"]
        if missed:
            self._notes.append(f"not reached in time: {', '.join(missed)}")
        failed = [f"{r.name} ({r.error})" for r in found if r.stopped == "error"]
        if failed:
            self._notes.append(f"failed: {'; '.join(failed)}")
        order = {cell.name: i for i, cell in enumerate(cells)}
        return sorted(found, key=lambda result: order[result.name])

    def _judge(
        self,
        controls: Controls,
        seen: Symptoms,
        responses: dict[str, Response],
        left_out: dict[str, str],
        shams: Sequence[Response],
        results: Sequence[CellResult],
    ) -> Verdict:
        if not controls.came_back:
            return judge_struck(controls, seen)
        ran = {result.name for result in results if result.stopped not in ("budget", "error")}
        possible = [name for name in candidates(self._subject) if name not in ran and name not in left_out]
        given = answers(self._subject, responses, left_out, seen)
        return judge(given, zero=zero_line(shams), possible=possible)

    # ---- the parts

    def _part(self, part: Part, wanted: Sequence[Part], ask: Callable[[], FoundT]) -> FoundT | None:
        """What was found, or None with a note: a part that cannot be had does not cost the verdict."""
        if part not in wanted:
            return None
        if time.monotonic() >= self._deadline(part):
            self._notes.append(f"{part}: not reached in time")
            return None
        self._report(part, 0, 1)
        try:
            return ask()
        except ValueError as error:
            self._notes.append(f"{part}: {error}")
            return None
        finally:
            self._report(part, 1, 1)

    def _deadline(self, part: Part) -> float:
        """The parts' end of the budget is shared evenly; what one leaves the next may use."""
        ends = GRID_SHARE + (1 - GRID_SHARE) * (PARTS.index(part) + 1) / len(PARTS)
        return self._began + ends * self._seconds

    def _places(self) -> Places:
        return localise(self._subject, processes=self._processes, deadline=self._deadline("places"))

    def _no_return(self, found: Sequence[Remedy]) -> NoReturn:
        cells = [one.cell for one in found[:MOST_REMEDIES]]
        return point_of_no_return(
            self._subject,
            grid(self._subject, cells).cells[1:],
            processes=self._processes,
            deadline=self._deadline("no_return"),
        )

    def _thinking(self) -> Thinking:
        return thinking(self._subject, decode=self._decode, deadline=self._deadline("thinking"))

    def _rows(self, responses: dict[str, Response]) -> Guilty | None:
        data = [responses[name] for name in ("skip", "replace", "replace:before") if name in responses]
        if not any(not response.present for response in data):
            raise ValueError("no rows were looked for, since the spike comes without the suspect batches too")
        deadline, base = self._deadline("rows"), self._subject.baseline

        def spikes(cell: Cell) -> bool:
            if time.monotonic() >= deadline:
                raise ValueError("the time was up before the smallest set of guilty rows was found")
            response = run_cell(self._subject, cell).response(base)
            if response is None:
                raise ValueError("a replay without some rows took no step")
            return response.present

        return guilty_rows(self._subject, spikes)


def _asked(result: CellResult, response: Response | None, shams: Sequence[Response]) -> Asked:
    against = effect([response], shams) if response is not None and shams else None
    return Asked(result.name, result.family, response, against, result.stopped, result.error, result.seconds)
