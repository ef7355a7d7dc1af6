"""Windows of past values as tuples, and the statistics rules take of them. Non-finite values are carried, not hidden.

Must not import anything else of aftershock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """`median` and `mad` (unscaled) of a sample, in its own unit."""

    median: float
    mad: float


def push(window: tuple[float, ...], value: float, size: int) -> tuple[float, ...]:
    """`window` with `value` at its end and at most the last `size` values."""
    return (*window, value) if len(window) < size else (*window[1 - size :], value) if size > 1 else (value,)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if values else math.nan


def std(values: Sequence[float], *, sample: bool = False) -> float:
    """Standard deviation over n, or over n - 1 with `sample`; nan where that is 0."""
    count = len(values) - sample
    if count < 1:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum([(v - middle) * (v - middle) for v in values]) / count)


def median(ordered: Sequence[float]) -> float:
    """Middle of an ascending sequence, the mean of two middles when even; it must not be empty."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def median_mad(values: Sequence[float]) -> Spread:
    """Median and unscaled median absolute deviation; nan for both when a value is nan."""
    if math.isnan(sum(values)) and any(map(math.isnan, values)):
        return Spread(math.nan, math.nan)
    middle = median(sorted(values))
    return Spread(middle, median(sorted([abs(v - middle) for v in values])))
