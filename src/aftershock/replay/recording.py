"""Trains a workload until it spikes and the spike is over, and keeps what a replay needs.

The spike is found in hindsight: on the loss so far, again and again, until a spike has ended. Must not import the lab:
another rule than this one's can be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aftershock.guard.digest import of_batch
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.state import State, Training
from aftershock.guard.surroundings import surroundings
from aftershock.numerics import median_mad
from aftershock.replay.loop import Taken, take_step
from aftershock.replay.run import Run, StepHook, Window
from aftershock.replay.subject import Subject, copied, full_end
from aftershock.signals.detect.robust import Robust
from aftershock.workload import Workload

MARGIN = 40
"""Steps between snapshot and onset: precursors of fast spikes lead by about 30."""
SLOTS = 16
"""Snapshots held while the spike is not yet known, half a margin apart: the last 320 steps at the default margin."""
WINDOW, DELAY = 50, 16
"""Losses that make the level before an alarm, and how many just before it are left out, since it may begin slowly."""
CALM_SIGMAS, LEAST_SHARE = 3.0, 0.01
LEFT_SHARE = 0.05
REST = 20
HOPELESS = 50
"""Steps trained on after the loss is first not finite: enough to see that it does not come back."""


class Spike(NamedTuple):
    """Steps: first one outside the band, highest one, first one back; `end` is the number of losses while it lasts."""

    onset: int
    peak: int
    end: int


Label = Callable[[Sequence[float]], Sequence[tuple[int, int, int]]]
"""Losses so far, one a step, to the spikes in them as (onset, peak, end)."""


def find_spikes(losses: Sequence[float]) -> list[Spike]:
    """The spikes of a loss curve, oldest first: where `Robust` says "spike" or "nonfinite".

    b and s are median and scaled MAD (at least 0.01 b) of the 50 losses up to 16 steps before the alarm. `onset` is the
    first of the steps in a row above b + 3 s that lead to the alarm, `end` the first of 20 in a row no higher than
    b + max(3 s, 0.05 (peak - b)). From there on the rule starts afresh: what is left of a high spike on its way down is
    its own tail, and no spike begins in the 20 steps that ended one.

    >>> find_spikes([1.0] * 60 + [1.4, 5.0, 2.0] + [1.0] * 60)
    [Spike(onset=60, peak=61, end=63)]
    """
    rule = Robust()
    state, found, step, free = rule.init(), list[Spike](), 0, 0
    while step < len(losses):
        state, verdict = rule.update(state, losses[step])
        step += 1
        spike = follow(losses, step - 1, free) if verdict in ("spike", "nonfinite") else None
        if spike is not None and spike.end > spike.peak:  # else the loss was in the band all the time
            found.append(spike)
            state, step, free = rule.init(), spike.end, spike.end
    return found


def record(
    workload: Workload,
    *,
    steps: int,
    margin: int = MARGIN,
    label: Label = find_spikes,
    nth: int = 0,
    before_step: StepHook | None = None,
    after_backward: StepHook | None = None,
    tail: int | None = None,
    before: Sequence[float] = (),
) -> Subject | None:
    """Train `workload` from where it stands up to step `steps` at most, until a spike has come and gone.

    Keeps the newest snapshot at least `margin` steps before the onset (the oldest there is where the spike came
    sooner), and one at least twice that earlier. Then goes on for `tail` steps, by default as far as a full
    replay does. None when there was no spike. One that never ends, or a loss that stays
    not finite, ends with the recording.

    - `label`: the rule that finds spikes; `nth`: which of them, 0 the first
    - `before_step`, `after_backward`: what happens to the process from outside. A replay does not see it again
    - `before`: the losses so far, one a step, of a workload that stands further on than before step 0

    Memory: `SLOTS` + 2 copies of the state. Raises ValueError for steps or margin below 1.

    Example:
        subject = record(Workload(model=model, optimizer=optimizer, batch=batch, loss=loss), steps=2000)
    """
    if steps < 1 or margin < 1 or nth < 0 or (tail is not None and tail < 0):
        raise ValueError(f"steps={steps}, margin={margin}, nth={nth}, tail={tail}: give at least 1, 1, 0 and 0")
    tape = _Tape(workload, before, margin=margin, before_step=before_step, after_backward=after_backward)
    every, spike = max(1, margin // 2), None
    while len(tape.losses) < steps and not tape.hopeless:
        if len(tape.losses) % every == 0 or len(tape.losses) == len(before):
            tape.take()
            spike = _nth(label(tape.losses), nth)
            if spike is not None and spike.end < len(tape.losses):
                break
            if spike is not None:
                tape.hold(spike.onset)  # it may go on for longer than the ring reaches
        tape.step()
    spike = _nth(label(tape.losses), nth)
    if spike is None:
        return None
    tape.hold(spike.onset)
    last = tape.reach(spike) if tail is None else spike.end + tail
    while len(tape.losses) < min(last, steps) and not tape.hopeless:
        tape.step()
    return tape.subject(spike)


class _Tape:
    """The recording: the loop, the recorder, and the two snapshots that are pinned in it."""

    def __init__(
        self,
        workload: Workload,
        before: Sequence[float],
        *,
        margin: int,
        before_step: StepHook | None,
        after_backward: StepHook | None,
    ) -> None:
        self._workload, self._margin = workload, margin
        self._training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
        self._recorder = FlightRecorder(self._training, slots=SLOTS, every=max(1, margin // 2))
        self._run = Run(workload, self._training, Window(0, 0, 0, 1))
        self._run.before_step += [] if before_step is None else [before_step]
        self._run.after_backward += [] if after_backward is None else [after_backward]
        self._run.batch = self._batch
        self._pinned: list[int] = []
        self.losses = list(before)
        self._rows: list[Taken] = []
        self._digests: dict[int, str] = {}
        self._around = surroundings(self._training.params.values())

    @property
    def hopeless(self) -> bool:
        """Whether the loss has not been finite for long."""
        return len(self.losses) >= HOPELESS and not any(map(math.isfinite, self.losses[-HOPELESS:]))

    def take(self) -> None:
        step = len(self.losses)
        if step not in self._pinned:
            self._recorder.take(step, step)

    def step(self) -> None:
        self._rows.append(take_step(self._run, len(self.losses)))
        self.losses.append(self._rows[-1].loss)

    def hold(self, onset: int) -> None:
        """Pin the suspect snapshot of a spike that begins there, and the earlier one."""
        healthy = self._recorder.healthy
        suspect = _newest(healthy, onset - self._margin)
        if suspect is None:
            suspect = _newest(healthy[:1], onset)
        earlier = None if suspect is None else _newest(healthy, suspect - 2 * self._margin)
        wanted = [step for step in (earlier, suspect) if step is not None]
        if wanted and wanted != self._pinned:
            for step in self._pinned:
                self._recorder.unpin(step)
            for step in wanted:
                self._recorder.pin(step)
            self._pinned = wanted

    def reach(self, spike: Spike) -> int:
        """Where a full replay of the spike ends."""
        return full_end(Window(self._pinned[-1] if self._pinned else 0, *spike))

    def subject(self, spike: Spike) -> Subject | None:
        """What was recorded. None where the spike began with the first step: nothing before it was healthy."""
        states: dict[int, State] = {}
        for step in reversed(self._pinned):  # newest first: going back drops what is later
            self._recorder.restore(step, rng=True)
            states[step] = copied(self._training.read())
        if not states:
            return None
        start = max(states)
        return Subject(
            self._workload,
            states=states,
            recorded=dict(enumerate(self.losses)),
            rows={row.step: row for row in self._rows},
            window=Window(start, spike.onset, spike.peak, spike.end),
            earlier=min(states) if len(states) > 1 else None,
            digests=self._digests,
            around=self._around,
        )

    def _batch(self, index: int) -> object:
        batch = self._workload.batch(index)
        self._digests[index] = of_batch(batch)
        return batch


def _newest(steps: Sequence[int], upto: int) -> int | None:
    return max((step for step in steps if step <= upto), default=None)


def _nth(spikes: Sequence[tuple[int, int, int]], nth: int) -> Spike | None:
    return Spike(*spikes[nth]) if len(spikes) > nth else None


def follow(losses: Sequence[float], alarm: int, first: int) -> Spike:
    """The spike that an alarm is part of, by the rule of `find_spikes`; calm steps before it began at `first`."""
    calm = [x for x in losses[max(first, alarm - WINDOW - DELAY) : max(first, alarm - DELAY)] if math.isfinite(x)]
    calm = calm or [x for x in losses[first:alarm] if math.isfinite(x)]
    level, mad = median_mad(calm) if calm else (math.inf, 0.0)
    band = level + CALM_SIGMAS * max(mad, LEAST_SHARE * abs(level)) if calm else math.inf
    onset = alarm
    while onset > first and not losses[onset - 1] <= band:
        onset -= 1
    peak, rest = alarm, 0
    for step in range(alarm, len(losses)):
        if _height(losses[step]) > _height(losses[peak]):
            peak = step
        left = level + LEFT_SHARE * (losses[peak] - level) if math.isfinite(losses[peak]) else band
        calm_now = math.isfinite(losses[step]) and (losses[step] <= band or losses[step] <= left)
        rest = rest + 1 if calm_now else 0
        if rest == REST:
            return Spike(onset, peak, step - REST + 1)
    return Spike(onset, peak, len(losses))


def _height(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
