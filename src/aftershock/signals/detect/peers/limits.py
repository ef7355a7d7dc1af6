"""Rules with a fixed limit on a value or on a ratio, and dlib's test of the slope: D10, D13 to D19 of the survey.

Each repeats what its source decides, also where that is wrong (see `ratios`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from aftershock.signals.detect.peers.windowed import Windowed
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import Rule, Step
from aftershock.signals.detect.windows import mean, median


class CountState(NamedTuple):
    """Values above the limit in a row."""

    count: int


@dataclass(frozen=True, kw_only=True)
class Axolotl(Rule[CountState]):
    """D10: the third logged loss in a row above an absolute limit (5.0 in its documentation).

    Known defects: the limit is absolute, so it sees a start as a spike and no spike below it; a NaN never triggers and
    breaks the row.
    """

    source: ClassVar[str] = "axolotl loss_watchdog_threshold, loss_watchdog_patience"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    limit: float = 5.0
    patience: int = 3

    def init(self) -> CountState:
        return CountState(0)

    def update(self, state: CountState, value: float) -> Step[CountState]:
        count = state.count + 1 if value > self.limit else 0
        return Step(CountState(count), "spike" if count >= self.patience else "ok")


@dataclass(frozen=True, kw_only=True)
class MindFormers(Rule[CountState]):
    """D13: gradient norm above an absolute limit (1.0 in its documentation) skips the update; ten in a row end the run.

    Both are `spike` here; `count` in the state tells them apart. Known defects: absolute, so it fires on each step of
    a run with larger norms; a NaN norm passes.
    """

    source: ClassVar[str] = "MindFormers skip_data, gradient norm threshold"
    reads: ClassVar[tuple[Role, ...]] = ("gradient",)
    limit: float = 1.0

    def init(self) -> CountState:
        return CountState(0)

    def update(self, state: CountState, value: float) -> Step[CountState]:
        fires = value > self.limit
        return Step(CountState(state.count + 1 if fires else 0), "spike" if fires else "ok")


class DlibState(NamedTuple):
    """Losses since a little before the last sync, how many are new, and the threshold on P(slope > 0)."""

    losses: tuple[float, ...]
    fresh: int
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Dlib(Rule[DlibState]):
    """D14: at each sync of 30 new losses, P(slope > 0) of a line through them and `overlap` before exceeds p, or one is
    NaN: back-track, and p <- 0.1 p + 0.9; else p <- p^10. p stays within 0.99 and 0.99999.

    Known defects: nothing is decided between syncs, so a NaN or a spike is known up to 29 steps late; a single spike
    does not make a slope.
    """

    source: ClassVar[str] = "dlib dnn/trainer.h, loss_increased_since_last_disk_sync"
    reads: ClassVar[tuple[Role, ...]] = ("loss",)
    every: int = 30
    overlap: int = 10
    threshold: float = 0.99

    def init(self) -> DlibState:
        return DlibState((), 0, self.threshold)

    def update(self, state: DlibState, value: float) -> Step[DlibState]:
        losses, fresh = (*state.losses, value), state.fresh + 1
        if fresh < self.every:
            return Step(DlibState(losses, fresh, state.threshold), "ok")
        fires = any(map(math.isnan, losses)) or _probability_rising(losses) > state.threshold
        moved = 0.1 * state.threshold + 0.9 if fires else state.threshold**10
        threshold = min(0.99999, max(self.threshold, moved))
        kept = () if fires else losses[-self.overlap :]
        return Step(DlibState(kept, 0, threshold), "drift" if fires else "ok")


class RunMeanState(NamedTuple):
    """Sum and count of absolute values since the start."""

    total: float
    count: int


@dataclass(frozen=True, kw_only=True)
class GradientSpikeScore(Rule[RunMeanState]):
    """D15: |g| over the mean of |g| in the run so far exceeds 50; every value enters.

    Known defects: early, large gradients raise the mean for the whole run; one NaN silences it for ever.
    """

    source: ClassVar[str] = "SPAM paper (2025), gradient spike score"
    reads: ClassVar[tuple[Role, ...]] = ("gradient",)
    threshold: float = 50.0

    def init(self) -> RunMeanState:
        return RunMeanState(0.0, 0)

    def update(self, state: RunMeanState, value: float) -> Step[RunMeanState]:
        fires = state.count > 0 and abs(value) * state.count > self.threshold * state.total
        return Step(RunMeanState(state.total + abs(value), state.count + 1), "spike" if fires else "ok")


class SpamState(NamedTuple):
    """Second moment, and steps since it was last reset."""

    v: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Spam(Rule[SpamState]):
    """D15 in the optimizer: g^2 > 5000 v, v before the update and not bias-corrected; a spike enters clipped. v is
    reset every 500 steps, and the rule is off for the first 20 steps after that.

    Known defects: off for 20 of every 500 steps; after the 20 steps v is 50 times too small, so the limit starts low; a
    NaN silences it up to the next reset.
    """

    source: ClassVar[str] = "SPAM optimizer, gradient spike clip"
    reads: ClassVar[tuple[Role, ...]] = ("gradient",)
    threshold: float = 5000.0
    beta2: float = 0.999
    warmup: int = 20
    reset: int = 500

    def init(self) -> SpamState:
        return SpamState(0.0, 0)

    def update(self, state: SpamState, value: float) -> Step[SpamState]:
        v, steps = state
        if steps == self.reset:
            v, steps = 0.0, 0
        square = value * value
        fires = steps >= self.warmup and square > self.threshold * v
        square = self.threshold * v if fires else square
        return Step(SpamState(self.beta2 * v + (1 - self.beta2) * square, steps + 1), "spike" if fires else "ok")


class NoState(NamedTuple):
    """Nothing is remembered."""


@dataclass(frozen=True, kw_only=True)
class RmsRatio(Rule[NoState]):
    """D16: RMS_t = sqrt(mean(g^2 / max(v, eps^2))) of a tensor exceeds 2.3.

    Known defects: the ceiling of RMS_t is 1 / sqrt(1 - beta2), so one number cannot fit all beta2; NaN passes.
    """

    source: ClassVar[str] = "Wortsman et al. 2023 (arXiv 2304.13013), early warning of StableAdamW"
    reads: ClassVar[tuple[Role, ...]] = ("rms_t",)
    limit: float = 2.3

    def init(self) -> NoState:
        return NoState()

    def update(self, state: NoState, value: float) -> Step[NoState]:
        return Step(state, "spike" if value > self.limit else "ok")


@dataclass(frozen=True, kw_only=True)
class CurvatureEdge(Rule[CountState]):
    """D17: the directional curvature of the preconditioned Hessian passes 2 / eta, `sustained` steps in a row.

    `value` is that curvature as a share of the edge, kappa eta / 2. Known defects: it needs a Hessian-vector product
    a step; NaN passes.
    """

    source: ClassVar[str] = "arXiv 2506.04805 (2025), curvature predictor"
    reads: ClassVar[tuple[Role, ...]] = ("curvature",)
    limit: float = 1.0
    sustained: int = 1

    def init(self) -> CountState:
        return CountState(0)

    def update(self, state: CountState, value: float) -> Step[CountState]:
        count = state.count + 1 if value > self.limit else 0
        return Step(CountState(count), "spike" if count >= self.sustained else "ok")


@dataclass(frozen=True, kw_only=True)
class LogitCap(Rule[NoState]):
    """D18: the max attention logit of a head, or |log Z|, exceeds tau = 100.

    Known defects: absolute, so growth below it is silent and a level above it alarms for ever; NaN passes.
    """

    source: ClassVar[str] = "Kimi K2 (2025), QK-clip; arXiv 2309.14322, section 3"
    reads: ClassVar[tuple[Role, ...]] = ("logit", "log_z")
    limit: float = 100.0

    def init(self) -> NoState:
        return NoState()

    def update(self, state: NoState, value: float) -> Step[NoState]:
        return Step(state, "spike" if abs(value) > self.limit else "ok")


@dataclass(frozen=True, kw_only=True)
class MarinUpdate(Windowed):
    """D19: the norm of Adam's update exceeds twice its median over the last 128, once full; every norm enters.

    Known defects: blind for the first 128 steps; while a NaN is in the window nothing fires.
    """

    source: ClassVar[str] = "Marin 32B retrospective, issue 1368"
    reads: ClassVar[tuple[Role, ...]] = ("update",)
    window: int = 128
    factor: float = 2.0

    def fires(self, window: tuple[float, ...], value: float) -> bool:
        full = len(window) == self.window and not any(map(math.isnan, window))
        return full and value > self.factor * median(sorted(window))


def _probability_rising(losses: tuple[float, ...]) -> float:
    """P(slope > 0) of the least-squares line, with the normal law for the slope's error."""
    n = len(losses)
    center, level = 0.5 * (n - 1), mean(losses)
    spread = sum([(i - center) ** 2 for i in range(n)])
    slope = sum([(i - center) * (loss - level) for i, loss in enumerate(losses)]) / spread
    misses = [loss - level - slope * (i - center) for i, loss in enumerate(losses)]
    error = math.sqrt(sum([miss * miss for miss in misses]) / (n - 2) / spread)
    if not error > 0:
        return float(slope > 0)
    return 0.5 * math.erfc(-slope / error / math.sqrt(2))
