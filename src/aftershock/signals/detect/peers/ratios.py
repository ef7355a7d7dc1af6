"""Rules that compare a value with a multiple of a mean or of an earlier value: D1 to D4, D7, D12 of the survey.

Each repeats what its source decides, also where that is wrong: a comparison with NaN is false, and a NaN that the
source lets into its window stays there. Must not import anything else of aftershock but the interface and windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import Rule, Step
from aftershock.signals.detect.windows import mean, push


class LightningState(NamedTuple):
    """Last accepted losses."""

    accepted: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Lightning(Rule[LightningState]):
    """D1: not finite, or L > last and |L - mean| >= 2 |mean| over the last 10 accepted losses; spikes are not added.

    Known defects: blind below three times the mean; after a step of the level by more it alarms for ever.
    """

    source: ClassVar[str] = "Lightning lightning.fabric.utilities.spike.SpikeDetection"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    window: int = 10
    rtol: float = 2.0
    atol: float = 0.0

    def init(self) -> LightningState:
        return LightningState(())

    def update(self, state: LightningState, value: float) -> Step[LightningState]:
        if not math.isfinite(value):
            return Step(state, "spike")
        accepted = state.accepted
        if accepted and value > accepted[-1]:
            middle = mean(accepted)
            away = abs(value - middle)
            if away >= self.atol and away >= self.rtol * abs(middle):
                return Step(state, "spike")
        return Step(LightningState(push(accepted, value, self.window)), "ok")


class KillLossSpikeState(NamedTuple):
    """`cap` is nan until the first window is full; `count` outliers in a row."""

    window: tuple[float, ...]
    count: int
    steps: int
    cap: float


@dataclass(frozen=True, kw_only=True)
class KillLossSpike(Rule[KillLossSpikeState]):
    """D2: the fifth loss in a row of at least twice the mean of the last 100; or, from step 200 on, half of the last
    100 above min(max of the first 100, 10).

    Known defects: a spike of fewer than five steps is invisible; every loss enters the window, so one NaN blinds it
    for 100 steps; blind for the first 100.
    """

    source: ClassVar[str] = "llm-foundry callbacks/kill_loss_spike_callback.py KillLossSpike"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    window: int = 100
    multiplier: float = 2.0
    patience: int = 4
    loss_cap: float = 10.0

    def init(self) -> KillLossSpikeState:
        return KillLossSpikeState((), 0, 0, math.nan)

    def update(self, state: KillLossSpikeState, value: float) -> Step[KillLossSpikeState]:
        window, count, steps, cap = state
        fires = False
        if len(window) == self.window:
            cap = min(max(window), self.loss_cap) if math.isnan(cap) else cap
            count = count + 1 if value >= self.multiplier * mean(window) else 0
            fires = count > self.patience
            if not fires and steps >= 2 * self.window:
                fires = sum([loss > cap for loss in window]) >= self.window / 2
        new = KillLossSpikeState(push(window, value, self.window), count, steps + 1, cap)
        return Step(new, "spike" if fires else "ok")


class DelayedMeanState(NamedTuple):
    """`recent` values wait until they are old enough for `old`, whose mean is the baseline."""

    recent: tuple[float, ...]
    old: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DelayedMean(Rule[DelayedMeanState]):
    """D3: x > 7.5 times the mean of x[t-1000 .. t-500]; every value enters.

    Known defects: blind for the first 500 steps; a NaN blinds it for 500 steps, 500 steps later; blind below 7.5 times.
    """

    source: ClassVar[str] = "llm-foundry optim/outlier_detection.py OutlierDetector"
    reads: ClassVar[tuple[Role, ...]] = ("gradient", "update")
    threshold: float = 7.5
    delay: int = 500

    def init(self) -> DelayedMeanState:
        return DelayedMeanState((), ())

    def update(self, state: DelayedMeanState, value: float) -> Step[DelayedMeanState]:
        recent, old = state
        if len(recent) >= self.delay:
            recent, old = recent[1:], push(old, recent[0], self.delay)
        fires = bool(old) and value > self.threshold * mean(old)
        return Step(DelayedMeanState((*recent, value), old), "spike" if fires else "ok")


class MegatronState(NamedTuple):
    """`peak` of the first `count` finite values."""

    peak: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Megatron(Rule[MegatronState]):
    """D4: |x| >= 10 times the largest of the first 100 finite values, which is never updated again; NaN is ignored.

    Known defects: measured against the loss at initialisation, so it sees no training dynamics; NaN and Inf pass; blind
    for the first 100 steps.
    """

    source: ClassVar[str] = "Megatron-LM core/rerun_state_machine.py is_unexpectedly_large"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    factor: float = 10.0
    samples: int = 100

    def init(self) -> MegatronState:
        return MegatronState(0.0, 0)

    def update(self, state: MegatronState, value: float) -> Step[MegatronState]:
        if not math.isfinite(value):
            return Step(state, "ok")
        if state.count < self.samples:
            return Step(MegatronState(max(state.peak, abs(value)), state.count + 1), "ok")
        return Step(state, "spike" if abs(value) >= self.factor * state.peak else "ok")


class MetaseqState(NamedTuple):
    """The average, and how many losses there were."""

    average: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Metaseq(Rule[MetaseqState]):
    """D7: L over its moving average (alpha = 2 / (9 + 1)) exceeds `threshold`; the average then stays.

    Known defects: with the default -1 every step fires, and the average is the first loss for ever; with any threshold
    a NaN enters the average and silences it for good; after a step of the level it alarms for ever.
    """

    source: ClassVar[str] = "metaseq trainer.py, the ratio of loss to its average"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    threshold: float = -1.0
    alpha: float = 0.2

    def init(self) -> MetaseqState:
        return MetaseqState(0.0, 0)

    def update(self, state: MetaseqState, value: float) -> Step[MetaseqState]:
        average, steps = state
        if steps == 0:
            return Step(MetaseqState(value, 1), "ok")
        if average != 0 and value / average > self.threshold:
            return Step(MetaseqState(average, steps + 1), "spike")
        return Step(MetaseqState((1 - self.alpha) * average + self.alpha * value, steps + 1), "ok")


class LastState(NamedTuple):
    """The last reading, nan before the first."""

    last: float


@dataclass(frozen=True, kw_only=True)
class FlagScale(Rule[LastState]):
    """D12: (L - last) / last >= 0.2; `last` stays on a spike, and a NaN just replaces it.

    Known defects: a NaN is not reported, and neither is a spike right after it; after a step of the level by a fifth it
    alarms for ever; noise of a fifth alarms.
    """

    source: ClassVar[str] = "FlagScale train: loss spike check"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    threshold: float = 0.2

    def init(self) -> LastState:
        return LastState(math.nan)

    def update(self, state: LastState, value: float) -> Step[LastState]:
        if state.last != 0 and (value - state.last) / state.last >= self.threshold:
            return Step(state, "spike")
        return Step(LastState(value), "ok")


@dataclass(frozen=True, kw_only=True)
class InternEvo(Rule[LastState]):
    """D12, second rule: L > 1.5 times the reading before. The source reads every 300 s; here each value is a reading.

    Known defects: a plateau after the step is normal at once, so a spike shorter than the interval is missed; a NaN is
    not reported, nor a spike right after it.
    """

    source: ClassVar[str] = "InternEvo monitor: loss alert"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    threshold: float = 1.5

    def init(self) -> LastState:
        return LastState(math.nan)

    def update(self, state: LastState, value: float) -> Step[LastState]:
        return Step(LastState(value), "spike" if value > self.threshold * state.last else "ok")
