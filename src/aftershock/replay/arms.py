"""Push through a spike, or go back? One subject's arms: the same steps from its snapshot, with one decision otherwise.

    result = compare_arms(subject)
    math.log(result.arms["push"].loss / result.arms["skip"].loss)

`paired` sums such differences up over many spikes. Must not import the lab.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from aftershock.replay.cells import cell
from aftershock.replay.edits.data import Skipped, suspects
from aftershock.replay.edits.rates import ScaledRate
from aftershock.replay.edits.shams import random_skip
from aftershock.replay.loop import parts
from aftershock.replay.paired import Arm
from aftershock.replay.recording import REST, Label, find_spikes
from aftershock.replay.run import Cell, Edit, Run, Unchanged, Window
from aftershock.replay.runner import CellResult, run_cell
from aftershock.replay.subject import LATER, Subject, short_end
from aftershock.signals.untouched import untouched

ARMS = ("push", "skip", "sham_skip", "half", "never")
READINGS, MOST_EVERY = 16, 5
"""The loss at the end is the median of so many readings, at most so many steps apart, in the last fifth of the steps
after the spike: from step to step it moves by several percent, and one reading tells the step it fell on."""
BEFORE = 200
"""Recorded steps before the snapshot from which a later spike's baseline may be made."""
_SHAM_SEED = 7919


class Cure(NamedTuple):
    """What kept the spike away in the arm `never`: the edit of that cell, in the steps from `first` up to `end`."""

    cell: str
    first: int
    end: int


class ArmsResult(NamedTuple):
    """All arms of one spike, up to step `last`.

    - `arms`: by name, see `compare_arms`; those that could not be had are in `left_out`, with the reason
    - `readings`: after how many steps of the loop the loss was read, the same for all arms
    - `held_out`: whether `Arm.loss` is that of held-out data. Else it is that of the last recorded training batches
    - `cure`: what kept the spike away in the arm `never`; None where nothing did
    """

    window: Window
    last: int
    readings: tuple[int, ...]
    held_out: bool
    arms: dict[str, Arm]
    cure: Cure | None
    left_out: dict[str, str]
    seconds: float


REMEDIES = ("lr*0.5", "eps*1e3", "clip", "float64:loss")
"""Cells by which the arm `never` may keep the spike away, in the order in which they are tried. "clip" is to the median
gradient norm of the calm steps before the suspects, or the workload's own clip where that is lower."""


class Within(Edit):
    """An edit that acts from step `first`, by default the snapshot, and is taken back before step `end`.

    For edits that change attributes of the run, settings of the optimizer's groups, or what they put back in
    `run.undo`; what an edit has done to weights or moments stays.

    Example:
        Within(ScaledRate(factor=0.5), end=subject.window.end)
    """

    def __init__(self, edit: Edit, *, end: int, first: int | None = None) -> None:
        if edit.first_step is not None:
            raise ValueError(f"{type(edit).__name__} has steps of its own; give an edit that acts from its start on")
        self._edit, self._first, self._end = edit, first, end

    @property
    def first_step(self) -> int | None:
        return self._first

    def apply(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        attributes = {key: list(v) if isinstance(v, list) else v for key, v in vars(run).items()}
        self._edit.apply(run)
        changed = [
            (group, key, old[key])
            for group, old in zip(groups, settings, strict=True)
            for key in old
            if group[key] is not old[key]
        ]

        def take_back(step: int) -> None:
            if step != self._end - 1:
                return
            for undo in reversed(run.undo[len(attributes["undo"]) :]):
                undo()
            for group, key, old in changed:
                group[key] = old
            step_now, part = run.step, run.part
            vars(run).update(attributes)  # lists anew: the one that calls this must not change under its loop
            run.step, run.part = step_now, part

        run.after_step = [take_back, *run.after_step]  # first, so that of two the last one applied goes first


def compare_arms(subject: Subject, *, later: int = LATER, label: Label = find_spikes) -> ArmsResult:
    """Train each arm from the snapshot to `later` spike lengths after the spike, and read it there.

    All take the same number of accepted steps, so the same number of tokens; what was trained on and thrown away by
    going back is not counted. The end is no sooner than `Subject.short`.

    - `push`: nothing is otherwise
    - `skip`: the batches from two steps before the onset to the spike's end are left out (`edits.data.Skipped`); the
      arm trains on as many later ones
    - `sham_skip`: as many random others are: of the calm steps before the suspects at most half, the rest after the end
    - `half`: half the rate from the snapshot to the spike's end, then the schedule's
    - `never`: the spike does not come. One of `REMEDIES` is applied, and the first that removes the spike is taken, in
      this order: from two steps before the onset to the spike's end, so that up to there the run is the recorded one
      bit for bit; from the snapshot to the spike's end; and where a remedy taken back at the end only delays the
      spike, kept to the end of the arm, from two steps before the onset, or else from the snapshot. Removed means:
      before `Subject.short` no loss rises by half of the recorded rise, and no spike by `label` begins. So up to there
      this arm has no `again` by choice, and no hazard to compare with the others'; and what a cure that is kept does
      to the calm steps is part of its loss: see `ArmsResult.cure`

    `label` finds spikes in losses, for `again` and `never`. Where the subject's batches end too soon (`stop`), all arms
    end sooner. Random numbers go back with the snapshot.

    Raises ValueError for `later` below 1, where an unchanged replay does not have the spike, and where the batches end
    before there is something to read.

    Example:
        arms = compare_arms(subject).arms
        arms["push"].loss < arms["never"].loss
    """
    if later < 1:
        raise ValueError(f"later must be at least 1 spike length, got {later}")
    began = time.monotonic()
    bench = _Bench(subject, later=later, label=label)
    try:
        push = bench.run("push", Unchanged())
    except _NoArm as failed:
        raise ValueError(f"the unchanged steps cannot be trained: {failed}") from None
    if not bench.arms["push"].spiked:
        raise ValueError(
            f"unchanged steps {subject.window.start} to {subject.window.end - 1} do not have the spike again: there is "
            "nothing to push through; see replay.controls"
        )
    window, num_skipped = subject.window, len(suspects(subject.window))
    bench.try_run("skip", lambda: Skipped(steps=tuple(suspects(window)), stop=subject.stop))
    bench.try_run("sham_skip", lambda: _sham(window, num_skipped, bench.last, subject.stop))
    bench.try_run("half", lambda: Within(ScaledRate(factor=0.5), end=window.end))
    clip = subject.workload.clip_norm
    cure = _never(bench, subject, min(_usual_norm(push, window), math.inf if clip is None else clip))
    return ArmsResult(
        window=window,
        last=bench.last,
        readings=bench.readings,
        held_out=subject.workload.held_out is not None,
        arms={name: bench.arms[name] for name in ARMS if name in bench.arms},
        cure=cure,
        left_out=bench.left_out,
        seconds=time.monotonic() - began,
    )


# ------------------------------------------------------------------------------------------------------ one arm


class _NoArm(Exception):
    """An arm that could not be had, in words."""


class _Spiked(_NoArm):
    """One that spiked and should not have; `step`: where it was seen."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __str__(self) -> str:
        return "it spikes all the same"


class _Bench:
    """Where the arms of one subject are run, and what came of them."""

    def __init__(self, subject: Subject, *, later: int, label: Label) -> None:
        window = subject.window
        wanted = max(window.end + later * window.length, short_end(window))
        room = math.inf if subject.stop is None else subject.stop - len(suspects(window))
        self.last = int(min(wanted, room))
        self.short = min(short_end(window), self.last)
        every = max(1, min(MOST_EVERY, (self.last - window.end) // (5 * READINGS)))
        if self.last - window.end < READINGS:
            raise ValueError(
                f"batches are to be had up to step {self.last - 1} for an arm that skips, and the spike ends at "
                f"{window.end}: {READINGS} steps must follow; give a workload whose batch(i) has later ones"
            )
        self.window = window
        self.readings = tuple(range(self.last - every * (READINGS - 1), self.last + 1, every))
        self.arms: dict[str, Arm] = {}
        self.left_out: dict[str, str] = {}
        self._subject, self._label, self._base = subject, label, subject.baseline

    def run(self, name: str, edit: Edit, *, unless_spiked: bool = False) -> CellResult:
        """Run an arm and keep it; `_NoArm` where it failed, with `unless_spiked` `_Spiked` at the spike."""
        values: list[float] = []
        keep_going = self._quiet if unless_spiked else None
        read = _Read(edit, lambda step: self._read(step, values), keep_going)
        start, end = self.window.start, self.window.end
        one = Cell(name=name, family="arm", edit=read)
        found = run_cell(self._subject, one, steps=self.last - start, stop_early=False)
        if found.error:
            raise _NoArm(found.error.removeprefix("ValueError: "))
        spikes = self._spikes(found)
        if unless_spiked and (found.stopped == "edit" or any(onset < self.short for onset in spikes)):
            raise _Spiked(start + len(found.losses) - 1)
        assert len(found.losses) == self.last - start, name
        highest = max(map(self._base.excess, found.losses[: end - start]))
        self.arms[name] = Arm(
            steps=len(found.losses),
            spiked=highest >= self._base.threshold or any(onset < end for onset in spikes),
            again=min((onset for onset in spikes if onset >= end), default=None),
            loss=_median(values),
            training=_median(found.losses[-READINGS:]),
            distance=found.distance,
        )
        return found

    def try_run(self, name: str, make: Callable[[], Edit]) -> None:
        """Run an arm, or keep the reason why there is none."""
        try:
            self.run(name, make())
        except (_NoArm, ValueError) as reason:
            self.left_out[name] = str(reason)

    def _quiet(self, step: int, loss: float) -> bool:
        return step >= self.short or self._base.excess(loss) < self._base.threshold

    def _spikes(self, found: CellResult) -> list[int]:
        """Onsets of the spikes in an arm's own steps, by the rule, with what was recorded before them."""
        first = start = found.first
        while first - 1 in self._subject.recorded and start - first < BEFORE:
            first -= 1
        curve = [self._subject.recorded[step] for step in range(first, start)] + list(found.losses)
        onsets, over = list[int](), -REST
        for onset, _, end in self._label(curve):
            if onset - over >= REST:  # else it is the one before, on its way down
                onsets.append(first + onset)
            over = max(over, end)
        return [onset for onset in onsets if onset >= start]

    def _read(self, step: int, values: list[float]) -> None:
        """After the loop's step: a reading, if it is time for one."""
        if step + 1 not in self.readings:
            return
        workload = self._subject.workload
        if workload.held_out is not None:
            with untouched(workload.model, evaluate=False):
                values.append(float(workload.held_out(workload.model)))
        elif step + 1 == self.last:
            with untouched(workload.model, evaluate=True), torch.no_grad():
                values += [self._training_loss(step + 1 - back) for back in range(READINGS, 0, -1)]

    def _training_loss(self, step: int) -> float:
        """Of the batch recorded at a step, with the weights as they are now."""
        workload, index = self._subject.workload, self._subject.index_of(step)
        pieces: list[Any] = parts(workload, self._subject.batch(step), index)
        return statistics.fmean(float(workload.loss(workload.model, piece)) for piece in pieces)


class _Read(Edit):
    """An edit, and beside it the readings and the end of the arm."""

    def __init__(
        self, edit: Edit, read: Callable[[int], None], keep_going: Callable[[int, float], bool] | None
    ) -> None:
        self._edit, self._reader, self._keep_going = edit, read, keep_going

    @property
    def first_step(self) -> int | None:
        return self._edit.first_step

    def apply(self, run: Run) -> None:
        run.after_step.append(self._reader)
        if self._keep_going is not None:
            run.keep_going = self._keep_going
        self._edit.apply(run)


def _never(bench: _Bench, subject: Subject, norm: float) -> Cure | None:
    """Run the arm without the spike; what it was kept away by."""
    window, names = bench.window, [f"clip={norm!r}" if name == "clip" else name for name in REMEDIES]
    waiting = [Cure(name, first, window.end) for first in (suspects(window).start, window.start) for name in names]
    reasons: list[str] = []
    while waiting:
        cure = waiting.pop(0)
        try:
            edit = Within(cell(cure.cell, subject).edit, first=cure.first, end=cure.end)
            bench.run("never", edit, unless_spiked=True)
        except (_NoArm, ValueError) as reason:
            reasons.append(f"{cure.cell} in steps {cure.first} to {cure.end - 1}: {reason}")
            # kept, it would do the same up to the window's end; one that let the spike come before needs no second try
            if cure.end == window.end and isinstance(reason, _Spiked) and reason.step >= window.end:
                waiting.append(cure._replace(end=bench.last))
            continue
        return cure
    bench.left_out["never"] = "; ".join(reasons)
    return None


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if all(map(math.isfinite, values)) else math.inf


def _usual_norm(push: CellResult, window: Window) -> float:
    """Median gradient norm of the calm steps before the suspects, nan where there are none."""
    norms = [norm for norm in push.grad_norms[: suspects(window).start - window.start] if math.isfinite(norm)]
    return statistics.median(norms) if norms else math.nan


def _sham(window: Window, count: int, last: int, stop: int | None) -> Skipped:
    """`count` steps left out, none of them suspect."""
    before = random_skip(window, draw=1, stop=stop).steps
    order = torch.randperm(last - window.end, generator=torch.Generator().manual_seed(_SHAM_SEED)).tolist()
    after = [window.end + i for i in order[: count - len(before)]]
    return Skipped(steps=tuple(sorted((*before, *after))), stop=stop)


__all__ = ["ARMS", "REMEDIES", "Arm", "ArmsResult", "Cure", "Within", "compare_arms"]
