"""Rules that count standard deviations or MADs over a window: D5, D6, D8, D9, D11, D20 of the survey.

Each repeats what its source decides, also where that is wrong (see `ratios`). Where the survey writes MAD, the scaled
one is meant: only that gives the false alarms that it measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from aftershock.numerics import MAD_TO_SIGMA
from aftershock.signals.detect.peers.windowed import Windowed, WindowState
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import Rule, Step
from aftershock.signals.detect.windows import mean, median_mad, push, std


@dataclass(frozen=True, kw_only=True)
class OlmoSkip(Windowed):
    """D5: not (x - mean <= 6 std) over the last 128, sample std without floor, from the 64th value on; all enter.

    Known defects: one NaN skips the next 128 good steps; a spike enters the window and masks those after it; blind for
    the first 63 steps. Its window is in no state_dict; ours is, since the interface asks for it.
    """

    source: ClassVar[str] = "OLMo-core optim/skip_step_optimizer.py SkipStepOptimizer"
    reads: ClassVar[tuple[Role, ...]] = ("loss", "gradient")
    window: int = 128
    sigmas: float = 6.0

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        if len(window) + 1 < max(20, self.window // 2):
            return False
        return not (value - mean(window) <= self.sigmas * std(window, sample=True))


@dataclass(frozen=True, kw_only=True)
class LevanterSkip(Windowed):
    """D5 as Levanter has it: population std with a floor of 1e-6, NaN left out of both, from the 65th value on.

    The ring holds 129 values. Known defects: as for OLMo a spike enters the window and masks those after it; blind for
    the first 64 steps; the floor of 1e-6 makes any move of a constant signal a spike.
    """

    source: ClassVar[str] = "Levanter optim/skipstep.py SkipStepConfig"
    reads: ClassVar[tuple[Role, ...]] = ("loss", "gradient")
    window: int = 128
    sigmas: float = 6.0
    floor: float = 1e-6

    @property
    def size(self) -> int:
        return self.window + 1

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        if len(window) < max(2, self.window // 2):
            return False
        valid = [v for v in window if v == v]
        middle, spread = (mean(valid), std(valid)) if valid else (0.0, self.floor)
        middle = middle if math.isfinite(middle) else math.copysign(3.4028235e38, middle)  # nan_to_num, float32
        spread = max(spread, self.floor) if math.isfinite(spread) else self.floor
        return not (value <= middle + self.sigmas * spread)


@dataclass(frozen=True, kw_only=True)
class StabilityMonitor(Windowed):
    """D6: x > mean + 6 population std over the last 128, once full; a std below 1e-10 is ignored; all values enter.

    Known defects: blind for the first 128 steps, to NaN, for 128 steps after one, and on a constant signal; a spike
    enters the window and masks those after it.
    """

    source: ClassVar[str] = "OLMo-core train/callbacks/stability_monitor.py StabilityMonitorCallback"
    reads: ClassVar[tuple[Role, ...]] = ("loss", "gradient")
    window: int = 128
    sigmas: float = 6.0

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        if len(window) < self.window:
            return False
        spread = std(window)
        return spread >= 1e-10 and value > mean(window) + self.sigmas * spread


@dataclass(frozen=True, kw_only=True)
class SpikeScore(Windowed):
    """D6b: at least 7 std away from the mean of the last 1,000, on either side; all values enter. From 1,000 on.

    Known defects: a fast improvement is a spike to it; blind for the first 1,000 steps and for 1,000 after a NaN.
    """

    source: ClassVar[str] = "OLMo 2 paper (2025), spike score"
    reads: ClassVar[tuple[Role, ...]] = ("loss", "gradient")
    window: int = 1000
    sigmas: float = 7.0

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        if len(window) < self.window:
            return False
        spread = std(window)
        return spread > 0 and abs(value - mean(window)) >= self.sigmas * spread


class ZClipState(NamedTuple):
    """`warmup` norms until there are 25 of them, then their moving mean and variance."""

    warmup: tuple[float, ...]
    mean: float
    var: float
    ready: bool


@dataclass(frozen=True, kw_only=True)
class ZClip(Rule[ZClipState]):
    """D8: z = (g - mean) / (std + 1e-6) > 2.5, moving mean and variance (0.97) after 25 norms; an outlier enters as
    mean + 2.5 std / (z / 2.5).

    Known defects: one NaN norm makes the mean NaN for ever, so it never fires again; 2.5 sigma is 33 false alarms in
    1,000 quiet steps; any move of a constant signal is an outlier.
    """

    source: ClassVar[str] = "ZClip zclip.py, mode zscore, adaptive_scaling"
    reads: ClassVar[tuple[Role, ...]] = ("gradient",)
    warmup: int = 25
    threshold: float = 2.5
    alpha: float = 0.97

    def init(self) -> ZClipState:
        return ZClipState((), 0.0, 0.0, False)

    def update(self, state: ZClipState, value: float) -> Step[ZClipState]:
        if not state.ready:
            warmup = (*state.warmup, value)
            if len(warmup) < self.warmup:
                return Step(ZClipState(warmup, 0.0, 0.0, False), "ok")
            return Step(ZClipState((), mean(warmup), std(warmup) * std(warmup), True), "ok")
        spread = math.sqrt(state.var)
        z = (value - state.mean) / (spread + 1e-6)
        fires = z > self.threshold
        kept = state.mean + self.threshold * spread / (z / self.threshold) if fires else value
        middle = self.alpha * state.mean + (1 - self.alpha) * kept
        var = self.alpha * state.var + (1 - self.alpha) * (kept - middle) * (kept - middle)
        return Step(ZClipState((), middle, var, True), "spike" if fires else "ok")


@dataclass(frozen=True, kw_only=True)
class LevanterUpdate(Windowed):
    """D9: update norm > mean + 3 population std (at least 1e-6) over the last 128, once full; all norms enter.

    Known defects: a NaN blinds it for 128 steps; 3 sigma alarms on quiet runs; a spike masks those after it.
    """

    source: ClassVar[str] = "Levanter optim/clip_update_norm.py"
    reads: ClassVar[tuple[Role, ...]] = ("update",)
    window: int = 128
    sigmas: float = 3.0
    floor: float = 1e-6

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        full = len(window) == self.window
        return full and value > mean(window) + self.sigmas * max(self.floor, std(window))


class CusumState(NamedTuple):
    """Last losses, and the sums upward and downward."""

    window: tuple[float, ...]
    up: float
    down: float


@dataclass(frozen=True, kw_only=True)
class Trainscope(Rule[CusumState]):
    """D11: z = (L - median) / (1.4826 MAD) over the last 200, from 30 on; S+ = max(0, S+ + z - 1), S- = min(0, S- + z
    + 1); fires at S+ >= 6 or S- <= -6 and resets both. Every value enters. A MAD of 0 counts as 1e-12.

    Known defects: two-sided, so it fires on fast improvement; on a quantised signal, whose MAD is 0, any move fires;
    after a NaN nothing fires while it is in the window.
    """

    source: ClassVar[str] = "trainscope 1.8.1, detector cusum"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    window: int = 200
    arm_after: int = 30
    slack: float = 1.0
    limit: float = 6.0

    def init(self) -> CusumState:
        return CusumState((), 0.0, 0.0)

    def update(self, state: CusumState, value: float) -> Step[CusumState]:
        window, up, down = state
        fires = False
        if len(window) >= self.arm_after:
            middle, mad = median_mad(window)
            z = (value - middle) / max(MAD_TO_SIGMA * mad, 1e-12)
            up, down = max(0.0, up + z - self.slack), min(0.0, down + z + self.slack)
            fires = up >= self.limit or -down >= self.limit
            up, down = (0.0, 0.0) if fires else (up, down)
        return Step(CusumState(push(window, value, self.window), up, down), "spike" if fires else "ok")


@dataclass(frozen=True, kw_only=True)
class TrainscopeZ(Windowed):
    """D11, alternative: z = (L - mean) / std > 3.5 over the last 200, from 30 on; every value enters.

    Known defects: a spike enters the window and masks those after it; a NaN blinds it for 200 steps.
    """

    source: ClassVar[str] = "trainscope 1.8.1, detector zscore"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    window: int = 200
    arm_after: int = 30
    sigmas: float = 3.5

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        return len(window) >= self.arm_after and value - mean(window) > self.sigmas * std(window) > 0


@dataclass(frozen=True, kw_only=True)
class TrainscopePercentile(Windowed):
    """D11, alternative: below the 1st or above the 99th percentile of the last 200, from 30 on; every value enters.

    Known defects: fires on about 2 % of healthy steps by construction, on either side; a NaN is not reported, and
    leaves the order of the window undefined.
    """

    source: ClassVar[str] = "trainscope 1.8.1, detector percentile"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    window: int = 200
    arm_after: int = 30
    share: float = 0.01

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        if len(window) < self.arm_after:
            return False
        ordered = sorted(window)
        return value < _quantile(ordered, self.share) or value > _quantile(ordered, 1 - self.share)


@dataclass(frozen=True, kw_only=True)
class MedianMad(Rule[WindowState]):
    """D20: (x - median) / (1.4826 MAD) > 8 over the last 128, from 16 on; a flagged value stays out, NaN is an event.

    Known defects: nothing ends an alarm after a step of the level; a MAD of 0 (counted as 1e-12) makes any move of a
    quantised signal a spike. What the reference adds to it is in `robust`.
    """

    source: ClassVar[str] = "the survey's reference rule"
    reads: ClassVar[tuple[Role, ...]] = ("loss", "gradient")
    window: int = 128
    arm_after: int = 16
    threshold: float = 8.0

    def init(self) -> WindowState:
        return WindowState(())

    def update(self, state: WindowState, value: float) -> Step[WindowState]:
        if not math.isfinite(value):
            return Step(state, "nonfinite")
        window = state.window
        if len(window) >= self.arm_after:
            middle, mad = median_mad(window)
            if value - middle > self.threshold * max(MAD_TO_SIGMA * mad, 1e-12):
                return Step(state, "spike")
        return Step(WindowState(push(window, value, self.window)), "ok")


def _quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of an ascending list."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
