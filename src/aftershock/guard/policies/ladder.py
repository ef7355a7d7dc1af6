"""The default policy: probe by skipping, rewind when the state is damaged, rewind further and slower, stop.

Policy M15 of the escalation ladders in public trainers, with the onset taken from the first lead signal. It edits
neither gradients nor weights. Must not import the guard.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aftershock.guard.policies.incident import Alarms, Place, is_finite, leads, newest
from aftershock.guard.policies.saved import packed, require, unpacked
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Policy, Rewind, Seen, SkipStep, Stop

SIGNALS = ("loss", "grad_norm", "update_norm", "lr")
MEMORY = 33
"""Normal values of a signal whose median says what x10 is."""
TRUST_FROM = 8
"""Values from which on that median is one."""


@dataclass(kw_only=True, eq=False)
class Ladder(Policy):
    """Skips a bad batch, rewinds a damaged state, goes further back and slower if it fails again, then stops.

    1. Loss or gradient not finite: the step is skipped; `max_skips` in a row: rewind to the last healthy snapshot.
    2. Loss or gradient norm spikes before the step: the step is skipped, as a probe. If the next batch is normal it was
       the batch; if `probe` batches in a row spike, the state is damaged: rewind to the newest snapshot `margin` steps
       before the onset, the first lead signal of this run of alarms (`patience` quiet batches end a run).
    3. The update jumps after the step and the gradient was quiet: the weights have moved: rewind at once.
    4. A second failure before the run got `place` steps beyond the first: further back, twice the skipped range, rates
       times `lr_factor` (in case 3 at most 1 / the factor by which rate or update jumped) for `lr_steps` steps and
       re-warmed over `rewarm`. Failure number `attempts` at one place: stop.
    For `cooldown` steps after a rewind only case 1 acts, and values `extreme` times their usual median.
    With `dry_run` every decision becomes a `Continue` with the reason. Loss alone never rewinds for a shift or drift.

    Example:
        guard = Guard(model, optimizer, policy=Ladder(probe=2, margin=100))
    """

    edits: ClassVar[bool] = False
    max_skips: int = 3
    probe: int = 3
    margin: int = 10
    patience: int = 32
    place: int = 100
    attempts: int = 3
    cooldown: int = 50
    extreme: float = 10.0
    lr_factor: float = 0.5
    lr_steps: int = 100
    rewarm: int = 100
    dry_run: bool = False

    _run: int = field(default=0, init=False, repr=False)
    _alarms: Alarms = field(default=Alarms(), init=False, repr=False)
    _place: Place = field(default=Place(), init=False, repr=False)
    _cool_until: int = field(default=-1, init=False, repr=False)
    _normal: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SIGNALS}, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, max_skips=1, probe=1, patience=1, attempts=1, extreme=1)
        require(self, margin=0, place=0, cooldown=0, lr_factor=0, lr_steps=0, rewarm=0)
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"Ladder: lr_factor must lie in (0, 1], got {self.lr_factor}")

    def before_step(self, seen: Seen, live: Live) -> Action:
        finite = is_finite(seen)
        # A NaN that no detector saw begins a run of alarms too.
        loud = leads(seen.verdicts) or not finite
        self._alarms = self._alarms.after(seen, loud=loud, patience=self.patience, count=True)
        if not finite:
            return self._bad_batch(seen, "loss or gradient not finite", limit=self.max_skips, margin=0)
        spiking = [signal for signal in ("loss", "grad_norm") if self._acts(seen, signal, ("spike",))]
        if spiking:
            return self._bad_batch(seen, f"{' and '.join(spiking)} spiked", limit=self.probe, margin=self.margin)
        self._run = 0
        self._learn(seen, "loss", "grad_norm")
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        if "update_norm" not in seen.verdicts and not self._cooling(seen):
            self._learn(seen, "update_norm", "lr")
            return CONTINUE
        loud = leads({"update_norm": seen.verdicts.get("update_norm", "ok")})
        self._alarms = self._alarms.after(seen, loud=loud, patience=self.patience, count=False)
        if seen.verdicts.get("update_norm") == "nonfinite":
            return self._failed(seen, "the update was not finite: the weights are broken", margin=0)
        if "grad_norm" not in seen.verdicts and self._acts(seen, "update_norm", ("spike", "shift")):
            jump = self._jump(seen)
            return self._failed(
                seen, f"update jumped x{jump:.3g}, gradient quiet: rate or state fault", margin=self.margin, jump=jump
            )
        self._learn(seen, "update_norm", "lr")
        return CONTINUE

    def after_rewind(self, step: int) -> None:
        """What is normal is kept: only steps without a verdict taught it, and the cool-down needs it at once."""
        self._run, self._alarms, self._cool_until = 0, Alarms(), step + self.cooldown

    def state_dict(self) -> dict[str, Any]:
        return packed(
            self,
            run=self._run,
            onset=None if self._alarms.onset is None else list(self._alarms.onset),
            quiet=self._alarms.quiet,
            place=list(self._place),
            cool_until=self._cool_until,
            normal={signal: list(values) for signal, values in self._normal.items()},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        got = unpacked(self, state, ("run", "onset", "quiet", "place", "cool_until", "normal"))
        self._run, self._cool_until = got["run"], got["cool_until"]
        self._alarms = Alarms(None if got["onset"] is None else (got["onset"][0], got["onset"][1]), got["quiet"])
        self._place = Place(*got["place"])
        self._normal = {signal: list(got["normal"][signal]) for signal in SIGNALS}

    def _bad_batch(self, seen: Seen, what: str, *, limit: int, margin: int) -> Action:
        """Skip it; the last of `limit` in a row shows that it is not the batch."""
        self._run += 1
        if self._run < limit:
            return self._said(SkipStep(f"{what} (batch {self._run} of {limit} before a rewind)"), seen)
        return self._failed(seen, f"{what}, {self._run} batches in a row", margin=margin)

    def _failed(self, seen: Seen, reason: str, *, margin: int, jump: float = 1.0) -> Action:
        """The state is damaged: where to go, what to skip, how fast to go on; or the end of the ladder."""
        if not seen.healthy:
            return self._stuck(seen, reason)
        place = self._place.failed(seen.step, reach=self.place)
        if place.failures >= self.attempts:
            self._place = place
            return self._said(Stop(f"{reason}; failure {place.failures} at one place (step {seen.step})"), seen)
        again = place.failures > 1
        step, batch = self._alarms.onset or (seen.step, seen.batch_id)
        # Further back means strictly before the last target, which did not help.
        until = min(step - margin, place.target - 1) if again else step - margin
        target = newest(seen.healthy, until=until)
        length = seen.batch_id + 1 - batch
        if again:
            length = max(length, 2 * max(length, place.skipped))
        self._place = place._replace(target=target, skipped=length)
        rewind = Rewind(target, (batch, batch + length), f"{reason}; onset at step {step}")
        if again:
            factor = min(self.lr_factor, 1 / jump)
            rewind = rewind._replace(lr_factor=factor, lr_steps=self.lr_steps, rewarm=self.rewarm)
        return self._said(rewind, seen)

    def _stuck(self, seen: Seen, reason: str) -> Action:
        """No snapshot to go back to: a broken state ends the run, a merely loud one goes on, said once."""
        if not is_finite(seen) or seen.verdicts.get("update_norm") == "nonfinite":
            return self._said(Stop(f"{reason}; there is no healthy snapshot to go back to"), seen)
        first = self._run <= self.probe
        return Continue(f"{reason}; there is no healthy snapshot to go back to: taken as it is" if first else "")

    def _said(self, action: SkipStep | Rewind | Stop, seen: Seen) -> Action:
        """The action, or in a dry run what it would have been; an incident is then told once per cool-down."""
        if not self.dry_run:
            return action
        if isinstance(action, SkipStep):
            return Continue(f"dry run: would skip the step: {action.reason}")
        self.after_rewind(seen.step)
        if isinstance(action, Rewind):
            return Continue(f"dry run: would rewind to step {action.to_step}: {action.reason}")
        return Continue(f"dry run: would stop: {action.reason}")

    def _cooling(self, seen: Seen) -> bool:
        return seen.step <= self._cool_until

    def _acts(self, seen: Seen, signal: str, kinds: tuple[str, ...]) -> bool:
        """Whether this signal calls for action: by its verdict, in the cool-down only when it is extreme."""
        if not self._cooling(seen):
            return seen.verdicts.get(signal) in kinds
        usual = self._usual(signal)
        return usual > 0 and getattr(seen, signal) >= self.extreme * usual

    def _usual(self, signal: str) -> float:
        values = self._normal[signal]
        return statistics.median(values) if len(values) >= TRUST_FROM else math.nan

    def _jump(self, seen: Seen) -> float:
        """The factor by which the rate or, if that is as ever, the update grew; 1 when neither is known."""
        grown = [
            value / usual
            for value, usual in ((seen.lr, self._usual("lr")), (seen.update_norm, self._usual("update_norm")))
            if usual > 0
        ]
        return max([ratio for ratio in grown if math.isfinite(ratio)], default=1.0)

    def _learn(self, seen: Seen, *signals: str) -> None:
        for signal in signals:
            value = getattr(seen, signal)
            if signal not in seen.verdicts and math.isfinite(value):
                self._normal[signal] = [*self._normal[signal], value][-MEMORY:]
