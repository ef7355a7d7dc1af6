"""Go back: rewind-and-skip as PaLM did it, and backtracking to the last good state with a lower rate.

Must not import the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aftershock.guard.policies.incident import Alarms, Place, is_finite, leads, newest
from aftershock.guard.policies.saved import packed, require, unpacked
from aftershock.guard.policy import CONTINUE, Action, Live, Policy, Rewind, Seen, SkipStep, Stop

FOREVER = 2**31
"""Steps for which a backtracked run keeps its lower rate: its source never raises it again."""


@dataclass(kw_only=True, eq=False)
class RewindAndSkip(Policy):
    """Restart about `back` steps before the spike and skip `skip` batches (PaLM: 100 and 200 to 500; GLM: 100, 200).

    An incident is a spike of loss or gradient norm, or a value that is not finite, in `patience` batches in a row; its
    onset is the first lead signal of the run of alarms (`quiet` batches without one end it), not the loss's peak.
    Rewinds to the newest healthy snapshot `back` steps before the onset and skips from `before` batches ahead of the
    onset's: `skip` of them, at least up to the present one, doubled with each attempt at one place (within `place`
    steps). Attempt `attempts` + 1 stops: with other data at the same place it is not the data, but rates or settings.
    For `cooldown` steps after a rewind only non-finite values act. Those are never stepped on, spikes are, until then.

    Example:
        guard = Guard(model, optimizer, policy=RewindAndSkip(skip=500))
    """

    back: int = 100
    skip: int = 200
    before: int = 0
    patience: int = 3
    quiet: int = 32
    place: int = 100
    attempts: int = 3
    cooldown: int = 50

    _run: int = field(default=0, init=False, repr=False)
    _alarms: Alarms = field(default=Alarms(), init=False, repr=False)
    _place: Place = field(default=Place(), init=False, repr=False)
    _cool_until: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, back=0, skip=1, before=0, patience=1, quiet=1, place=0, attempts=1, cooldown=0)

    def before_step(self, seen: Seen, live: Live) -> Action:
        finite = is_finite(seen)
        loud = leads(seen.verdicts) or not finite
        self._alarms = self._alarms.after(seen, loud=loud, patience=self.quiet, count=True)
        spiking = "spike" in (seen.verdicts.get("loss"), seen.verdicts.get("grad_norm"))
        if finite and (not spiking or seen.step <= self._cool_until):
            self._run = 0
            return CONTINUE
        self._run += 1
        what = "loss or gradient spiked" if finite else "loss or gradient not finite"
        if self._run < self.patience:
            return CONTINUE if finite else SkipStep(f"{what} (batch {self._run} of {self.patience} before a rewind)")
        return self._rewind(seen, f"{what}, {self._run} batches in a row")

    def after_step(self, seen: Seen, live: Live) -> Action:
        """An update can be the first lead; one that is not finite leaves nothing to wait for."""
        kind = seen.verdicts.get("update_norm", "ok")
        if kind != "ok":
            loud = leads({"update_norm": kind})
            self._alarms = self._alarms.after(seen, loud=loud, patience=self.quiet, count=False)
        return self._rewind(seen, "the update was not finite") if kind == "nonfinite" else CONTINUE

    def after_rewind(self, step: int) -> None:
        self._run, self._alarms, self._cool_until = 0, Alarms(), step + self.cooldown

    def state_dict(self) -> dict[str, Any]:
        onset = None if self._alarms.onset is None else list(self._alarms.onset)
        place = list(self._place)
        return packed(
            self, run=self._run, onset=onset, quiet=self._alarms.quiet, place=place, cool_until=self._cool_until
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        got = unpacked(self, state, ("run", "onset", "quiet", "place", "cool_until"))
        self._run, self._cool_until = got["run"], got["cool_until"]
        self._alarms = Alarms(None if got["onset"] is None else (got["onset"][0], got["onset"][1]), got["quiet"])
        self._place = Place(*got["place"])

    def _rewind(self, seen: Seen, reason: str) -> Action:
        self._place = self._place.failed(seen.step, reach=self.place)
        attempt = self._place.failures
        if attempt > self.attempts or not seen.healthy:
            why = f"{attempt - 1} rewinds did not help" if seen.healthy else "there is no healthy snapshot"
            return Stop(f"{reason} at step {seen.step}; {why}")
        step, batch = self._alarms.onset or (seen.step, seen.batch_id)
        start = max(0, batch - self.before)
        stop = max(seen.batch_id + 1, start + self.skip * 2 ** (attempt - 1))
        target = newest(seen.healthy, until=step - self.back)
        return Rewind(target, (start, stop), f"{reason}; onset at step {step}, attempt {attempt} of {self.attempts}")


@dataclass(kw_only=True, eq=False)
class Backtrack(Policy):
    """Back to the last healthy snapshot with the rate times `lr_factor`, at most `attempts` times, then stop (Soup).

    Acts on a loss or gradient that is not finite or spikes, before the step, so the bad state is never reached and
    never saved; on an update that is not finite, after it. The rate is `lr_factor` to the power of the attempts so
    far, for the rest of the run, but not below `lr_floor`. Only the batch at fault is skipped. Attempts are counted
    over the whole run, as in the source.

    Example:
        guard = Guard(model, optimizer, policy=Backtrack(attempts=5))
    """

    lr_factor: float = 0.5
    lr_floor: float = 1e-9
    attempts: int = 3

    _attempt: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, lr_factor=1e-9, lr_floor=0, attempts=1)
        if self.lr_factor > 1:
            raise ValueError(f"Backtrack: lr_factor must be at most 1, got {self.lr_factor}")

    def before_step(self, seen: Seen, live: Live) -> Action:
        if not is_finite(seen):
            return self._back(seen, "loss or gradient not finite")
        loud = [signal for signal in ("loss", "grad_norm") if seen.verdicts.get(signal) == "spike"]
        return self._back(seen, f"{' and '.join(loud)} spiked") if loud else CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        broken = seen.verdicts.get("update_norm") == "nonfinite"
        return self._back(seen, "the update was not finite") if broken else CONTINUE

    def state_dict(self) -> dict[str, Any]:
        return packed(self, attempt=self._attempt)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._attempt = unpacked(self, state, ("attempt",))["attempt"]

    def _back(self, seen: Seen, reason: str) -> Action:
        self._attempt += 1
        if self._attempt > self.attempts or not seen.healthy:
            why = f"{self.attempts} backtracks are used up" if seen.healthy else "there is no healthy snapshot"
            return Stop(f"{reason} at step {seen.step}; {why}")
        # The restored rate is the schedule's: what earlier attempts took off has to be taken off again.
        factor = self.lr_factor**self._attempt
        if seen.lr > 0:
            factor = min(1.0, max(factor, self.lr_floor / seen.lr))
        return Rewind(
            max(seen.healthy),
            (seen.batch_id, seen.batch_id + 1),
            f"{reason}; backtrack {self._attempt} of {self.attempts}",
            lr_factor=factor,
            lr_steps=FOREVER,
        )
