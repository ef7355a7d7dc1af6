"""From a guard's incident folder to the subject of a replay: which of the recording can be had again, and what cannot.

Refuses, in a sentence that says what can still be done, where a replay would be of something else than was recorded.
Must not import the lab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aftershock.guard.digest import of_batch
from aftershock.guard.disk import load_snapshot
from aftershock.guard.incidentrecord import Incident, Row, read_incident
from aftershock.guard.state import State, Training
from aftershock.guard.surroundings import differences
from aftershock.guard.surroundings import fingerprint as fingerprint_of
from aftershock.replay.loop import Taken, take_steps
from aftershock.replay.recording import Spike, find_spikes
from aftershock.replay.run import Window
from aftershock.workload import Workload

if TYPE_CHECKING:
    from aftershock.replay.subject import Subject

STEPPED_IN = frozenset({"skip", "scale_lr", "rewind", "stop", "policy"})
"""Events after which the run is no longer what it would have been by itself."""
SEARCH = 10
"""An unchanged replay looks for the end of the spike over this many times the steps from snapshot to alarm."""
LEAST_SEARCH = 300


class Recorded(NamedTuple):
    """`losses`, `rows` and batch ids by step, from well before the snapshot up to the first that the guard touched."""

    losses: dict[int, float]
    ids: dict[int, int]
    rows: dict[int, Taken]


def read_subject(
    folder: Path,
    workload: Workload,
    *,
    fingerprint: Mapping[str, Any] | None,
    snapshot: str | Path | None,
    anyway: bool,
    make: Callable[..., Subject],
) -> Subject:
    """See `Subject.from_incident`."""
    incident = read_incident(folder)
    notes = list(_check_code(incident, workload, fingerprint, anyway=anyway))
    step, batch_id, state, rng = _state(incident, workload, snapshot, notes)
    recorded = _recorded(incident, step, batch_id)
    batches = _Batches(incident, workload, recorded, step, notes)
    onset = max(incident.onset.step, step)
    alarm = max([onset, *(s for s in recorded.losses if s >= step)])
    stop = batches.stop(step, alarm)

    def build(window: Window, losses: Mapping[int, float], said: list[str]) -> Subject:
        subject = make(
            workload,
            states={step: state},
            recorded=losses,
            rows=recorded.rows,
            window=window,
            indices=batches.indices,
            batch=batches.batch,
            stop=stop,
            digests=batches.digests,
            around=incident.surroundings,
            notes=tuple(said),
            rng=rng,
        )
        changes = subject.changes
        if changes:
            subject.notes += (f"not as recorded, so the last bits of a loss may differ: {'; '.join(changes)}",)
        return subject

    window, whole = _window(incident, recorded, step, onset)
    if whole:
        return build(window, recorded.losses, notes)
    notes.append(f"the record ends at step {alarm}, where the guard stepped in or the run ended")
    return _found(build, window, recorded, alarm, notes)


# ---------------------------------------------------------------------------------------------- code and snapshot


def _check_code(
    incident: Incident, workload: Workload, given: Mapping[str, Any] | None, *, anyway: bool
) -> tuple[str, ...]:
    """Notes on code and config. Raises ValueError where they have changed, unless `anyway`."""
    then = incident.fingerprint
    if not then:
        return ("the recording has no fingerprint: nothing tells whether code or config have changed since",)
    now = given
    if now is None:
        now = fingerprint_of(workload)
        if then.get("code", {}).keys() != now["code"].keys():
            return ("the fingerprint was not taken of a workload; pass fingerprint= to have code and config compared",)
        own = then.get("config", {})
        now = now | {"config": own | {key: now["config"].get(key) for key in own if key in now["config"]}}
    changed = differences(then, now)
    if not changed:
        return ()
    words = "; ".join(changed)
    if not anyway:
        raise ValueError(
            f"{incident.folder}: code or config have changed since the recording: {words}. Go back to what was "
            "recorded, or pass anyway=True: the controls then tell whether the spike still comes back"
        )
    return (f"code or config have changed since the recording: {words}",)


def _state(
    incident: Incident, workload: Workload, other: str | Path | None, notes: list[str]
) -> tuple[int, int, State, bool]:
    """The snapshot's step, its batch id, the state, and whether its random numbers can be set here."""
    path = incident.snapshot if other is None else Path(other)
    if path is None:
        raise ValueError(
            f"{incident.folder} holds no snapshot to replay from (by default only rewinds and stops keep one, and only "
            "the newest incidents; Guard(incident_state='all') keeps more): pass snapshot=<folder> of another one of "
            "this run from before the spike, or train again with replay.recording.record, which keeps its own"
        )
    kept = load_snapshot(path)
    if kept.at.step > incident.onset.step:
        raise ValueError(
            f"{path} stands at step {kept.at.step}, after the onset at step {incident.onset.step}; the cause is behind "
            "it: give an older one with snapshot="
        )
    state = kept.state
    if state.plain["extra"]:
        notes.append(f"not replayed, since a workload has no such part: {', '.join(state.plain['extra'])}")
        state = State(state.tensors, state.plain | {"extra": {}})
    training = Training(workload.model, workload.optimizer, scheduler=workload.scheduler)
    try:
        training.check(state, rng=False)
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit this workload: {error}. Build model, optimizer and scheduler as the recorded run did"
        ) from error
    try:
        training.check(state, rng=True)
    except ValueError as error:
        notes.append(f"random numbers cannot be set, so dropout and the like differ: {error}")
        return kept.at.step, kept.at.batch_id, state, False
    return kept.at.step, kept.at.batch_id, state, True


# ------------------------------------------------------------------------------------------------ rows and window


def _recorded(incident: Incident, start: int, batch_id: int) -> Recorded:
    rows = list(incident.rows)
    acted = min((a.step for a in incident.actions if a.kind in STEPPED_IN and a.step >= start), default=None)
    after: list[Row] = []
    for row in (r for r in rows if r.step >= start and r.batch_id >= batch_id):
        if after and row.step <= after[-1].step:
            break  # it went back, or tried again: another run from here on
        after.append(row)
        if not row.taken or row.step == acted:
            break
    before: list[Row] = []
    for row in reversed([r for r in rows if r.step < start and r.batch_id < batch_id and r.taken]):
        if before and row.step >= before[-1].step:
            break
        before.append(row)
    found = [*reversed(before), *after]
    return Recorded(
        {r.step: r.loss for r in found},
        {r.step: r.batch_id for r in after} or {start: batch_id},
        {r.step: Taken(r.step, r.loss, r.grad_norm, r.update_norm, r.lr) for r in found if r.taken},
    )


def _window(incident: Incident, recorded: Recorded, start: int, onset: int) -> tuple[Window, bool]:
    """The spike as far as it was recorded, and whether that is all of it."""
    seen = {step: loss for step, loss in recorded.losses.items() if step >= onset}
    if not seen:
        return Window(start, onset, onset, onset + 1), False
    last = max(seen)
    curve = [recorded.losses[step] for step in sorted(recorded.losses)]
    first = min(recorded.losses)
    if sorted(recorded.losses) == list(range(first, last + 1)):
        spike = _nearest(find_spikes(curve), onset - first)
        if spike is not None and first + spike.end <= last and first + spike.onset >= start:
            return Window(start, *(first + step for step in spike)), True
    peak = max(seen, key=lambda step: seen[step] if math.isfinite(seen[step]) else math.inf)
    return Window(start, onset, peak, last + 1), False


def _found(
    build: Callable[[Window, Mapping[int, float], list[str]], Subject],
    window: Window,
    recorded: Recorded,
    alarm: int,
    notes: list[str],
) -> Subject:
    """The subject with the rest of its spike from an unchanged replay, as far as it has the same losses."""
    subject = build(window, recorded.losses, notes)
    subject.restore()
    length = max(LEAST_SEARCH, SEARCH * (alarm - window.start))
    stop = alarm + length if subject.stop is None else min(alarm + length, subject.stop)
    replayed: dict[int, float] = {}
    spike = None
    first = min(recorded.losses, default=window.start)
    for taken in take_steps(subject.run(), window.start, stop):
        replayed[taken.step] = taken.loss
        if taken.step > alarm and taken.step % 20 == 0:
            spike = _nearest(_spikes(recorded, replayed, first), window.onset - first)
            if spike is not None and first + spike.end <= taken.step:
                break
    spike = _nearest(_spikes(recorded, replayed, first), window.onset - first)
    if spike is None or first + spike.onset < window.start:
        said = "an unchanged replay shows no spike of the loss there: its end is not known"
        return build(window, recorded.losses, [*notes, said])
    ended = Window(window.start, *(first + step for step in spike))
    # What the guard prevented was never recorded: the spike's height is then the replay's.
    losses = recorded.losses | {step: loss for step, loss in replayed.items() if step > alarm}
    same = all(loss == replayed.get(step, loss) for step, loss in recorded.losses.items())
    said = [f"losses after step {alarm} are those of an unchanged replay"]
    said += [] if same else ["which differs from the record before that: see the controls"]
    return build(ended, losses, [*notes, ", ".join(said)])


def _spikes(recorded: Recorded, replayed: Mapping[int, float], first: int) -> list[Spike]:
    losses = recorded.losses | dict(replayed)
    return find_spikes([losses[step] for step in sorted(losses)]) if len(losses) == max(losses) - first + 1 else []


def _nearest(spikes: list[Spike], onset: int) -> Spike | None:
    """The spike that is under way at `onset`, or the next one after it."""
    return next((spike for spike in spikes if spike.end > onset), None)


# -------------------------------------------------------------------------------------------------------- batches


class _Batches:
    """Where the batches of a replay come from: the workload where it has what was recorded, else the kept copies."""

    def __init__(
        self, incident: Incident, workload: Workload, recorded: Recorded, start: int, notes: list[str]
    ) -> None:
        self._incident, self._workload = incident, workload
        self._kept = {batch_id for batch_id in incident.batch_ids if batch_id >= recorded.ids.get(start, 0)}
        # From all rows: with the snapshot at the onset the recorded ones may be a single row.
        self._stride = _stride({r.step: r.batch_id for r in incident.rows if r.taken}, workload.accumulate)
        self._start = start
        self.indices = {step: batch_id // self._stride for step, batch_id in recorded.ids.items()}
        self._copies: set[int] = set()
        self._working: set[int] = set()
        self.digests: dict[int, str] = {}
        self._error: Exception | None = None
        self._choose(notes)

    def batch(self, index: int) -> Any:
        """The batch of a workload index."""
        if index in self._copies:
            return self._copy(index)
        return self._workload.batch(index)

    def stop(self, start: int, alarm: int) -> int | None:
        """First step whose batch is not to be had. Raises ValueError when that is before the alarm's end."""
        if self._error is None:
            return None
        step = start
        while self._index(step) in self._copies or self._index(step) in self._working:
            step += 1
        if step <= alarm:
            raise ValueError(
                f"{self._incident.folder}: batch {self._index(step)} of step {step} is not to be had: no copy was kept "
                f"(there are {len(self._copies)}), and workload.batch says {_said(self._error)}. "
                "Give a workload whose batch(i) has the recorded batches from step "
                f"{start} on, or record through guard.batches(loader), which keeps copies"
            )
        return step

    def _index(self, step: int) -> int:
        last = max(self.indices)
        return self.indices.get(step, self.indices[last] + step - last)

    def _choose(self, notes: list[str]) -> None:
        """Compare the workload's batches with the kept ones, and take the latter where they differ."""
        differ: list[int] = []
        for index in sorted(set(self.indices.values())):
            kept = self._digest_of_copy(index)
            try:
                own = of_batch(self._workload.batch(index))
            except Exception as error:  # anybody's loader, which may fail in any way
                self._error = error
                if kept is not None:
                    self._copies.add(index)
                continue
            self._working.add(index)
            if kept is not None and kept != own:
                differ.append(index)
                self._copies.add(index)
        for step, index in self.indices.items():
            digest = self._digest_of_copy(index)
            if digest is not None:
                self.digests[step] = digest
        if self._error is not None and self._copies:
            notes.append(
                f"workload.batch fails ({_said(self._error)}): the {len(self._copies)} kept "
                "copies are replayed, and nothing after them can be"
            )
        elif differ:
            notes.append(
                f"the workload's batches are not those recorded (first {differ[0]}, {len(differ)} in all): the kept "
                "copies are replayed, and the workload's own after them"
            )

    def _digest_of_copy(self, index: int) -> str | None:
        if not self._ids(index) <= self._kept:
            return None
        try:
            return of_batch(self._copy(index))
        except ValueError:
            return None  # of a class that this process does not know, or not kept whole

    def _copy(self, index: int) -> Any:
        ids = sorted(self._ids(index))
        device = next(self._workload.model.parameters()).device
        parts = [_on(self._incident.batch(batch_id), device) for batch_id in ids]
        return parts[0] if self._workload.accumulate == 1 else parts

    def _ids(self, index: int) -> set[int]:
        """The loader's ids of a workload index: several where a step accumulates; -1 where steps were counted."""
        if self._stride < self._workload.accumulate:
            return {-1}
        return set(range(index * self._stride, index * self._stride + self._workload.accumulate))


def _stride(ids: Mapping[int, int], accumulate: int) -> int:
    """Loader ids a step: `accumulate` where the loader's batches were counted, 1 where steps were."""
    gaps = [ids[step + 1] - ids[step] for step in ids if step + 1 in ids]
    return accumulate if not gaps or min(gaps) >= accumulate else 1


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _on(tree: Any, device: torch.device) -> Any:
    """`tree` with its tensors on `device`."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _on(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and type(tree) is not tuple:
        return type(tree)(*(_on(value, device) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on(value, device) for value in tree)
    return tree
