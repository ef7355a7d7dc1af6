"""Every task a mixture of the same few logit curves: its questions differ in kind, and the kinds are shared.

Legend: T tasks, R runs of all tasks together, K shared curves, M places to predict at. x is log10 of compute, y the
score as a share of its range. Must not import torch or scipy, nor know models or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aftershock.forecast.curves import TYPICAL_SLOPE, sigmoid

NUM_CURVES = 3
TASK_WEIGHT = 20.0
"""Runs that a task counts as, however many it has: a well-sampled task must not own the shared curves."""
SHARE_PRIOR = 0.1
"""Runs' worth of equal shares added to a task's own."""
SLOPE_PRIOR = 5.0
"""Pull of a shared slope towards `TYPICAL_SLOPE`, in runs times the variance of x."""
REACH = 3.0
"""Decades above the last run that a shared midpoint may lie."""
NUM_STEPS = 80
_LARGEST_TURN = 0.3


class TaskPoints(NamedTuple):
    """One task: x [log10 compute] and y [share of the range], and the share that guessing scores (nan: the least y)."""

    x: npt.ArrayLike
    y: npt.ArrayLike
    chance: float = math.nan


class Mixture(NamedTuple):
    """y = floor + (1 - floor) sum_k share_k sigmoid(slope_k (x - midpoint_k)); shares of a task sum to 1."""

    midpoint_K: np.ndarray
    slope_K: np.ndarray
    share_TK: np.ndarray
    floor_T: np.ndarray

    def predict(self, task: int, x: npt.ArrayLike) -> np.ndarray:
        """The curve of task number `task` at the M places x."""
        solved_MK = sigmoid(self.slope_K * (np.asarray(x, dtype=np.float64)[:, None] - self.midpoint_K))
        return self.floor_T[task] + (1 - self.floor_T[task]) * (solved_MK @ self.share_TK[task])


def fit_mixture(tasks: Sequence[TaskPoints], *, num_curves: int = NUM_CURVES) -> Mixture:
    """Fit K shared curves and every task's shares by expectation and maximisation, all tasks together.

    The score above chance is read as the share of questions solved, and a question as of one hidden kind. Expectation:
    how much of what a run solved and missed is of each kind. Maximisation: a task's shares are its mean, and each
    shared curve takes a Newton step of the logistic regression on its part of all tasks. A score below chance counts
    as chance. Deterministic: midpoints start evenly over the range of x and two decades beyond.
    Source of the idea: the comment under Vance 2022 that tasks may be mixtures of several logits; the fit is ours.

    >>> tasks = [TaskPoints([20, 22, 24], [0.1, 0.5, 0.9]), TaskPoints([20, 22, 24], [0.0, 0.1, 0.5])]
    >>> fit_mixture(tasks, num_curves=2).share_TK.shape
    (2, 2)

    Raises ValueError without tasks or curves, for a task without runs, and for values that are not finite or a y
    outside 0 to 1.
    """
    if not tasks or num_curves < 1:
        raise ValueError(f"a mixture needs at least one task and one curve, got {len(tasks)} and {num_curves}")
    x_R, y_R, task_R, floor_T = _stack(tasks)
    solved_R = np.clip((y_R - floor_T[task_R]) / (1 - floor_T[task_R]), 0.0, 1.0)
    weight_R = TASK_WEIGHT / np.bincount(task_R)[task_R]
    belongs_TR = (np.arange(len(tasks))[:, None] == task_R) * weight_R
    mid_K = np.linspace(x_R.min(), x_R.max() + REACH - 1, num_curves)
    slope_K = np.full(num_curves, TYPICAL_SLOPE)
    share_TK = np.full((len(tasks), num_curves), 1 / num_curves)
    low, high = x_R.min() - 1, x_R.max() + REACH
    for _ in range(NUM_STEPS):
        kind_RK = np.clip(sigmoid(slope_K * (x_R[:, None] - mid_K)), 1e-9, 1 - 1e-9)
        own_RK = share_TK[task_R]
        total_R = np.clip((own_RK * kind_RK).sum(1), 1e-9, 1 - 1e-9)
        won_RK = (solved_R / total_R)[:, None] * own_RK * kind_RK
        lost_RK = ((1 - solved_R) / (1 - total_R))[:, None] * own_RK * (1 - kind_RK)
        share_TK = belongs_TR @ (won_RK + lost_RK) + SHARE_PRIOR / num_curves
        share_TK /= share_TK.sum(1, keepdims=True)
        won_RK, lost_RK = won_RK * weight_R[:, None], lost_RK * weight_R[:, None]
        mid_K, slope_K = _newton(x_R, won_RK, lost_RK, mid_K, slope_K)
        mid_K, slope_K = np.clip(mid_K, low, high), np.clip(slope_K, 0.3, 8.0)
    return Mixture(mid_K, slope_K, share_TK, floor_T)


def _newton(
    x_R: np.ndarray, won_RK: np.ndarray, lost_RK: np.ndarray, mid_K: np.ndarray, slope_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One Newton step of K logistic regressions, in the log-odds and slope at each curve's present midpoint."""
    away_RK = x_R[:, None] - mid_K
    chance_RK = sigmoid(slope_K * away_RK)
    count_RK = won_RK + lost_RK
    gap_RK, curvature_RK = won_RK - count_RK * chance_RK, count_RK * chance_RK * (1 - chance_RK)
    # A curve whose midpoint lies beyond the runs is hardly seen: the small ridges leave it where it is.
    level_K, square_K = curvature_RK.sum(0) + 1e-2, (curvature_RK * away_RK**2).sum(0) + SLOPE_PRIOR
    cross_K = (curvature_RK * away_RK).sum(0)
    to_level_K = gap_RK.sum(0)
    to_slope_K = (gap_RK * away_RK).sum(0) - SLOPE_PRIOR * (slope_K - TYPICAL_SLOPE)
    det_K = level_K * square_K - cross_K**2
    turn_K = (level_K * to_slope_K - cross_K * to_level_K) / det_K
    shift_K = (square_K * to_level_K - cross_K * to_slope_K) / det_K
    damp_K = np.minimum(1.0, _LARGEST_TURN / np.maximum(np.maximum(np.abs(turn_K), np.abs(shift_K)), 1e-12))
    slope_new_K = np.maximum(slope_K + damp_K * turn_K, 0.1)
    return mid_K - damp_K * shift_K / slope_new_K, slope_new_K


def _stack(tasks: Sequence[TaskPoints]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y and task of all runs, and every task's floor."""
    floors = []
    for number, task in enumerate(tasks):
        x, y = np.asarray(task.x, dtype=np.float64), np.asarray(task.y, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape or not x.size:
            raise ValueError(f"task {number}: give one y for each x and at least one run, got {x.shape} and {y.shape}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()) or (y < 0).any() or (y > 1).any():
            raise ValueError(f"task {number}: x must be finite, and y a share of the score's range, 0 to 1")
        floors.append(float(y.min()) if math.isnan(task.chance) else task.chance)
    task_R = np.repeat(np.arange(len(tasks)), [np.asarray(task.x).size for task in tasks])
    x_R = np.concatenate([np.asarray(task.x, dtype=np.float64) for task in tasks])
    y_R = np.concatenate([np.asarray(task.y, dtype=np.float64) for task in tasks])
    return x_R, y_R, task_R, np.minimum(np.array(floors), 1 - 1e-6)
