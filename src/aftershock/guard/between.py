"""Between two steps: snapshots in memory and on disk, the skip list, and the way back into a run that died.

Must not import the guard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aftershock.guard import checks, digest
from aftershock.guard.actions import Actions, Clock
from aftershock.guard.agree import Ranks
from aftershock.guard.audit import AuditResult, Finding, compare_state
from aftershock.guard.batches import Stream
from aftershock.guard.digest import StateDigest
from aftershock.guard.durable import Durable, Loaded
from aftershock.guard.parts import Outcome
from aftershock.guard.policy import Continue, ScaleLR, Stop
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.rehearsal import Rehearsal
from aftershock.guard.state import Kept, State
from aftershock.guard.steps import Steps
from aftershock.guard.surroundings import surroundings
from aftershock.guard.witness import Witness

_log = logging.getLogger("aftershock.guard")
LOOSE = 1e-2
"""How far losses may lie apart, relatively, where a device adds in another order each time; on a CPU not at all."""


class Around(NamedTuple):
    """The parts of a guard that are touched between steps.

    `own` and `load` give and take the guard's state; `batch_id` is the next id, `num_events` how many there were;
    `skip_file`: None on all ranks but one, and without a folder; `audit`: the user's loss of a batch.
    """

    recorder: FlightRecorder
    ranks: Ranks
    clock: Clock
    actions: Actions
    stream: Stream
    steps: Steps
    durable: Durable | None
    skip_file: Path | None
    own: Callable[[], dict[str, Any]]
    load: Callable[[Mapping[str, Any]], None]
    batch_id: Callable[[], int]
    num_events: Callable[[], int]
    audit: Callable[[Any], Tensor] | None
    accumulate: int


class _Resumed(NamedTuple):
    """What is still to be done before the first step of a resumed run."""

    rng: State | None
    end: StateDigest


class Between:
    """Takes and writes what is due. Every rank makes the same calls."""

    def __init__(self, around: Around) -> None:
        self._around = around
        self._refused_at = -1
        self._resumed: _Resumed | None = None
        training = around.recorder.training
        exact = all(p.device.type == "cpu" for p in training.params.values())
        self._tolerance = 0.0 if exact else LOOSE
        self._witness = None
        if around.durable is not None:
            self._witness = Witness(training, rank=around.ranks.rank, tolerance=self._tolerance)

    # ---- snapshots

    def here(self) -> None:
        """Gradients are cleared, and the next batch is not loaded yet."""
        a = self._around
        if self._resumed is not None:
            self._go_on()
        if self._due() or self._saves():
            a.steps.settle()
        self.settle_down()
        if a.clock.stopped is not None:
            return
        taken = self._due() and self._take()
        if self._saves():
            self.save(held=taken)
        if self._witness is not None:
            self._witness.boundary(a.clock.step, a.batch_id())

    def first(self) -> None:
        """Without `batches` nothing happens before the first step: the state to go back to is that before it."""
        if self._resumed is not None:  # the forward has run: buffers and random numbers have moved
            resumed, self._resumed = self._resumed, None
            found = compare_state(self._around.recorder.training, resumed.end)
            self._tell(AuditResult(False, tuple(one for one in found if one.what not in ("weights", "rng")), 0))
        if not self._around.recorder.healthy and self._refused_at < 0:
            self._take()

    def ended(self) -> None:
        """The data's end: what came since the last snapshot is saved too."""
        a = self._around
        a.steps.settle()
        self.settle_down()
        if a.durable is not None and a.clock.stopped is None and a.durable.is_new(a.clock.step):
            self.save(held=False)

    def save(self, *, held: bool) -> Path | None:
        """Write the run as it stands, unless it is not finite; None when it is not, or the disk is full.

        `held`: the recorder has taken this very moment.
        """
        a = self._around
        assert a.durable is not None
        if not held and not self._is_finite():
            return None
        training = a.recorder.training
        own = a.own() | {
            "refused_at": self._refused_at,
            "events": a.num_events(),
            "end": digest.of_state(training)._asdict(),
            "surroundings": surroundings(training.params.values()),
        }
        try:
            path = a.durable.save(Kept(a.clock.step, a.batch_id()), own, held=held)
        except OSError as error:
            a.actions.say("not_saved", str(error))
            return None
        if self._witness is not None:
            self._witness.follow(path)
        return path

    def settle_down(self) -> None:
        """After a rewind or a stop: once this is on the disk, a restart begins behind it."""
        a = self._around
        if not a.actions.went_back:
            return
        a.actions.went_back = False
        if a.durable is not None:
            if a.clock.stopped is not None:
                a.durable.stop(a.clock.stopped.reason)
            self.save(held=False)
        if a.skip_file is not None:
            a.stream.skips.write(a.skip_file)

    def _due(self) -> bool:
        """A state that was refused is looked at again only as often as a healthy one would be taken."""
        a = self._around
        waiting = self._refused_at >= 0 and 0 <= a.clock.step - self._refused_at < a.recorder.every
        return a.clock.stopped is None and a.recorder.due(a.clock.step) and not waiting

    def _saves(self) -> bool:
        a = self._around
        return a.durable is not None and a.clock.stopped is None and a.durable.due(a.clock.step)

    def _take(self) -> bool:
        a = self._around
        if not a.steps.unchanged():
            checks.raise_fault(checks.Faults(changed=True).code, here=checks.Faults(changed=True))
        step = a.clock.step
        if not self._is_finite():
            a.recorder.distrust(step)
            self._refused_at = step
            a.actions.say("snapshot_refused", "a parameter, buffer or optimizer state is not finite")
            return False
        a.recorder.take(step, a.batch_id(), finite=True)
        a.stream.mark()
        self._refused_at = -1
        return True

    def _is_finite(self) -> bool:
        return self._around.ranks.all_true(self._around.recorder.training.is_finite())

    # ---- steps

    def fetched(self, batch_id: int, batch: Any) -> None:
        """The first batch of a step was loaded."""
        if self._witness is not None:
            self._witness.fetched(self._around.clock.step, batch_id, batch)

    def judged(self, outcome: Outcome) -> None:
        """A step was judged; called before what it led to is written."""
        if self._witness is not None:
            plain = outcome.taken and isinstance(outcome.action, (Continue, ScaleLR))
            result = self._witness.judged(outcome.step, outcome.batch_id, outcome.loss, plain=plain)
            if result is not None:
                self._tell(result)

    def close(self) -> None:
        """The run ends."""
        self.settle_down()
        result = None if self._witness is None else self._witness.finish()
        if result is not None:
            self._tell(result)

    # ---- the way back

    def start(self, resume: bool | str) -> None:
        """At attach: go on, or make sure that a new run replaces no old one."""
        durable = self._around.durable
        if resume:
            self._resume(past_stop=resume == "past_stop")
        elif durable is not None and (last := durable.newest()) is not None:
            raise ValueError(
                f"{durable.folder} holds the snapshots of a run ({last.name}), which a new run would replace; pass "
                "resume=True to go on with it, or give another folder"
            )

    def _resume(self, *, past_stop: bool) -> None:
        """Go on from the newest snapshot on disk that is intact, if there is one."""
        a = self._around
        assert a.durable is not None
        path, reason = a.durable.newest(), a.durable.stopped()
        if reason is not None and past_stop:
            a.durable.forget_stop()
            reason = None
        if path is not None:
            self._load(a.durable.load(path))
        if reason is not None:
            a.clock.stopped, a.stream.stopped = Stop(reason), True
            a.actions.say(
                "stop", f"the run was stopped before: {reason}; to let it go on all the same, give resume='past_stop'"
            )

    def _load(self, loaded: Loaded) -> None:
        a = self._around
        own, at = loaded.own, loaded.snapshot.at
        a.load(own)
        self._refused_at = own["refused_at"]
        if a.skip_file is not None and a.stream.skips.ranges:
            a.stream.skips.write(a.skip_file)
        self._resumed = _Resumed(loaded.snapshot.state if loaded.rng else None, StateDigest(**own["end"]))
        assert self._witness is not None
        known = self._witness.expect(loaded.path, around=own["surroundings"]) if loaded.rng else 0
        words = f"from {loaded.path.name}, at batch {a.batch_id()}; {known} steps after it are known to compare with"
        if not loaded.rng:
            words += "; another number of processes: random numbers are new ones, and nothing can be compared"
        a.actions.say("resumed", words, events=own["events"], from_step=at.step)

    def _go_on(self) -> None:
        """The last thing before the first batch is loaded: whatever was drawn, loaded or written since is seen here."""
        a = self._around
        resumed, self._resumed = self._resumed, None
        assert resumed is not None
        assert a.durable is not None
        training = a.recorder.training
        if resumed.rng is not None:
            training.restore_rng(resumed.rng)
        found = [one for one in compare_state(training, resumed.end) if resumed.rng is not None or one.what != "rng"]
        replayed = 0
        if a.audit is not None and resumed.rng is not None:
            rehearsal = Rehearsal(
                a.steps, training, a.stream, a.audit, accumulate=a.accumulate, tolerance=self._tolerance
            )
            result = rehearsal.run(a.durable.folder, rank=a.ranks.rank)
            found += [one for one in result.findings if one.what not in {known.what for known in found}]
            replayed = result.num_replayed
        if found or replayed:
            self._tell(AuditResult(not found, tuple(found), replayed))

    def _tell(self, result: AuditResult) -> None:
        a = self._around
        for one in result.findings:
            a.actions.say("audit", f"{one.what}: {one.evidence}", advice=one.advice)
            if a.ranks.rank:  # only the first rank's events are written
                _finding(a.ranks.rank, one)
        if result.ok and result.num_replayed:
            a.actions.say("audited", f"{result.num_replayed} steps gave the recorded losses")


def _finding(rank: int, one: Finding) -> None:
    _log.warning("rank %d: %s: %s; %s", rank, one.what, one.evidence, one.advice)
