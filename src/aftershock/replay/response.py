"""How a replay answered: height, area, duration and recovery of its spike, and its effect against shams.

Heights are excesses over the loss before the spike, in log units: ln(loss / level). Where a loss was not positive they
are linear instead, in units of the calm loss's spread. A loss that is not finite is higher than any number.
Must not import the runner: it reads numbers, it takes no step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.numerics import median_mad
from aftershock.replay.run import Window

BEFORE = 50
"""Steps before the onset that make the level."""
CALM_SIGMAS = 3.0
"""The band of calm losses is at least this wide."""
LEAST_SIGMA = 0.01
"""Log units; a full batch is so smooth that its own spread would call rounding a spike."""
PRESENT_SHARE = 0.5
"""A spike is there when it rises over the band by at least this share of the recorded one's rise."""
REST = 5
"""Steps in a row within reach of the level that make a recovery."""
LEFT_SHARE = 0.05
"""Recovered is also what has come down to this share of the peak, in the loss's own unit."""
Outcome = Literal["gone", "later", "stays"]
"""What becomes of a spike; later: it came only after the recorded one was over."""
TINY = 1e-30
"""What an exact zero loss counts as; far below rounding."""
RESAMPLES = 2000


class Baseline(NamedTuple):
    """What was calm, and how high the recorded spike was over it: `level` and `band` of the losses before the onset.

    `height` is the recorded peak's excess, `threshold` the excess from which a replay has the spike too.
    """

    level: float
    band: float
    height: float
    threshold: float
    unit: Literal["log", "sigma"]
    scale: float

    def excess(self, loss: float) -> float:
        """How far `loss` lies above the level; inf where it is not finite."""
        if not math.isfinite(loss):
            return math.inf
        if self.unit == "log":
            return math.log(max(loss, TINY)) - self.level
        return (loss - self.level) / self.scale

    @property
    def calm_loss(self) -> float:
        """The level as a loss."""
        return math.exp(self.level) if self.unit == "log" else self.level


class Response(NamedTuple):
    """What one replay did from the step on at which it was changed. Steps are the loop's.

    - `present`: whether it spiked at least half as high as the recorded one, over the band
    - `peak_excess`, `peak_step`: the highest excess and where; inf where the loss was not finite, from `nonfinite_at`
    - `area`: sum over steps of the excess above the band; `duration`: steps above the band
    - `onset`: first step of the run above the band that leads to the peak; None where nothing left the band
    - `recovery`: first of 5 steps after the peak that are calm again; None where that did not happen
    - `held_out`: loss on held-out data at the end, 10 spike lengths after it where the replay went that far; else None
    - `distance`: from the weights at the snapshot to those at the end; `path`: sum of the steps' lengths
    - `complete`: False where it was stopped early: area, duration and distance are then those up to there
    """

    present: bool
    peak_excess: float
    peak_step: int
    area: float
    duration: int
    onset: int | None
    recovery: int | None
    nonfinite_at: int | None
    held_out: float | None
    distance: float
    path: float
    complete: bool


class Effect(NamedTuple):
    """A cell against the shams: all ratios are logs, negative where the cell is lower, with 95 % intervals.

    - `removed`: share of the cell's replays without the spike; `sham_removed` that of the shams, which is the zero line
    - `log_peak`: median peak excess of the cell less that of the shams; from `low` to `high` in resampled replays
    - `beyond`: whether every replay of the cell peaks lower than every sham
    """

    removed: float
    sham_removed: float
    sham_low: float
    sham_high: float
    log_peak: float
    low: float
    high: float
    beyond: bool
    num_shams: int


def spike_of(response: Response | None, window: Window) -> Outcome | None:
    """What became of the recorded spike in a replay; None of one that did not run."""
    if response is None:
        return None
    if not response.present:
        return "gone"
    late = response.onset is not None and response.onset >= window.end and response.nonfinite_at is None
    return "later" if late else "stays"


def baseline(recorded: Mapping[int, float], window: Window) -> Baseline:
    """The level, band and height of a recorded spike; `recorded` are losses by step, best from well before the onset.

    Raises ValueError when no finite loss before the onset was recorded.
    """
    calm = [loss for step, loss in recorded.items() if window.onset - BEFORE <= step < window.onset]
    calm = [loss for loss in calm if math.isfinite(loss)]
    if not calm:
        raise ValueError(
            f"no finite loss is recorded in the {BEFORE} steps before the onset at step {window.onset}: nothing says "
            "what would be calm; start the recording earlier"
        )
    spike = [loss for step, loss in recorded.items() if window.onset <= step < max(window.end, window.peak + 1)]
    log = all(not math.isfinite(loss) or loss >= 0 for loss in [*calm, *spike])
    values = [math.log(max(loss, TINY)) for loss in calm] if log else calm
    median, mad = median_mad(values)
    scale = 1.0 if log else max(mad, 0.01 * abs(median), TINY)
    base = Baseline(median, 0.0, 0.0, 0.0, "log" if log else "sigma", scale)
    least = LEAST_SIGMA if log else 1.0
    band = max(max(map(base.excess, calm)), CALM_SIGMAS * max(mad / scale, least))
    height = max(map(base.excess, spike), default=math.nan)
    if math.isnan(height) or height <= band:
        # The alarm was of another signal, or the guard stepped in: any rise over the band is then the spike.
        return base._replace(band=band, height=band, threshold=2 * band)
    rise = PRESENT_SHARE * (height - band) if math.isfinite(height) else math.log(10.0)
    return base._replace(band=band, height=height, threshold=band + rise)


def measure(
    losses: Mapping[int, float],
    base: Baseline,
    *,
    since: int,
    held_out: float | None = None,
    distance: float = math.nan,
    path: float = math.nan,
    complete: bool = True,
) -> Response:
    """What a replay with these losses by step did from step `since` on. Raises ValueError when it has none there."""
    excess = {step: base.excess(loss) for step, loss in losses.items() if step >= since}
    if not excess:
        raise ValueError(f"no loss at or after step {since}: the replay took no step there")
    peak_step = max(excess, key=lambda step: excess[step])  # the first of equals: of infinities too
    over = {step: value - base.band for step, value in excess.items() if value > base.band}
    broken = [step for step in excess if not math.isfinite(losses[step])]
    return Response(
        present=excess[peak_step] >= base.threshold,
        peak_excess=excess[peak_step],
        peak_step=peak_step,
        area=sum(over.values()),
        duration=len(over),
        onset=_onset(excess, peak_step, base),
        recovery=recovery(losses, peak_step, base) if over else None,
        nonfinite_at=min(broken, default=None),
        held_out=held_out,
        distance=distance,
        path=path,
        complete=complete,
    )


def recovery(losses: Mapping[int, float], peak_step: int, base: Baseline) -> int | None:
    """The first of `REST` steps in a row after the peak that are back in the band, or at a twentieth of the peak."""
    peak, rest = losses[peak_step], 0
    left = base.calm_loss + LEFT_SHARE * (peak - base.calm_loss) if math.isfinite(peak) else -math.inf
    for step in sorted(step for step in losses if step > peak_step):
        calm = math.isfinite(losses[step]) and (base.excess(losses[step]) <= base.band or losses[step] <= left)
        rest = rest + 1 if calm else 0
        if rest == REST:
            return step - REST + 1
    return None


def effect(cell: Sequence[Response], shams: Sequence[Response], *, seed: int = 0) -> Effect:
    """How a cell's replays (often one) differ from those in which something innocent was changed.

    The interval of `log_peak` resamples replays on both sides (bootstrap of the difference of medians, 2,000 times);
    that of `sham_removed` is Wilson's (1927). One sham says nothing of their spread: give at least three.
    Raises ValueError without a replay on either side.

    Example:
        effect([response["lr*0.5"]], [response[name] for name in shams]).log_peak
    """
    if not cell or not shams:
        raise ValueError(
            f"an effect compares replays with shams, got {len(cell)} and {len(shams)}; run shams beside every cell: "
            "without them any change seems to help"
        )
    ours, theirs = (np.array([r.peak_excess for r in side]) for side in (cell, shams))
    random = np.random.default_rng(seed)
    draws = [_difference(random.choice(ours, len(ours)), random.choice(theirs, len(theirs))) for _ in range(RESAMPLES)]
    low, high = _quantile(draws, 0.025), _quantile(draws, 0.975)
    removed = sum(not r.present for r in shams)
    sham_low, sham_high = wilson(removed, len(shams))
    return Effect(
        removed=sum(not r.present for r in cell) / len(cell),
        sham_removed=removed / len(shams),
        sham_low=sham_low,
        sham_high=sham_high,
        log_peak=_difference(ours, theirs),
        low=low,
        high=high,
        beyond=bool(ours.max() < theirs.min()),
        num_shams=len(shams),
    )


def cost(losses: Mapping[int, float], control: Mapping[int, float], base: Baseline, *, since: int) -> float:
    """What a remedy costs on healthy steps: median excess of the cell less the control's, over steps from `since` on
    on which the control is calm. Log units, positive where the remedy is worse; nan where there is no such step."""
    steps = [step for step in losses if step >= since and base.excess(control.get(step, math.inf)) <= base.band]
    gaps = [base.excess(losses[step]) - base.excess(control[step]) for step in steps]
    return float(np.median(gaps)) if gaps else math.nan


def wilson(count: int, total: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): never of no width, also at none and at all."""
    share, square = count / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _onset(excess: Mapping[int, float], peak_step: int, base: Baseline) -> int | None:
    if excess[peak_step] <= base.band:
        return None
    onset = peak_step
    while excess.get(onset - 1, -math.inf) > base.band:
        onset -= 1
    return onset


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    a, b = _median(ours), _median(theirs)
    return 0.0 if a == b else a - b  # two infinities are equally high


def _median(values: np.ndarray) -> float:
    """The lower median: no mean of two, which an infinity would spoil."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.sort(values)[round(share * (len(values) - 1))])
