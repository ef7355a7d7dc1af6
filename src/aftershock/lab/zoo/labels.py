"""Where a loss curve spiked, said in hindsight by one rule for all: the truth that detectors are held to.

The rule was settled on zoo runs before any detector was tried, and stays. It looks at the loss alone.
Imports only numerics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftershock.numerics import MedianMad, median_mad

WINDOW, LEAST = 50, 20
"""Calm steps that make a baseline, and how few still do."""
SIGMAS, ALONE = 6.0, 12.0
"""How far above the baseline two losses in a row must lie, and how far one alone."""
TIMES, FLOOR = 3.0, 1e-4
"""A spike is three times the baseline and visible at all: below 1e-4 a float32 loss is mostly rounding."""
RISE = 0.3
"""Or this far above it, in the loss's own unit: nats matter in absolute terms where a loss is near 2.5."""
BAND = 3.0
LEFT_SHARE, LEFT_RISE = 0.05, 0.1
REST = 20


class Spike(NamedTuple):
    """Steps: `onset` is the first outside the band, `peak` the highest or first non-finite, `end` the first back."""

    onset: int
    peak: int
    end: int


def label(loss: Sequence[float] | np.ndarray) -> list[Spike]:
    """All spikes of `loss`, one value a step, oldest first; [] for a healthy run.

    Baseline of step t: take the median of each 50 calm losses in a row before t (of the first 20 to 49 too), and of
    these windows the lowest; b is its median, s its scaled MAD, at least 0.01 b. The lowest, because training should
    not unlearn: a rise over a hundred steps does not move it, and while the loss falls it follows. Calm steps are those
    outside every spike; while there are fewer than 20, no finite loss is a spike.

    - A spike starts at a loss above b + 6 s which is also above 3 b and 1e-4, or above b + 0.3, when the next loss is
      so too, or when it is above b + 12 s: one odd batch is no spike. A loss that is not finite always starts one.
      Both heights serve: a memorised set at 1e-7 that jumps to 1e-2, and text at 2.5 that rises to 3.
    - `onset`: going back from there, the first of the steps in a row above the band, max(b + 3 s, 1e-4).
    - `end`: the first of 20 steps in a row in the band or no higher than b + min(0.05 (peak - b), 0.1): the spike has
      decayed to a twentieth (from 1e-2, a loss of 1e-7 takes hundreds of steps to come back). `len(loss)` when that
      never happens. b and s are those of the start.
    - After the end the baseline is made anew, from the calm steps after it: at least 20 lie between two spikes.

    >>> label([1.0] * 60 + [1.4, 5.0, 2.0] + [1.0] * 60)
    [Spike(onset=60, peak=61, end=63)]
    """
    values = np.asarray(loss, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"a loss curve has one value a step, got an array of shape {values.shape}")
    found: list[Spike] = []
    base: MedianMad | None = None
    step = first = 0
    while step < len(values):
        base = _lower(base, values[max(first, step - WINDOW) : step])
        if not _starts(values[step : step + 2], base):
            step += 1
            continue
        spike = _follow(values, step, first, base)
        found.append(spike)
        step = first = spike.end
        base = None
    return found


def _lower(base: MedianMad | None, calm: np.ndarray) -> MedianMad | None:
    """The lower of `base` and the window `calm`."""
    if len(calm) < LEAST:
        return base
    median, mad = median_mad(calm)
    if base is not None and base.median <= median:
        return base
    return MedianMad(median, max(mad, 0.01 * abs(median)))


def _starts(pair: np.ndarray, base: MedianMad | None) -> bool:
    """Whether the first of `pair`, a loss and the next where there is one, starts a spike."""
    if not np.isfinite(pair[0]):
        return True
    if base is None:
        return False
    least = min(max(TIMES * base.median, FLOOR), base.median + RISE)
    if pair[0] > max(least, base.median + ALONE * base.mad):
        return True
    high = ~(pair <= max(least, base.median + SIGMAS * base.mad))
    return len(pair) == 2 and bool(high.all())


def _follow(values: np.ndarray, start: int, first: int, base: MedianMad | None) -> Spike:
    """The spike that starts at `start`; the calm steps before it began at `first`."""
    if base is None:
        # Not finite before there was a baseline: nothing says what calm would be, so it ends where finite steps last.
        base = MedianMad(np.inf, 0.0)
    onset, band = start, max(base.median + BAND * base.mad, FLOOR)
    while onset > first and values[onset - 1] > band:
        onset -= 1
    peak, rest = start, 0
    for step in range(start, len(values)):
        if _height(values[step]) > _height(values[peak]):
            peak = step
        left = min(LEFT_SHARE * (_height(values[peak]) - base.median), LEFT_RISE)
        calm = values[step] <= band or values[step] <= base.median + left
        rest = rest + 1 if calm and np.isfinite(values[step]) else 0
        if rest == REST:
            return Spike(onset, peak, step - REST + 1)
    return Spike(onset, peak, len(values))


def _height(value: float) -> float:
    return float(value) if np.isfinite(value) else np.inf
