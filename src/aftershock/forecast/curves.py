"""Curves of a score against log compute: straight line, sigmoid, logit over an adjusted range, broken power law.

Legend: N runs, B weightings of them, G points of a grid, P parameters, M places to predict at. x is log10 of compute,
y the score as a share of its range, 0 to 1. A fit takes B rows of weights and returns B curves at once: resamples of a
bootstrap are rows of counts, runs left out have weight 0. All are least squares; the nonlinear ones start from the best
point of a grid and end by Levenberg-Marquardt, every row with its own damping.
Must not import torch or scipy, nor know tasks, models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TYPICAL_SLOPE, SLOPE_SPREAD = 1.5, 0.5
"""A sigmoid's slope [nats of log-odds per decade of compute] and the deviation of its natural logarithm, used by
`steady_sigmoid`: fits to whole benchmark curves of open models give 1.0 to 4.8, most of them 1 to 2.3."""

LEAST_NOISE = 0.02
"""The deviation of a score that `steady_sigmoid` assumes at least: seven points at chance must not fix a slope."""

EDGE = 1e-3
"""How near 0 and 1 a share may come before its logit is taken."""

REACH = (2.0, 5.0)
"""Decades below the first and above the last run in which a midpoint is looked for."""

_SLOPES = (0.1, 30.0)
_STEPS = 20


class Curve(NamedTuple):
    """B fitted curves of one family: `params_BP` as the family's own docstring names them, `sse_B` weighted."""

    family: str
    params_BP: np.ndarray
    sse_B: np.ndarray

    def predict(self, x: npt.ArrayLike) -> np.ndarray:
        """The B curves at the M places x [log10 compute]: [B, M], kept within 0 and 1."""
        return np.clip(FAMILIES[self.family].shape(self.params_BP, np.asarray(x, dtype=np.float64)), 0.0, 1.0)


class Family(NamedTuple):
    """`fit(x_N, y_N, weights_BN, chance)` gives params_BP, and `shape(params_BP, x_M)` the curves [B, M]."""

    fit: Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
    shape: Callable[[np.ndarray, np.ndarray], np.ndarray]


def fit_curve(
    family: str, x: npt.ArrayLike, y: npt.ArrayLike, *, weights: npt.ArrayLike | None = None, chance: float = math.nan
) -> Curve:
    """Fit one family to N runs, under B rows of weights at once (one row of ones by default).

    `chance` is the score of guessing as a share of the range, the floor of the sigmoids; nan: the lowest score of
    weight > 0 stands in. Raises ValueError for an unknown family, for x, y and weights that do not belong together or
    are not finite, a y outside 0 to 1, a weight below 0, and a row whose weight lies on fewer than two values of x.

    >>> curve = fit_curve("line", [20, 21, 22], [0.2, 0.3, 0.4])
    >>> float(curve.predict([23])[0, 0])
    0.5
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    weights_BN = np.ones((1, x_N.size)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if x_N.ndim != 1 or y_N.shape != x_N.shape or weights_BN.ndim != 2 or weights_BN.shape[1] != x_N.size:
        raise ValueError(
            f"give one y and one weight a row for each x, got {x_N.shape}, {y_N.shape}, {weights_BN.shape}"
        )
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all() and np.isfinite(weights_BN).all()):
        raise ValueError("x, y and weights must be finite; leave runs without a score or a compute out")
    if ((y_N < 0) | (y_N > 1)).any() or (weights_BN < 0).any():
        raise ValueError("y must lie in 0 to 1, as a share of the score's range, and weights must not be negative")
    spread_B = np.where(weights_BN > 0, x_N, -np.inf).max(1) - np.where(weights_BN > 0, x_N, np.inf).min(1)
    if not (spread_B > 0).all():
        raise ValueError("every fit needs runs at two values of x at least; add models of another compute")
    params_BP = FAMILIES[family].fit(x_N, y_N, weights_BN, chance)
    error_BN = np.clip(FAMILIES[family].shape(params_BP, x_N), 0.0, 1.0) - y_N
    return Curve(family, params_BP, (weights_BN * error_BN**2).sum(1))


# ---------------------------------------------------------------------------------------------------------- straight


def _fit_line(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float) -> np.ndarray:
    """(level at x = 0, slope). Chance is not used."""
    return _straight(x_N, np.broadcast_to(y_N, weights_BN.shape), weights_BN)


def _line(params_BP: np.ndarray, x_M: np.ndarray) -> np.ndarray:
    return params_BP[:, :1] + params_BP[:, 1:2] * x_M


def _fit_adjusted(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float) -> np.ndarray:
    """(low, high, intercept, slope): a line through logit((y - low) / (high - low)). Chance is not used.

    low = 0.9 min y, high = 1 - 0.9 (1 - max y), over the runs of weight > 0. A share below `EDGE` counts as that.
    """
    low_B, high_B = _extremes(y_N, weights_BN)
    low_B, high_B = 0.9 * low_B, 1 - 0.9 * (1 - high_B)
    share_BN = np.clip((y_N - low_B[:, None]) / (high_B - low_B)[:, None], EDGE, 1 - EDGE)
    straight_BP = _straight(x_N, np.log(share_BN / (1 - share_BN)), weights_BN)
    return np.concatenate([low_B[:, None], high_B[:, None], straight_BP], axis=1)


def _adjusted(params_BP: np.ndarray, x_M: np.ndarray) -> np.ndarray:
    low_B1, high_B1 = params_BP[:, :1], params_BP[:, 1:2]
    return low_B1 + (high_B1 - low_B1) * sigmoid(_line(params_BP[:, 2:], x_M))


def _straight(x_N: np.ndarray, y_BN: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    total_B = weights_BN.sum(1)
    mean_x_B, mean_y_B = weights_BN @ x_N / total_B, (weights_BN * y_BN).sum(1) / total_B
    away_BN = x_N - mean_x_B[:, None]
    slope_B = (weights_BN * away_BN * (y_BN - mean_y_B[:, None])).sum(1) / (weights_BN * away_BN**2).sum(1)
    return np.stack([mean_y_B - slope_B * mean_x_B, slope_B], axis=1)


# ---------------------------------------------------------------------------------------------------------- sigmoids


def _fit_sigmoid(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float) -> np.ndarray:
    """(floor, midpoint, log slope): y = floor + (1 - floor) sigmoid(slope (x - midpoint)), floor at chance."""
    return _sigmoid_fit(x_N, y_N, weights_BN, chance, steady=False)


def _fit_steady(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float) -> np.ndarray:
    """The sigmoid with a log-normal prior on its slope, weighed against the noise of the plain fit.

    Minimises SSE / variance + ((log slope - log TYPICAL_SLOPE) / SLOPE_SPREAD)^2; the variance is the plain fit's
    SSE / (N - 2), at least `LEAST_NOISE`^2. With few runs above chance the plain slope is anything up to a step.
    """
    return _sigmoid_fit(x_N, y_N, weights_BN, chance, steady=True)


def _sigmoid_fit(
    x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float, *, steady: bool
) -> np.ndarray:
    floor_B = _extremes(y_N, weights_BN)[0] if math.isnan(chance) else np.full(len(weights_BN), chance)
    low = np.array([x_N.min() - REACH[0], math.log(_SLOPES[0])])
    high = np.array([x_N.max() + REACH[1], math.log(_SLOPES[1])])
    mid_G, log_slope_G = (axis.ravel() for axis in np.meshgrid(np.linspace(low[0], high[0], 80),
                                                               np.linspace(low[1], high[1], 30)))  # fmt: skip
    rise_GN = sigmoid(np.exp(log_slope_G)[:, None] * (x_N - mid_G[:, None]))
    above_BN, room_B1 = y_N - floor_B[:, None], 1 - floor_B[:, None]
    sse_BG = (
        (weights_BN * above_BN**2).sum(1, keepdims=True)
        - 2 * room_B1 * ((weights_BN * above_BN) @ rise_GN.T)
        + room_B1**2 * (weights_BN @ (rise_GN**2).T)
    )
    variance_B = np.maximum(sse_BG.min(1) / np.maximum(weights_BN.sum(1) - 2, 1), LEAST_NOISE**2)
    pull_B = np.sqrt(variance_B) / SLOPE_SPREAD if steady else np.zeros(len(weights_BN))
    start_B = (sse_BG + (pull_B[:, None] * (log_slope_G - math.log(TYPICAL_SLOPE))) ** 2).argmin(1)
    root_BN = np.sqrt(weights_BN)

    def residual(params_BP: np.ndarray) -> np.ndarray:
        miss_BN = root_BN * (_floored(np.concatenate([floor_B[:, None], params_BP], axis=1), x_N) - y_N)
        prior_B = pull_B * (params_BP[:, 1] - math.log(TYPICAL_SLOPE))
        return np.concatenate([miss_BN, prior_B[:, None]], axis=1)

    params_BP = polish(residual, np.stack([mid_G[start_B], log_slope_G[start_B]], axis=1), low=low, high=high)
    return np.concatenate([floor_B[:, None], params_BP], axis=1)


def _floored(params_BP: np.ndarray, x_M: np.ndarray) -> np.ndarray:
    floor_B1, mid_B1, slope_B1 = params_BP[:, :1], params_BP[:, 1:2], np.exp(params_BP[:, 2:3])
    return floor_B1 + (1 - floor_B1) * sigmoid(slope_B1 * (x_M - mid_B1))


def sigmoid(z: npt.ArrayLike) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(z, dtype=np.float64)))


# -------------------------------------------------------------------------------------------------- broken power law


def _fit_broken(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, chance: float) -> np.ndarray:
    """(a, b, c0, c1, d, log f) of the error 1 - y = a + b C^-c0 (1 + (C/10^d)^(1/f))^(-c1 f), C = 10^(x - x0).

    One break (Caballero et al. 2023, arXiv 2210.14891, equation 1) of an error that can only fall: a, b, c0, c1 >= 0.
    a and b are solved for at every (c0, c1, d, f). x0 is the seventh parameter, the mean of x. Chance is not used.
    """
    x0 = float(x_N.mean())
    x_N = x_N - x0
    low = np.array([0.0, 0.0, x_N.min(), math.log(0.05)])
    high = np.array([0.5, 1.0, x_N.max() + 0.5, 0.0])
    axes = (
        [0, 0.02, 0.05, 0.1, 0.2, 0.4],
        [0, 0.05, 0.1, 0.2, 0.4, 0.8],
        np.linspace(low[2], high[2], 14),
        [-2.3, -0.7],
    )
    grid_GP = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    error_N = 1 - y_N
    fall_GN = _fall(grid_GP, x_N)
    total_B1 = weights_BN.sum(1, keepdims=True)
    e_B1, ee_B1 = (weights_BN @ error_N)[:, None], (weights_BN @ error_N**2)[:, None]
    f_BG, ff_BG = weights_BN @ fall_GN.T, weights_BN @ (fall_GN**2).T
    fe_BG = (weights_BN * error_N) @ fall_GN.T
    a_BG, b_BG = _levels(total_B1, e_B1, f_BG, ff_BG, fe_BG)
    sse_BG = (ee_B1 - 2 * a_BG * e_B1 - 2 * b_BG * fe_BG + a_BG**2 * total_B1 + 2 * a_BG * b_BG * f_BG
              + b_BG**2 * ff_BG)  # fmt: skip
    root_BN = np.sqrt(weights_BN)

    def levels(params_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        fall_BN = _fall(params_BP, x_N)
        sums = (weights_BN * fall_BN, weights_BN * fall_BN**2, weights_BN * fall_BN * error_N)
        a_B1, b_B1 = _levels(total_B1, e_B1, *(part.sum(1, keepdims=True) for part in sums))
        return a_B1, b_B1, fall_BN

    def residual(params_BP: np.ndarray) -> np.ndarray:
        a_B1, b_B1, fall_BN = levels(params_BP)
        return root_BN * (a_B1 + b_B1 * fall_BN - error_N)

    params_BP = polish(residual, grid_GP[sse_BG.argmin(1)], low=low, high=high)
    a_B1, b_B1, _ = levels(params_BP)
    return np.concatenate([a_B1, b_B1, params_BP, np.full_like(a_B1, x0)], axis=1)


def _levels(
    total: np.ndarray, e: np.ndarray, f: np.ndarray, ff: np.ndarray, fe: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """a, b >= 0 that minimise sum w (e - a - b f)^2, from the weighted sums 1, e, f, f^2 and f e."""
    det = total * ff - f**2
    solvable = det > 1e-9 * total * ff
    b = np.where(solvable, (total * fe - f * e) / np.where(solvable, det, 1.0), 0.0)
    b = np.maximum(b, 0.0)
    a = (e - b * f) / total
    return np.maximum(a, 0.0), np.where(a < 0, fe / ff, b)


def _fall(params_BP: np.ndarray, x_M: np.ndarray) -> np.ndarray:
    """C^-c0 (1 + (C/10^d)^(1/f))^(-c1 f) for params (c0, c1, d, log f) and C = 10^x."""
    c0_B1, c1_B1, d_B1, log_f_B1 = (params_BP[:, i : i + 1] for i in range(4))
    f_B1 = np.exp(log_f_B1)
    decades_BM = c0_B1 * x_M + c1_B1 * f_B1 * np.logaddexp(0.0, math.log(10) * (x_M - d_B1) / f_B1) / math.log(10)
    return np.exp(-math.log(10) * decades_BM)


def _broken(params_BP: np.ndarray, x_M: np.ndarray) -> np.ndarray:
    return 1 - params_BP[:, :1] - params_BP[:, 1:2] * _fall(params_BP[:, 2:6], x_M - params_BP[:, 6:7])


# ------------------------------------------------------------------------------------------------------ least squares


def polish(
    residual: Callable[[np.ndarray], np.ndarray], start_BP: np.ndarray, *, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Levenberg-Marquardt on B problems at once, from `start_BP`, inside the box low_P to high_P.

    `residual(params_BP)` gives [B, R], row b of it from row b of the parameters alone. Forward differences, `_STEPS`
    steps; a row that a step does not improve stays where it is and is damped more, so no row ever gets worse.
    """
    params_BP = np.clip(start_BP, low, high)
    miss_BR = residual(params_BP)
    damping_B = np.full(len(params_BP), 1e-2)
    nudge_P = 1e-6 * (high - low)
    for _ in range(_STEPS):
        nudged = [(residual(params_BP + nudge_P * unit_P) - miss_BR) for unit_P in np.eye(len(low))]
        jacobian_BRP = np.stack(nudged, axis=2) / nudge_P
        downhill_BP = -(jacobian_BRP.transpose(0, 2, 1) @ miss_BR[:, :, None])[:, :, 0]
        # A parameter that leans on the box must not steer the others.
        leans_BP = ((params_BP <= low) & (downhill_BP < 0)) | ((params_BP >= high) & (downhill_BP > 0))
        jacobian_BRP = np.where(leans_BP[:, None, :], 0.0, jacobian_BRP)
        turned_BPR = jacobian_BRP.transpose(0, 2, 1)
        normal_BPP, gradient_BP = turned_BPR @ jacobian_BRP, (turned_BPR @ miss_BR[:, :, None])[:, :, 0]
        ridge_BP = damping_B[:, None] * np.einsum("bpp->bp", normal_BPP) + 1e-12
        damped_BPP = normal_BPP + np.eye(len(low)) * ridge_BP[:, None, :]
        tried_BP = np.clip(params_BP - np.linalg.solve(damped_BPP, gradient_BP[:, :, None])[:, :, 0], low, high)
        tried_BR = residual(tried_BP)
        gain_B = (miss_BR**2).sum(1) - (tried_BR**2).sum(1)
        better_B = gain_B > 0
        params_BP = np.where(better_B[:, None], tried_BP, params_BP)
        miss_BR = np.where(better_B[:, None], tried_BR, miss_BR)
        damping_B = np.clip(np.where(better_B, damping_B / 5, damping_B * 5), 1e-9, 1e9)
    return params_BP


def _extremes(y_N: np.ndarray, weights_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest y of weight > 0."""
    used_BN = weights_BN > 0
    return np.where(used_BN, y_N, np.inf).min(1), np.where(used_BN, y_N, -np.inf).max(1)


FAMILIES: Mapping[str, Family] = {
    "line": Family(_fit_line, _line),
    "sigmoid": Family(_fit_sigmoid, _floored),
    "steady_sigmoid": Family(_fit_steady, _floored),
    "adjusted_logit": Family(_fit_adjusted, _adjusted),
    "broken_power_law": Family(_fit_broken, _broken),
}
"""Curves against log10 of compute. `steady_sigmoid` is the sigmoid with a prior on its slope."""
