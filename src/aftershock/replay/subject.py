"""The subject of a replay: a live workload, snapshots of it from before a spike, and what was recorded of the spike.

`recording.record` trains a workload until it spikes and gives its subject; `Subject.from_incident` makes one of a
guard's incident folder. Must not import the lab, nor the runner: it goes back, it does not go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aftershock.guard.state import State, Training
from aftershock.guard.surroundings import differences, surroundings
from aftershock.replay.loop import Taken
from aftershock.replay.response import Baseline, baseline
from aftershock.replay.run import Run, Window
from aftershock.workload import Workload

__all__ = ["Subject", "Window", "copied", "full_end"]

LONG = 60
"""Steps after its peak by which a spike that does not end has been seen for long enough."""
LATER = 10
"""Spike lengths after the end, at which the last of a replay's answers is read (open question 1 of the survey)."""


class Subject:
    """A spike that can be run again.

    - `states`: copies of the state by step, on the host; `window.start` is the suspect one, the newest far enough
      before the onset; `earlier` a healthy one from well before it, None where none was kept
    - `recorded`: losses by step as recorded, from before the snapshot on where they are known
    - `rows`: gradient norm, length of the update and rate of those steps, as far as they were recorded
    - `indices`: batch index by step, where it is not the step itself. Steps past the last go on one by one
    - `batch`: the batch of an index, by default the workload's
    - `stop`: first step that cannot be replayed, since its batch is not to be had; None where there is no end
    - `digests`: of the recorded batches by step, see `guard.digest.of_batch`
    - `around`: `surroundings` of the recording; what differs now is in `changes`
    - `notes`: what a reader of the results must know

    Raises ValueError where the window and the states do not belong together.

    Example:
        subject = record(workload, steps=1000)
        subject.restore()
    """

    def __init__(
        self,
        workload: Workload,
        *,
        states: Mapping[int, State],
        recorded: Mapping[int, float],
        window: Window,
        rows: Mapping[int, Taken] | None = None,
        earlier: int | None = None,
        indices: Mapping[int, int] | None = None,
        batch: Callable[[int], Any] | None = None,
        stop: int | None = None,
        digests: Mapping[int, str] | None = None,
        around: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
        rng: bool = True,
    ) -> None:
        if not window.start <= window.onset <= window.peak < window.end:
            raise ValueError(f"{window} is in no order; it must hold start <= onset <= peak < end")
        if window.start not in states or (earlier is not None and earlier not in states):
            raise ValueError(f"{window} and earlier={earlier} need states of these steps, there are {sorted(states)}")
        if stop is not None and stop <= window.onset:
            raise ValueError(
                f"batches are to be had up to step {stop - 1} only and the spike begins at step {window.onset}: "
                "nothing of it can be replayed; give a workload whose batch(i) has the later ones"
            )
        self.workload = workload
        self.training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
        self.window = window
        self.earlier = earlier
        self.states = dict(states)
        self.recorded = dict(recorded)
        self.rows = dict(rows or {})
        self.digests = dict(digests or {})
        self.stop = stop
        self.notes = notes
        self._indices = dict(indices or {})
        self._batch = workload.batch if batch is None else batch
        self._around = None if around is None else dict(around)
        self._rng = rng

    @staticmethod
    def from_incident(
        folder: str | Path,
        workload: Workload,
        *,
        fingerprint: Mapping[str, Any] | None = None,
        snapshot: str | Path | None = None,
        anyway: bool = False,
    ) -> Subject:
        """The subject of one of a guard's incident folders; `workload` as it was built for the recorded run.

        - `fingerprint`: what `guard.incident.fingerprint` gives now for what it was given then; where it was given the
          workload it is taken anew by itself
        - `snapshot`: the folder of another snapshot of the run, where the incident has none
        - `anyway`: go on although code or config have changed. The controls tell whether the spike still comes back

        Where the guard stepped in, the record ends there, and the rest of the spike is found by an unchanged replay.
        Raises ValueError, with what can still be done, when there is no usable snapshot, code or config have changed,
        or no batch of the spike is to be had. What only may matter (threads, device) is in `notes`.
        """
        from aftershock.replay.reading import read_subject

        return read_subject(
            Path(folder), workload, fingerprint=fingerprint, snapshot=snapshot, anyway=anyway, make=Subject
        )

    # ---- going back

    def restore(self, at: int | None = None) -> None:
        """The workload as it was before step `at`, by default the suspect snapshot's: weights, buffers, optimizer,
        schedule and random numbers, bit for bit; no gradients. Raises ValueError for a step that is not held."""
        step = self.window.start if at is None else at
        if step not in self.states:
            raise ValueError(f"no state of step {step} is held; there are {sorted(self.states)}")
        self.training.restore(self.states[step], rng=self._rng)
        self.workload.optimizer.zero_grad(set_to_none=True)
        self.workload.model.zero_grad(set_to_none=True)

    def keep(self, step: int) -> None:
        """Copy the state as it is now, the workload standing before `step`."""
        self.states[step] = copied(self.training.read())

    def run(self) -> Run:
        """A new run of the recorded steps with nothing changed; restore first."""
        run = Run(self.workload, self.training, self.window)
        run.index_of, run.batch = self.index_of, self._batch
        return run

    def index_of(self, step: int) -> int:
        """The batch index of a loop step."""
        if not self._indices or step in self._indices:
            return self._indices.get(step, step)
        last = max(self._indices)
        return self._indices[last] + step - last if step > last else step

    def batch(self, step: int) -> Any:
        """The batch that was trained on at a loop step."""
        return self._batch(self.index_of(step))

    # ---- what is known

    @property
    def baseline(self) -> Baseline:
        """Level and band of the calm loss before the onset, and the recorded height."""
        return baseline(self.recorded, self.window)

    @property
    def suspect(self) -> int:
        """The step that replays start from."""
        return self.window.start

    @property
    def short(self) -> int:
        """Where a replay ends that waits for the spike only: as many steps after it as lie between snapshot and its
        end, so that one which comes up to twice as late is still seen. Of a spike that stays for long only the first
        `LONG` steps after the peak are waited for."""
        return self._within(short_end(self.window))

    @property
    def full(self) -> int:
        """Where a replay of full length ends: `LATER` spike lengths after the spike, and no sooner than `short`."""
        return self._within(full_end(self.window))

    @property
    def whole(self) -> bool:
        """Whether a full replay reaches as far as it should: its batches are to be had."""
        return self.full == full_end(self.window)

    @property
    def threads(self) -> int | None:
        """Threads of the recording, None where that is not known."""
        return None if self._around is None else self._around.get("threads")

    @property
    def changes(self) -> tuple[str, ...]:
        """How device, threads, versions and switches differ now from the recording, in words."""
        if self._around is None:
            return ()
        return differences(self._around, surroundings(self.training.params.values()))

    def _within(self, step: int) -> int:
        return step if self.stop is None else min(step, self.stop)


def seen_by(window: Window) -> int:
    """The step by which the recorded spike has shown itself: its end, or `LONG` steps after its peak."""
    return min(window.end, window.peak + LONG)


def short_end(window: Window) -> int:
    """See `Subject.short`."""
    end = seen_by(window)
    return end + max(end - window.start, 2 * min(window.length, LONG))


def full_end(window: Window) -> int:
    """See `Subject.full`."""
    return max(window.end + LATER * window.length, short_end(window))


def copied(state: State) -> State:
    """`state` with tensors of its own on the host."""
    return State({name: tensor.detach().cpu().clone() for name, tensor in state.tensors.items()}, state.plain)
