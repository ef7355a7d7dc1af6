"""Lower the rate for a while, then bring it back to the schedule.

Both use `ScaleLR`, so the guard owns the change and no scheduler undoes it. Must not import the guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Live, ScaleLR, Seen


@dataclass(kw_only=True, eq=False)
class BackOff(Editor):
    """On the `after`-th spike of loss or gradient norm, all rates times `factor` for `steps` steps, then re-warmed.

    Soup and entrenar: factor 0.5 at once; dlib's loss plateau: 0.1; OPT and GLM: 0.5 after repeated failure (`after`);
    Marin re-warmed over 1,000 steps (`rewarm`). Spikes while the rate is low or rising lower it again, down to
    `floor` of the schedule's. Spikes more than `place` steps apart are not counted together.

    Example:
        guard = Guard(model, optimizer, policy=BackOff(factor=0.1, after=3))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("count", "last", "factor_now", "until", "quiet_until")

    factor: float = 0.5
    after: int = 1
    steps: int = 100
    rewarm: int = 1000
    floor: float = 0.01
    place: int = 100
    cooldown: int = 20
    """Steps after a back-off in which a spike counts as the same one."""

    _count: int = field(default=0, init=False, repr=False)
    _last: int = field(default=-1, init=False, repr=False)
    _factor_now: float = field(default=1.0, init=False, repr=False)
    _until: int = field(default=-1, init=False, repr=False)
    _quiet_until: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, factor=1e-9, after=1, steps=1, rewarm=0, floor=1e-9, place=0, cooldown=0)
        if self.factor >= 1 or self.floor > 1:
            raise ValueError(f"BackOff: factor must be below 1 and floor at most 1, got {self.factor}, {self.floor}")

    def edit(self, seen: Seen, live: Live) -> Action:
        loud = [signal for signal in ("loss", "grad_norm") if seen.verdicts.get(signal) == "spike"]
        if not loud or seen.step < self._quiet_until:
            return CONTINUE
        self._count = self._count + 1 if 0 <= self._last and seen.step - self._last <= self.place else 1
        self._last = seen.step
        if self._count < self.after:
            return CONTINUE
        if seen.step >= self._until:
            self._factor_now = 1.0
        self._factor_now = max(self.floor, self._factor_now * self.factor)
        self._until = seen.step + self.steps + self.rewarm
        self._quiet_until = seen.step + self.cooldown
        return ScaleLR(
            self._factor_now, self.steps, self.rewarm, f"{' and '.join(loud)} spiked ({self._count} near here)"
        )

    def after_rewind(self, step: int) -> None:
        """The run is before the last spike again; whether the guard kept the lower rate is told by the next action."""
        self._count, self._last, self._factor_now, self._until, self._quiet_until = 0, -1, 1.0, -1, -1


@dataclass(kw_only=True, eq=False)
class RatioBackOff(Editor):
    """This step's rates times (loss / average)^-`power` where that ratio exceeds `threshold` (metaseq, OPT-175B).

    The average is debiased, moves by 0.2 a step (1 - `decay`) and takes in losses whose ratio is within the threshold;
    in the source's default it never moves after the first loss, and any ratio above 1 counts: threshold=1 gives that
    rule with a moving average, 1.1 is ours. Losses must be positive: others pass.

    Example:
        guard = Guard(model, optimizer, policy=RatioBackOff())
    """

    SAVED: ClassVar[tuple[str, ...]] = ("moment", "weight")

    power: float = 4.0
    threshold: float = 1.1
    decay: float = 0.8

    _moment: float = field(default=0.0, init=False, repr=False)
    _weight: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, power=0, threshold=1, decay=0)
        if self.decay >= 1:
            raise ValueError(f"RatioBackOff: decay must be below 1, got {self.decay}")

    def edit(self, seen: Seen, live: Live) -> Action:
        if seen.loss <= 0:
            return CONTINUE
        ratio = seen.loss * self._weight / self._moment if self._moment > 0 else 1.0
        if ratio > self.threshold and math.isfinite(ratio):
            return ScaleLR(ratio**-self.power, 1, 0, f"loss {ratio:.3g} times its average")
        self._moment = self.decay * self._moment + (1 - self.decay) * seen.loss
        self._weight = self.decay * self._weight + (1 - self.decay)
        return CONTINUE
