"""Carrying out what a policy decided: skip, scale, rewind, stop; each becomes an event, in a dry run that alone.

Must not import the guard or decide anything itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from aftershock.guard.batches import Mode, Stream
from aftershock.guard.events import EventKind, EventLog
from aftershock.guard.policy import Action, Continue, Policy, Rewind, ScaleLR, Seen, SkipStep, Stop
from aftershock.guard.rates import Scale
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.watch import Watch
from aftershock.signals.detect.rule import ALARMS

if TYPE_CHECKING:
    from aftershock.guard.cases import Cases

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "step")
"""Adam's second moment goes with its step counter: a bias correction for a moment that is gone would be none."""
KINDS: dict[type, tuple[EventKind, EventKind]] = {
    SkipStep: ("skip", "dry_run_skip"),
    ScaleLR: ("scale_lr", "dry_run_scale_lr"),
    Rewind: ("rewind", "dry_run_rewind"),
    Stop: ("stop", "dry_run_stop"),
    Continue: ("policy", "dry_run_policy"),
}


@dataclass(kw_only=True)
class Clock:
    """Where the run is: `step` accepted optimizer steps, the `scale` on its rates, and how it ended, if it did."""

    step: int = 0
    scale: Scale = field(default_factory=Scale)
    stopped: Stop | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> dict[str, int]:
        """How many events of each kind there were, but coming and going."""
        return {kind: n for kind, n in sorted(self.counts.items()) if kind not in ("attached", "resumed", "audited")}

    def report(self) -> str:
        """One line: steps, and what was seen and done."""
        words = ", ".join(f"{number} {kind}" for kind, number in self.done.items()) or "nothing happened"
        end = "" if self.stopped is None else f"; stopped: {self.stopped.reason}"
        return f"guard: {self.step} steps, {words}{end}"


class Actions:
    """Does what a policy says, on one run. Every rank calls it with the same action."""

    def __init__(
        self,
        *,
        clock: Clock,
        optimizer: Optimizer,
        recorder: FlightRecorder,
        watch: Watch,
        policy: Policy,
        log: EventLog,
        stream: Stream,
        cases: Cases | None,
        skip_file: Path | None,
        mode: Mode,
        dry_run: bool,
    ) -> None:
        self._clock, self._optimizer, self._recorder = clock, optimizer, recorder
        self._watch, self._policy, self._log, self._stream = watch, policy, log, stream
        self._cases, self._skip_file, self._mode, self._dry_run = cases, skip_file, mode, dry_run
        self.went_back = False
        """A rewind or stop was carried out and is not on the disk yet."""

    def tell(self, kind: EventKind, seen: Seen, **data: Any) -> None:
        """One event about a step, counted for the report, and added to the open incident."""
        self._clock.counts[kind] += 1
        numbers: dict[str, Any] = {"loss": seen.loss, "grad_norm": seen.grad_norm, "update_norm": seen.update_norm}
        if seen.verdicts:
            numbers["verdicts"] = dict(seen.verdicts)
        self._log.event(kind, seen.step, seen.batch_id, **data, **numbers)
        if self._cases is not None:
            self._cases.did(kind, seen, data | numbers, self._watch.moved)

    def say(self, kind: EventKind, reason: str, **data: Any) -> None:
        """One event that is about no step in particular."""
        self._clock.counts[kind] += 1
        self._log.event(kind, self._clock.step, self._stream.next_id, reason=reason, **data)

    def quiet(self, seen: Seen) -> None:
        """A step on which nothing was done."""
        if self._cases is not None:
            self._cases.quiet(seen)

    def carry_out(self, action: Action, seen: Seen, *, too_late: bool = False, last_id: int | None = None) -> None:
        """Do it. `too_late`: the step was taken before this was decided; `last_id`: of the newest batch fetched."""
        if isinstance(action, Continue):
            if action.reason:
                self.tell(KINDS[Continue][self._dry_run], seen, reason=action.reason)
            elif any(kind in ALARMS for kind in seen.verdicts.values()) and "nonfinite" not in seen.verdicts.values():
                self.tell("alarm", seen, cause=seen.cause)
            return
        if isinstance(action, ScaleLR) and not action.reason:  # a hold that goes on was told when it began
            self._clock.scale = Scale(action.factor, action.steps, action.rewarm)
            return
        if self._cases is not None and not self._dry_run:
            self._cases.open(action, seen, self._watch.moved)
        data = action._asdict() | {"cause": seen.cause}
        if too_late and isinstance(action, SkipStep):
            self.tell("alarm", seen, **data | {"reason": f"too late to skip, the step was taken: {action.reason}"})
            return
        if isinstance(action, Rewind):
            action = action._replace(skip=self._widened(action.skip, seen, last_id))
            data = action._asdict() | {"cause": seen.cause}
        self.tell(KINDS[type(action)][self._dry_run], seen, **data)
        if self._dry_run:
            if isinstance(action, (Rewind, Stop)):
                self._policy.after_rewind(seen.step)  # told once, not at each step until the trouble is over
        elif isinstance(action, ScaleLR):
            self._clock.scale = Scale(action.factor, action.steps, action.rewarm)
        elif isinstance(action, Rewind):
            self._rewind(action)
        elif isinstance(action, Stop):
            self._stop(action)

    def _rewind(self, action: Rewind) -> None:
        """Weights, optimizer, scheduler, scaler and extras go back; in "restart" data and random numbers as well."""
        restart = self._mode == "restart"
        kept = self._recorder.restore(action.to_step, rng=restart)
        self._clock.step, self.went_back = kept.step, True
        self._stream.skips.add(*action.skip, action.reason)
        if self._skip_file is not None:
            self._stream.skips.write(self._skip_file)
        if restart:
            self._stream.go_to(kept.batch_id)
        self._watch.rewind()
        if action.reset != "none":
            reset_moments(self._optimizer, second=action.reset == "both")
        self._clock.scale = Scale()
        if action.lr_factor != 1.0:
            self._clock.scale = Scale(action.lr_factor, action.lr_steps, action.rewarm)
        self._policy.after_rewind(kept.step)

    def _stop(self, action: Stop) -> None:
        if self._recorder.healthy:
            self._clock.step = self._recorder.restore(self._recorder.healthy[-1], rng=False).step
        self._clock.stopped, self._stream.stopped, self.went_back = action, True, True
        if self._cases is not None:
            self._cases.end("stopped")

    def _widened(self, skip: tuple[int, int], seen: Seen, last_id: int | None) -> tuple[int, int]:
        """A range that ends with this step ends with the last of its batches: with accumulation it has several."""
        start, stop = skip
        if last_id is not None and stop == seen.batch_id + 1:
            stop = max(stop, last_id + 1)
        return start, stop


def reset_moments(optimizer: Optimizer, *, second: bool) -> None:
    """Zero the first moments, with `second` also the squares and step counters; in place, for fused kernels."""
    for state in optimizer.state.values():
        if not isinstance(state, Mapping):
            continue
        for name in FIRST + (SECOND if second else ()):
            value = state.get(name)
            if isinstance(value, Tensor):
                value.zero_()
            elif value is not None:
                state[name] = type(value)(0)  # pyright: ignore[reportIndexIssue] - the optimizer's own dict
