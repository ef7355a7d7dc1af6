"""The default policy: probe by skipping, rewind when the state is damaged, rewind further, ride it out.

Policy M15 of the escalation ladders in public trainers, with the onset taken from the first lead signal. It edits
neither gradients nor weights. Must not import the guard.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from aftershock.guard.policies.incident import Alarms, Place, is_finite, leads, newest
from aftershock.guard.policies.saved import packed, require, unpacked
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Policy, Rewind, ScaleLR, Seen, SkipStep, Stop

SIGNALS = ("loss", "grad_norm", "update_norm", "lr")
MEMORY = 33
"""Normal values of a signal whose median says what x10 is."""
REMEMBERED = 256
"""Steps whose loss is remembered: more than a ring of snapshots reaches back."""
TRUST_FROM = 8
"""Values from which on that median is one."""
FRESH_STEPS = 1
"""Accepted steps after a rewind up to which the state is the snapshot's: what is bad then is the batch."""
FRESH_BROKEN = 30
"""Batches that may be skipped for not being finite in a restored state: beyond that it is no stretch of bad data."""
NEAR = 5
"""Steps about a snapshot whose losses say what its state makes of good data."""
DOUBLE_STEPS = 50
"""Steps in which a capped rate may double: a jump of x30 is back at its schedule after about 250."""


class Fresh(NamedTuple):
    """The state just restored: its step, how many batches were skipped since, and the loss from which one is bad."""

    step: int = -1
    skipped: int = 0
    bar: float = math.inf


class Cap(NamedTuple):
    """The highest rate that is let through after it jumped: `rate` x 2^(steps / DOUBLE_STEPS), up to step `until`."""

    rate: float = 0.0
    steps: int = 0
    until: int = -1


@dataclass(kw_only=True, eq=False)
class Ladder(Policy):
    """Skips a bad batch, rewinds a damaged state, goes further back if it fails again, then rides it out.

    1. Loss or gradient not finite: the step is skipped; `max_skips` in a row: rewind to the last healthy snapshot.
    2. Loss or gradient norm spikes before the step (a gradient alone: `alone` times its usual median): the step is
       skipped, as a probe. If the next batch is normal it was the batch; if `probe` batches in a row spike, the state
       is damaged: rewind to the newest snapshot `margin` steps before the onset, the first lead signal of this run of
       alarms (`patience` quiet batches end a run). A gradient that stays high while the loss is calm has damaged
       nothing: its steps are taken.
    3. The update grows `least_jump`-fold after the step and the gradient was quiet: the weights have moved: rewind at
       once.
    4. A batch that is bad right after a rewind shows that it is the data: up to `max_fresh` of them are skipped, 30
       that are not finite.
    5. A second failure before the run got `place` steps beyond the first: further back, twice the skipped range. Not
       finite again: rates times `lr_factor` up to `lr_steps` steps after the failure, re-warmed over `rewarm`. In case
       3 with a rate that grew as much: from then on it may only double every `DOUBLE_STEPS` steps. No other second
       failure slows the run: a lower rate only puts such a spike off.
    6. Failure number `attempts` at one place, or more than `rewinds` rewinds within `per` steps: a finite state is let
       go on (failures at one place: with `exhausted="stop"` it ends): spikes are the nature of this run, which going
       back does not cure. For `per` steps only case 1 acts, at `riding_factor` times the rate. A broken state ends it.
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
    alone: float = 10.0
    least_jump: float = 3.0
    max_fresh: int = 200
    rewinds: int = 3
    per: int = 1000
    riding_factor: float = 1.0
    exhausted: Literal["ride", "stop"] = "ride"
    dry_run: bool = False

    _run: int = field(default=0, init=False, repr=False)
    _alarms: Alarms = field(default=Alarms(), init=False, repr=False)
    _place: Place = field(default=Place(), init=False, repr=False)
    _cool_until: int = field(default=-1, init=False, repr=False)
    _ride_until: int = field(default=-1, init=False, repr=False)
    _slow_until: int = field(default=-1, init=False, repr=False)
    _rewound: list[int] = field(default_factory=list, init=False, repr=False)
    _fresh: Fresh = field(default=Fresh(), init=False, repr=False)
    _cap: Cap = field(default=Cap(), init=False, repr=False)
    _losses: list[tuple[int, float]] = field(default_factory=list, init=False, repr=False)
    _normal: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SIGNALS}, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, max_skips=1, probe=1, patience=1, attempts=1, extreme=1)
        require(self, margin=0, place=0, cooldown=0, lr_factor=0, lr_steps=0, rewarm=0)
        require(self, alone=1, least_jump=1, max_fresh=0, rewinds=1, per=1)
        for name in ("lr_factor", "riding_factor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Ladder: {name} must lie in (0, 1], got {getattr(self, name)}")
        if self.exhausted not in ("ride", "stop"):
            raise ValueError(f"Ladder: exhausted must be 'ride' or 'stop', got {self.exhausted!r}")

    def before_step(self, seen: Seen, live: Live) -> Action:
        finite = is_finite(seen)
        # A NaN that no detector saw begins a run of alarms too.
        loud = leads(seen.verdicts) or not finite
        self._alarms = self._alarms.after(seen, loud=loud, patience=self.patience, count=True)
        if not finite:
            return self._bad_batch(seen, "loss or gradient not finite", limit=self.max_skips, margin=0)
        if self._is_fresh(seen) and self._still_bad(seen):
            return self._bad_batch(seen, "loss is still high in the restored state", limit=1, margin=self.margin)
        spiking = self._spiking(seen)
        if spiking == ["grad_norm"]:
            return self._gradient_alone(seen)
        if spiking:
            return self._bad_batch(seen, f"{' and '.join(spiking)} spiked", limit=self.probe, margin=self.margin)
        self._run = 0
        self._learn(seen, "loss", "grad_norm")
        self._losses = [*self._losses[-REMEMBERED + 1 :], (seen.step, seen.loss)]
        return self._capped(seen)

    def after_step(self, seen: Seen, live: Live) -> Action:
        if "update_norm" not in seen.verdicts and not self._cooling(seen):
            self._learn(seen, "update_norm", "lr")
            return CONTINUE
        loud = leads({"update_norm": seen.verdicts.get("update_norm", "ok")})
        self._alarms = self._alarms.after(seen, loud=loud, patience=self.patience, count=False)
        if seen.verdicts.get("update_norm") == "nonfinite":
            return self._failed(seen, "the update was not finite: the weights are broken", margin=0)
        jump = self._jump(seen)
        rides = seen.step <= self._ride_until
        if (
            jump >= self.least_jump
            and "grad_norm" not in seen.verdicts
            and not rides
            and self._acts(seen, "update_norm", ("spike", "shift"))
        ):
            return self._failed(
                seen, f"update jumped x{jump:.3g}, gradient quiet: rate or state fault", margin=self.margin, jump=jump
            )
        self._learn(seen, "update_norm", "lr")
        return CONTINUE

    def after_rewind(self, step: int) -> None:
        """What is normal is kept: only steps without a verdict taught it, and the cool-down needs it at once."""
        self._run, self._alarms, self._cool_until = 0, Alarms(), step + self.cooldown
        self._fresh = self._fresh._replace(step=step, skipped=0)

    def state_dict(self) -> dict[str, Any]:
        return packed(
            self,
            run=self._run,
            onset=None if self._alarms.onset is None else list(self._alarms.onset),
            quiet=self._alarms.quiet,
            place=list(self._place),
            cool_until=self._cool_until,
            ride_until=self._ride_until,
            slow_until=self._slow_until,
            rewound=list(self._rewound),
            fresh=list(self._fresh),
            cap=list(self._cap),
            losses=[list(pair) for pair in self._losses],
            normal={signal: list(values) for signal, values in self._normal.items()},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        clocks = ("run", "cool_until", "ride_until", "slow_until")
        got = unpacked(self, state, (*clocks, "onset", "quiet", "place", "rewound", "fresh", "cap", "losses", "normal"))
        self._run, self._cool_until, self._ride_until, self._slow_until = (got[name] for name in clocks)
        self._rewound, self._fresh, self._cap = list(got["rewound"]), Fresh(*got["fresh"]), Cap(*got["cap"])
        self._alarms = Alarms(None if got["onset"] is None else (got["onset"][0], got["onset"][1]), got["quiet"])
        self._place = Place(*got["place"])
        self._losses = [(step, loss) for step, loss in got["losses"]]
        self._normal = {signal: list(got["normal"][signal]) for signal in SIGNALS}

    def _spiking(self, seen: Seen) -> list[str]:
        """Which of loss and gradient call for action now."""
        if seen.step <= self._ride_until:
            return []
        found = [signal for signal in ("loss", "grad_norm") if self._acts(seen, signal, ("spike",))]
        usual = self._usual("grad_norm")
        if found == ["grad_norm"] and seen.grad_norm < self.alone * usual:
            return []  # clipping and the moments' own memory take it, and skipping it would bias what is learnt
        return found

    def _gradient_alone(self, seen: Seen) -> Action:
        if self._run < self.probe - 1:
            self._run += 1
            what = f"grad_norm spiked, loss calm (batch {self._run} of {self.probe} before it is taken as it is)"
            return self._said(SkipStep(what), seen)
        first = self._run < self.probe
        self._run = self.probe
        return Continue("grad_norm stays high while the loss is calm: taken as it is" if first else "")

    def _is_fresh(self, seen: Seen) -> bool:
        return 0 <= seen.step - self._fresh.step <= FRESH_STEPS and self._fresh.skipped < self.max_fresh

    def _still_bad(self, seen: Seen) -> bool:
        """By the loss alone: its detector takes so long a row for the new normal, and the state shows it is not."""
        return seen.loss >= self._fresh.bar

    def _bad_batch(self, seen: Seen, what: str, *, limit: int, margin: int) -> Action:
        """Skip it; the last of `limit` in a row shows that it is not the batch, unless the state is just restored."""
        self._run += 1
        if self._is_fresh(seen) and (is_finite(seen) or self._fresh.skipped < FRESH_BROKEN):
            self._fresh = self._fresh._replace(skipped=self._fresh.skipped + 1)
            return self._said(SkipStep(f"{what}: it is the data (batch {self._fresh.skipped} after the rewind)"), seen)
        if self._run < limit:
            return self._said(SkipStep(f"{what} (batch {self._run} of {limit} before a rewind)"), seen)
        return self._failed(seen, f"{what}, {self._run} batches in a row", margin=margin)

    def _failed(self, seen: Seen, reason: str, *, margin: int, jump: float = 1.0) -> Action:
        """The state is damaged: where to go, what to skip, how fast to go on; or the end of the ladder."""
        if not seen.healthy:
            return self._stuck(seen, reason)
        broken = not is_finite(seen) or seen.verdicts.get("update_norm") == "nonfinite"
        rate_grew = jump > 1 and seen.lr >= self.least_jump * self._usual("lr")
        place = self._place.failed(seen.step, reach=self.place)
        if place.failures >= self.attempts:
            self._place = place
            reason = f"{reason}; failure {place.failures} at one place (step {seen.step})"
            if broken or self.exhausted == "stop":
                return self._said(Stop(reason), seen)
            return self._ride(seen, f"{reason}: going back does not help", 1 / jump if rate_grew else 1.0)
        self._rewound = [step for step in self._rewound if seen.step - step < self.per]
        if not broken and len(self._rewound) >= self.rewinds:
            return self._ride(seen, f"{reason}; {self.rewinds} rewinds within {self.per} steps", 1.0)
        self._rewound.append(seen.step)
        rewind = self._rewind(seen, place, reason, margin=margin)
        if place.failures > 1 and rate_grew:
            self._cap = Cap(self._usual("lr"), 0, seen.step + self.place)
        if place.failures > 1 and broken:
            rewind = self._slower(rewind, seen)
        return self._said(rewind, seen)

    def _rewind(self, seen: Seen, place: Place, reason: str, *, margin: int) -> Rewind:
        again = place.failures > 1
        step, batch = self._alarms.onset or (seen.step, seen.batch_id)
        # Further back means strictly before the last target, which did not help.
        until = min(step - margin, place.target - 1) if again else step - margin
        target = newest(seen.healthy, until=until)
        length = seen.batch_id + 1 - batch
        if again:
            length = max(length, 2 * max(length, place.skipped))
        self._place = place._replace(target=target, skipped=length)
        self._fresh = Fresh(target, 0, self._bar(seen, target))
        return Rewind(target, (batch, batch + length), f"{reason}; onset at step {step}")

    def _slower(self, rewind: Rewind, seen: Seen) -> Rewind:
        """Until `lr_steps` beyond the step at which it broke again."""
        slow = self.lr_steps + max(0, seen.step - rewind.to_step)
        self._slow_until = rewind.to_step + slow + self.rewarm
        return rewind._replace(lr_factor=self.lr_factor, lr_steps=slow, rewarm=self.rewarm)

    def _bar(self, seen: Seen, target: int) -> float:
        """Half way from the loss that the snapshot had to the one that is bad; infinite where it is no higher."""
        then = [loss for step, loss in self._losses if abs(step - target) <= NEAR]
        if "loss" not in seen.verdicts or not math.isfinite(seen.loss) or not then:
            return math.inf
        expected = statistics.median(then)
        return (expected + seen.loss) / 2 if expected < seen.loss else math.inf

    def _ride(self, seen: Seen, reason: str, most: float) -> Action:
        """On it goes, for `per` steps, at `riding_factor` times the rate, or at `most` of it where that is less."""
        self._run, self._ride_until = 0, seen.step + self.per
        factor, what = min(self.riding_factor, most), f"{reason}: this run spikes, riding it out"
        if factor == 1:
            return Continue(what)
        self._slow_until = max(self._slow_until, seen.step + self.per + self.rewarm)
        return self._said(ScaleLR(factor, self.per, self.rewarm, what), seen)

    def _capped(self, seen: Seen) -> Action:
        """After a rate fault that came back the rate may rise, but no faster than weights can follow."""
        if seen.step > self._cap.until:
            return CONTINUE
        allowed = self._cap.rate * 2 ** (self._cap.steps / DOUBLE_STEPS)
        if seen.lr <= allowed:
            return CONTINUE
        self._cap = self._cap._replace(steps=self._cap.steps + 1, until=seen.step + self.place)
        first = self._cap.steps == 1
        reason = f"rate {seen.lr:.3g} jumped: held at {allowed:.3g}, doubling every {DOUBLE_STEPS} steps"
        action = ScaleLR(allowed / seen.lr, 1, 0, reason if first else "")
        return action if not self.dry_run else Continue(f"dry run: {reason}" if first else "")

    def _stuck(self, seen: Seen, reason: str) -> Action:
        """No snapshot to go back to: a broken state ends the run, a merely loud one goes on, said once."""
        if not is_finite(seen) or seen.verdicts.get("update_norm") == "nonfinite":
            return self._said(Stop(f"{reason}; there is no healthy snapshot to go back to"), seen)
        first = self._run <= self.probe
        return Continue(f"{reason}; there is no healthy snapshot to go back to: taken as it is" if first else "")

    def _said(self, action: SkipStep | Rewind | ScaleLR | Stop, seen: Seen) -> Action:
        """The action, or in a dry run what it would have been; an incident is then told once per cool-down."""
        if not self.dry_run:
            return action
        if isinstance(action, SkipStep):
            return Continue(f"dry run: would skip the step: {action.reason}")
        if isinstance(action, ScaleLR):
            return Continue(f"dry run: would scale the rates: {action.reason}")
        self.after_rewind(seen.step)
        self._fresh = Fresh()  # nothing was restored
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
        slowed = seen.step <= self._slow_until or (0 < self._cap.steps and seen.step <= self._cap.until)
        for signal in signals:
            if slowed and signal in ("update_norm", "lr"):
                continue  # what is slow by our own doing is not what is usual
            value = getattr(seen, signal)
            if signal not in seen.verdicts and math.isfinite(value):
                self._normal[signal] = [*self._normal[signal], value][-MEMORY:]
