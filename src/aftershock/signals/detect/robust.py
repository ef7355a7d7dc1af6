"""Our detector: median and MAD about a robust line, delayed, in the log domain where values are positive.

One value at a time: not finite? too high? too low? Else it waits in `pending` and joins the baseline `history` only
later, in blocks, so neither a spike nor the ramp before it teaches the baseline what is normal. The costly statistics
run once a block; between blocks an update is a few comparisons.
All numbers inside a state are transformed ones: logarithms where `log` is set, and negated where higher is better, so
that up is always bad. Must not import torch or numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

from aftershock.numerics import MAD_TO_SIGMA
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import Rule, Step, Verdict
from aftershock.signals.detect.windows import median

LOG_ZERO = math.log(1e-30)
"""What an exact zero counts as in the log domain; far below any norm of a float32 gradient that is not zero."""
Q90_TO_SIGMA = 1 / 1.2815515655446004
"""1 / Phi^-1(0.9): a normal's standard deviation is this times its 90 % quantile."""
LINE_FROM = 32
"""Values from which on a line is fitted through the medians of the two halves; fewer would extrapolate their noise."""
ANCHOR_FROM = 64
"""Values from which on the level counts for the slow drift."""
RUN_FRAC = 0.5
"""A run of spikes goes on through values above this share of the limit: a plateau just over the limit is one too."""
SETTLED_FRAC = 0.25
"""A flagged run is a plateau, not a spike on its way, when its halves differ by less than this share of its height."""


class RobustState(NamedTuple):
    """`history` the baseline, `pending` what waits to join it, `high` and `low` the current run of values beyond it."""

    history: tuple[float, ...]
    pending: tuple[float, ...]
    high: tuple[float, ...]
    low: tuple[float, ...]
    level: float
    slope: float
    limit: float
    drop: float
    age: int
    due: int
    log: bool
    anchor: float
    cusum: float
    since: int
    before: float
    lag: int


@dataclass(frozen=True, kw_only=True)
class Robust(Rule[RobustState]):
    """Spikes, shifts, drifts, jumps and non-finite values of one signal.

    With x = log(value) while no value was negative (`domain`), line(t) through the medians of the two halves of the
    last `window` accepted x, and sigma = max(1.4826 MAD, q90 / 1.28, `floor`) of the residuals:
    *spike* when x - line > `threshold` (1 + 8 / n) sigma, n the size of the baseline; a falling line is not
    extrapolated, so a curve that flattens is no spike. In the log domain the 90 % quantile does not lift the limit
    above `sure_ratio` times the line, only the MAD does: a run that spikes often has a wide tail on a calm core.
    *shift* after `shift_after` spikes in a row that keep one height, or `shift_cap` at any height: the baseline moves.
    Within a row, values above half the limit count too.
    *jump* after `jump_after` values in a row below the line by `jump_threshold` (1 + 8 / n) sigma: the baseline moves.
    *drift* when S = max(0, S + z - `drift_sigmas`) reaches `drift_limit`, z the level's distance from its lowest since
    the last drift, in sigmas of at least `drift_floor`.
    Floors are relative: shares of the level. The rule is armed after `arm_after` finite values, and a NaN leaves it so.
    """

    source: ClassVar[str] = "Aftershock"
    reads: ClassVar[tuple[Role, ...]] = tuple(role for role in get_args(Role) if role != "setting")

    threshold: float = 7.0
    jump_threshold: float = 5.0
    window: int = 128
    delay: int = 16
    block: int = 16
    arm_after: int = 8
    shift_after: int = 16
    shift_cap: int = 64
    jump_after: int = 8
    drift_sigmas: float = 3.0
    drift_limit: float = 64.0
    floor: float = 0.002
    sure_ratio: float = math.inf
    drift_floor: float = 0.02
    better: Literal["lower", "higher", "neither"] = "lower"
    domain: Literal["auto", "linear"] = "auto"

    def __post_init__(self) -> None:
        for name in ("threshold", "jump_threshold", "drift_sigmas", "floor", "drift_floor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"robust detector: {name} must be a positive number, got {getattr(self, name)}")
        if not self.drift_limit > 0:
            raise ValueError(f"robust detector: drift_limit must be positive (inf: never), got {self.drift_limit}")
        if not self.sure_ratio > 1:
            raise ValueError(f"robust detector: sure_ratio must be above 1 (inf: none), got {self.sure_ratio}")
        for name, least in (("window", 32), ("delay", 0), ("block", 1), ("arm_after", 4), ("jump_after", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"robust detector: {name} must be at least {least}, got {getattr(self, name)}")
        if not 4 <= self.shift_after <= self.shift_cap:
            raise ValueError(f"robust detector: shift_after must lie in 4..shift_cap, got {self.shift_after}")

    def init(self) -> RobustState:
        log = self.domain == "auto" and self.better != "higher"
        nan = math.nan
        return RobustState((), (), (), (), nan, 0.0, nan, nan, 0, 0, log, nan, 0.0, 0, nan, 0)

    def update(self, state: RobustState, value: float) -> Step[RobustState]:
        if value - value != 0:  # NaN or infinite: decided before any statistic sees it
            return Step(state, "nonfinite")
        (history, pending, high, _, level, slope, limit, drop, age, due, log, anchor, cusum, since, before, _) = state
        if not log:
            x = -value if self.better == "higher" else value
        elif value > 0:
            x = math.log(value)
        elif value == 0:
            x = LOG_ZERO
        else:
            return self.update(self._linear(state), value)
        if len(history) < self.arm_after:
            history = (*history, x)
            new = state._replace(history=history)
            return Step(self._learn(new, 0)[0] if len(history) == self.arm_after else new, "ok")

        ahead = slope * age
        over = x - level - ahead if slope > 0 else x - level
        if over > limit:
            return self._above(state, x, "spike")
        if high and over > RUN_FRAC * limit:
            return self._above(state, x, "ok")
        if over < -drop and x - level - ahead < -drop:
            return self._below(state, x)
        pending = (*pending, x)
        new = RobustState(
            *(history, pending, (), (), level, slope, limit, drop, age + 1, due, log, anchor, cusum, since, before, 0)
        )
        if len(pending) < due:
            return Step(new, "ok")
        return self._absorb(new)

    def rewind(self, state: RobustState) -> RobustState:
        """The baseline stays, so the rule is armed at once; runs in progress and the drift's sum are forgotten."""
        return state._replace(high=(), low=(), cusum=0.0, since=0, lag=0)

    def lag(self, state: RobustState) -> int:
        return state.lag

    def _above(self, state: RobustState, x: float, verdict: Verdict) -> Step[RobustState]:
        """A value over the limit, or near it within a run: by itself `verdict`; a shift when it ends a long run."""
        run = (*state.high, x)
        if len(run) < self.shift_after:
            return Step(state._replace(high=run, low=()), verdict)
        half = len(run) // 2
        earlier, later = median(sorted(run[:half])), median(sorted(run[half:]))
        settled = abs(later - earlier) <= SETTLED_FRAC * (later - state.level)
        if not settled and len(run) < self.shift_cap:
            return Step(state._replace(high=run, low=()), verdict)
        return Step(self._move(state, run, before=state.level), "shift")

    def _below(self, state: RobustState, x: float) -> Step[RobustState]:
        """A value under the limit: nothing yet, or the last of so many that something has improved for good."""
        run = (*state.low, x)
        if len(run) < self.jump_after:
            return Step(state._replace(low=run, high=()), "ok")
        back = not math.isnan(state.before) and median(sorted(run)) > state.before - state.drop
        improved = self.better != "neither" and not back  # coming back from a shift is no improvement
        return Step(self._move(state, run, before=math.nan), "jump" if improved else "ok")

    def _move(self, state: RobustState, run: tuple[float, ...], *, before: float) -> RobustState:
        """The baseline is `run` from now on."""
        new = self.init()._replace(history=run[-self.window :], log=state.log, before=before, lag=len(run) - 1)
        return self._learn(new, 0)[0]

    def _absorb(self, state: RobustState) -> Step[RobustState]:
        """The oldest pending values join the baseline."""
        count = max(1, len(state.pending) - self._delay(len(state.history)))
        history = (state.history + state.pending[:count])[-self.window :]
        return self._learn(state._replace(history=history, pending=state.pending[count:]), count)

    def _learn(self, state: RobustState, count: int) -> Step[RobustState]:
        """Level, slope and limits anew from the history, which `count` values just joined; and whether it drifts."""
        history = state.history
        n = len(history)
        half = n // 2
        if n < LINE_FROM:
            level, slope, reach = median(sorted(history)), 0.0, 0.0
            rest = sorted([x - level for x in history])
        else:
            level = median(sorted(history[-half:]))
            slope = (level - median(sorted(history[: n - half]))) / half
            reach = 0.5 * (half - 1)  # from the middle of the newer half to the newest value
            first = level - slope * (n - 1 - reach)
            rest = sorted([x - first - slope * i for i, x in enumerate(history)])
        mad = median(sorted([abs(x) for x in rest]))
        unit = 1.0 if state.log else abs(level)
        core = max(MAD_TO_SIGMA * mad, self.floor * unit, 1e-300)
        sigma = max(core, Q90_TO_SIGMA * rest[(9 * n) // 10])
        wide = 1 + 8 / n  # few values know little of their spread
        ahead = level + slope * reach if slope > 0 else level
        limit = self.threshold * wide * sigma
        if state.log:
            limit = min(limit, max(self.threshold * wide * core, math.log(self.sure_ratio)))
        new = state._replace(
            level=ahead,
            slope=slope,
            limit=limit,
            drop=self.jump_threshold * wide * sigma,
            age=len(state.pending) + 1 + (0 if slope > 0 else round(reach)),
            due=self._delay(n) + min(self.block, max(4, n // 8)),
        )
        if n < min(ANCHOR_FROM, self.window):
            return Step(new, "ok")
        return self._drift(new, level, max(sigma, self.drift_floor * unit), count)

    def _drift(self, state: RobustState, level: float, sigma: float, count: int) -> Step[RobustState]:
        """One-sided CUSUM of the level over its lowest (Page 1954), `count` steps at once."""
        if math.isnan(state.anchor) or level <= state.anchor:
            return Step(state._replace(anchor=level, cusum=0.0, since=0), "ok")
        total = max(0.0, state.cusum + count * ((level - state.anchor) / sigma - self.drift_sigmas))
        since = state.since + count if total > 0 else 0
        if total < self.drift_limit:
            return Step(state._replace(cusum=total, since=since), "ok")
        lag = since + len(state.pending) + len(state.history) // 4
        return Step(state._replace(anchor=level, cusum=0.0, since=0, lag=lag), "drift")

    def _delay(self, n: int) -> int:
        """Steps a value waits: short while the baseline is, since early curves move fast."""
        return min(self.delay, n // 4)

    def _linear(self, state: RobustState) -> RobustState:
        """The same state outside the log domain, for good: a value was negative."""

        def plain(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple([math.exp(x) for x in values])

        new = state._replace(
            history=plain(state.history),
            pending=plain(state.pending),
            high=plain(state.high),
            low=plain(state.low),
            anchor=math.exp(state.anchor),
            before=math.exp(state.before),
            log=False,
        )
        return new if len(new.history) < self.arm_after else self._learn(new, 0)[0]


def robust_for(role: Role) -> Robust:
    """The settings for a signal of this role.

    Norms and the like have no better side: they never jump. Accuracies are better high, and one percent is their grain.
    Only losses, accuracies, logits and log Z drift: gradients and updates grow slowly in many a healthy run. Norms
    have a coarse grain: what counts is a factor of 3 (gradient) or 4 (update), not seven times the spread of a quiet
    stretch. On a calm core 2.5 times the usual loss is a spike, as in most definitions in use. The numbers were
    chosen on the tuning seeds of the benchmark.
    """
    if role == "accuracy":
        return Robust(better="higher", floor=0.01)
    if role == "loss":
        return Robust(floor=0.01, delay=32, sure_ratio=2.5)
    if role in ("logit", "log_z"):
        return Robust(better="neither", drift_floor=0.05)
    if role == "gradient":
        return Robust(better="neither", drift_limit=math.inf, floor=0.15, sure_ratio=10.0)
    if role == "update":
        return Robust(better="neither", drift_limit=math.inf, floor=0.2, sure_ratio=3.0)
    return Robust(better="neither", drift_limit=math.inf)
