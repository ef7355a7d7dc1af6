"""Long series made short enough for a page, without losing a spike. Pure numpy; knows nothing of runs."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np


class Thin(NamedTuple):
    """`steps` int64[n] and `values` float64[n], n at most the number of points asked for (4 at least)."""

    steps: np.ndarray
    values: np.ndarray


def thin(steps: np.ndarray, values: np.ndarray, points: int) -> Thin:
    """The first, the last, and the lowest and highest value of each of (points - 2) / 2 equal stretches.

    A one-step spike therefore survives any thinning. A value that is not finite counts as higher than all others,
    so it survives too. Series of at most `points` are returned as they are.
    """
    if points < 4:
        raise ValueError(f"points must be at least 4, got {points}")
    if len(steps) <= points:
        return Thin(steps, values)
    edges = np.linspace(0, len(steps), (points - 2) // 2 + 1).astype(int)
    keep = {0, len(steps) - 1}
    for start, stop in itertools.pairwise(edges):
        piece = values[start:stop]
        finite = np.isfinite(piece)
        keep.add(start + int(np.argmin(np.where(finite, piece, np.inf))))
        keep.add(start + int(np.argmax(np.where(finite, piece, np.inf))))
    index = np.array(sorted(keep))
    return Thin(steps[index], values[index])


def rounded(value: float, digits: int = 5) -> float | None:
    """`value` to `digits` significant digits, or None where it is not finite (JSON has no NaN)."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
