"""Whether a score jumps with compute, and whether a smooth companion says that the jump may be in the metric only.

Legend: N runs, ascending in x, the log10 of compute; y the score as a share of its range. Must not import torch or
scipy, nor know models or files.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MIN_RISE = 0.1
"""A jump rises by that share of the range at least."""
ONSET = 0.1
"""The onset is where this share of the whole rise has been made."""
MIN_WAIT = 1 / 3
"""A jump begins after that share of the decades of compute: a straight line has made a tenth of its way at a tenth."""
MIN_BEFORE = 5
"""Runs before the onset that it takes to say anything of a companion."""
MIN_COMPANION = 0.2
"""Share of its own way that a smooth companion has made by the onset, at least."""
EDGE_SHARE = 0.1
"""The first and last tenth of the runs give the level before and after."""
WIDE_RATIO = 100.0
"""A companion that spans this ratio and exceeds 1 (a perplexity) is taken in logs. A share never is: the log of any
sharp score is smooth."""
_ONE_SIDED = 1.6449


class Jump(NamedTuple):
    """A score that stays near its floor up to `onset` [FLOPs], for `wait` of the decades, and then rises by `rise`.

    `companion_share` is the share of its way that the smooth companion had made by then, `companion_rank` its rank
    correlation with compute up to there (both nan without one). `parts` is the L of y = p^L where the companion p is a
    share itself and fits, else nan. `metric_only`: the companion improved steadily while the score stood still.
    """

    onset: float
    wait: float
    rise: float
    companion_share: float
    companion_rank: float
    parts: float
    metric_only: bool

    def sentence(self, companion: str, *, smooth: bool = False) -> str:
        """The finding in words. `companion` is its name; `smooth`: the score's own metric has no threshold."""
        start = f"stays near its floor up to {self.onset:.2g} FLOPs, then rises"
        if smooth:
            return f"{start}; the metric has no threshold, so the jump is not the metric's"
        if math.isnan(self.companion_share):
            return f"{start}; without a smooth companion nobody can say whether only the metric jumps: add one"
        if not self.metric_only:
            return f"{start}, and {companion} does not improve steadily before either"
        parts = "" if math.isnan(self.parts) else f", as if of {self.parts:.1f} parts that must all be right"
        return (
            f"{start}, while {companion} had made {self.companion_share:.0%} of its way by then{parts}: this jump may "
            "be in the metric only"
        )


def find_jump(x: npt.ArrayLike, y: npt.ArrayLike, companion: npt.ArrayLike) -> Jump | None:
    """The jump of a score, or None when it rises by less than `MIN_RISE` or without waiting `MIN_WAIT`.

    Level and onset are read off the least-squares curve that never falls. The companion counts as smooth when, up to
    the onset, it made `MIN_COMPANION` of its own way and its rank correlation with compute is above 0 (one-sided 95 %,
    Fisher's z). Which way it improves is read off its first and last tenth. nan: a run without a companion.

    y = p^L (Schaeffer et al. 2023, arXiv 2304.15004: an answer of L tokens is right when all are) is fitted by least
    squares to a companion within 0 and 1 that grows with y, and given when it explains 80 % of the variance of y.

    Raises ValueError when x, y and companion are not of one length, or x and y are not finite.
    """
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    companion_N = np.asarray(companion, dtype=np.float64)
    if x_N.ndim != 1 or x_N.shape != y_N.shape or x_N.shape != companion_N.shape:
        raise ValueError(f"give one y and one companion for each x, got {x_N.shape}, {y_N.shape}, {companion_N.shape}")
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise ValueError("x and y must be finite")
    order = np.argsort(x_N, kind="stable")
    x_N, y_N, companion_N = x_N[order], y_N[order], companion_N[order]
    if x_N.size < 2 * MIN_BEFORE or x_N[0] == x_N[-1]:
        return None
    risen_N = _way(y_N)
    rise = _level(never_falling(y_N))
    if rise < MIN_RISE:
        return None
    first = int(np.argmax(risen_N >= ONSET))
    wait = float((x_N[first] - x_N[0]) / (x_N[-1] - x_N[0]))
    if wait < MIN_WAIT or first < MIN_BEFORE:
        return None
    share, rank, steady = _companion(x_N, companion_N, first)
    parts = _parts(y_N, companion_N) if steady else math.nan
    return Jump(10 ** float(x_N[first]), wait, rise, share, rank, parts, steady)


def never_falling(y: npt.ArrayLike) -> np.ndarray:
    """The least-squares curve through y_N that never falls (pool adjacent violators).

    >>> never_falling([1.0, 3.0, 2.0, 4.0])
    array([1. , 2.5, 2.5, 4. ])
    """
    means: list[float] = []
    sizes: list[int] = []
    for value in np.asarray(y, dtype=np.float64).tolist():
        means.append(value)
        sizes.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            size = sizes[-2] + sizes[-1]
            means[-2:] = [(means[-2] * sizes[-2] + means[-1] * sizes[-1]) / size]
            sizes[-2:] = [size]
    return np.repeat(means, sizes)


def _level(curve_N: np.ndarray) -> float:
    """Mean of the last tenth minus mean of the first."""
    edge = max(1, round(EDGE_SHARE * curve_N.size))
    return float(curve_N[-edge:].mean() - curve_N[:edge].mean())


def _way(values_N: np.ndarray) -> np.ndarray:
    """Share of its whole rise that the never-falling curve has made at each run; zeros where it does not rise."""
    curve_N = never_falling(values_N)
    edge = max(1, round(EDGE_SHARE * curve_N.size))
    rise = _level(curve_N)
    return (curve_N - curve_N[:edge].mean()) / rise if rise > 0 else np.zeros_like(curve_N)


def _companion(x_N: np.ndarray, companion_N: np.ndarray, first: int) -> tuple[float, float, bool]:
    """Share of its way by the onset, rank correlation up to there, and whether it improves steadily."""
    known_N = np.isfinite(companion_N)
    before = int(known_N[:first].sum())
    if before < MIN_BEFORE or known_N.sum() < 2 * MIN_BEFORE:
        return math.nan, math.nan, False
    values_N, x_N = companion_N[known_N], x_N[known_N]
    if values_N.min() > 0 and values_N.max() > max(1.0, WIDE_RATIO * values_N.min()):
        values_N = np.log(values_N)
    edge = max(1, round(EDGE_SHARE * values_N.size))
    values_N = values_N * np.sign(values_N[-edge:].mean() - values_N[:edge].mean())
    share = float(np.clip(_way(values_N)[before - 1], 0, 1))
    rank = _rank_correlation(x_N[:before], values_N[:before])
    above = math.atanh(min(rank, 1 - 1e-9)) - _ONE_SIDED * math.sqrt(1.06 / max(before - 3, 1)) > 0
    return share, rank, bool(share >= MIN_COMPANION and above)


def _rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's; 0 where one of both does not vary."""
    ranks_2N = np.stack([_ranks(a_N), _ranks(b_N)])
    return float(np.corrcoef(ranks_2N)[0, 1]) if ranks_2N.std(axis=1).all() else 0.0


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks, ties sharing their mean."""
    _, inverse_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]


def _parts(y_N: np.ndarray, companion_N: np.ndarray) -> float:
    """L of y = p^L by least squares over a grid of 1 to 100; nan where the companion is no p or does not fit."""
    known_N = np.isfinite(companion_N)
    y_N, p_N = y_N[known_N], companion_N[known_N]
    if p_N.min() < 0 or p_N.max() > 1 or y_N.std() == 0:
        return math.nan
    parts_G = np.geomspace(1, 100, 461)
    sse_G = ((p_N ** parts_G[:, None] - y_N) ** 2).sum(1)
    explained = 1 - sse_G.min() / ((y_N - y_N.mean()) ** 2).sum()
    return float(parts_G[sse_G.argmin()]) if explained >= 0.8 else math.nan
