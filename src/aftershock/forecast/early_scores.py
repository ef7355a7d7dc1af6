"""How good probabilities were: area under the ROC curve, Brier and log score, reliability, with intervals over curves.

Legend: N runs scored, K curves (a seed of a size over all rates), B draws of K curves with replacement. Runs of a curve
stay together in a draw: they share weights, batches and the best rate that they are judged against. Fits are not
repeated in a draw, so an interval tells the luck of the curves scored, not that of the curves fitted.
Pure; must not import torch, nor know studies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aftershock.forecast.logistic import log_loss, probability

LEVEL = 0.95
NUM_DRAWS = 2000
NUM_BINS = 5
"""Bins of the reliability table, each a fifth wide: dozens of runs fill no more."""


class Estimate(NamedTuple):
    """`value` of all runs with the bootstrap percentile interval [`low`, `high`] at `LEVEL`, over curves."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """Runs whose probability lies in [`low`, `high`): how many, their mean probability, the share that it happened to.
    The last bin holds 1 too."""

    low: float
    high: float
    count: int
    claimed: float
    seen: Estimate


class Scores(NamedTuple):
    """`auc`: the chance that of two runs the one it happened to has the higher probability, ties a half; None where it
    happened to all or none. `brier`: mean (p - y)^2. `log_score`: mean -log p(what happened) [nats]. Low is good in
    the last two (Gneiting and Raftery 2007)."""

    predictor: str
    features: tuple[str, ...]
    auc: Estimate | None
    brier: Estimate
    log_score: Estimate
    reliability: tuple[Bin, ...]


def score_predictor(
    predictor: str, features: tuple[str, ...], log_odds_N: np.ndarray, y_N: np.ndarray, curve_N: np.ndarray
) -> Scores:
    """All scores of one predictor's log-odds. `curve_N` numbers the curves 0 .. K - 1."""
    p_N, weights_BK = probability(log_odds_N), curve_draws(curve_N)
    return Scores(
        predictor=predictor,
        features=features,
        auc=_auc(log_odds_N, y_N, curve_N, weights_BK),
        brier=_mean((p_N - y_N) ** 2, curve_N, weights_BK),
        log_score=_mean(log_loss(log_odds_N, y_N), curve_N, weights_BK),
        reliability=_reliability(p_N, y_N, curve_N, weights_BK),
    )


def brier_gain(log_odds_N: np.ndarray, other_N: np.ndarray, y_N: np.ndarray, curve_N: np.ndarray) -> Estimate:
    """1 - Brier / Brier of the other, on the same draws: the share of the other's error that is gone."""
    weights_BK = curve_draws(curve_N)
    own_K, other_K = (
        _by_curve((probability(eta_N) - y_N) ** 2, curve_N, weights_BK.shape[1]) for eta_N in (log_odds_N, other_N)
    )
    return _estimate(1 - own_K.sum() / other_K.sum(), 1 - (weights_BK @ own_K) / (weights_BK @ other_K))


def curve_draws(curve_N: np.ndarray) -> np.ndarray:
    """[B, K]: how often each curve is in each draw. The same for all predictors: what is paired stays paired."""
    num_curves = int(curve_N.max()) + 1
    return np.random.default_rng(0).multinomial(num_curves, np.full(num_curves, 1 / num_curves), size=NUM_DRAWS)


def area_under_curve(score_N: np.ndarray, y_N: np.ndarray) -> float:
    """The chance that a run with y has the higher score than one without, ties counting a half; nan without both.

    >>> area_under_curve(np.array([1.0, 2.0, 2.0]), np.array([False, False, True]))
    0.75
    """
    if y_N.all() or not y_N.any():
        return math.nan
    lead = np.subtract.outer(score_N[y_N], score_N[~y_N])
    return float((lead > 0).mean() + 0.5 * (lead == 0).mean())


def _auc(score_N: np.ndarray, y_N: np.ndarray, curve_N: np.ndarray, weights_BK: np.ndarray) -> Estimate | None:
    """By wins of curve against curve, so that a draw is two small products instead of all pairs of runs again."""
    value = area_under_curve(score_N, y_N)
    if math.isnan(value):
        return None
    num_curves = weights_BK.shape[1]
    member_KN = np.arange(num_curves)[:, None] == curve_N
    lead_NN = np.subtract.outer(score_N, score_N)
    wins_KK = (member_KN & y_N) @ ((lead_NN > 0) + 0.5 * (lead_NN == 0)) @ (member_KN & ~y_N).T
    happened_B, other_B = (weights_BK @ _by_curve(kind_N, curve_N, num_curves) for kind_N in (y_N, ~y_N))
    pairs_B = happened_B * other_B
    won_B = np.einsum("bk,kl,bl->b", weights_BK, wins_KK, weights_BK)
    return _estimate(value, won_B[pairs_B > 0] / pairs_B[pairs_B > 0])


def _mean(value_N: np.ndarray, curve_N: np.ndarray, weights_BK: np.ndarray) -> Estimate:
    """The mean over runs; draws without any run measure nothing and are left out."""
    num_curves = weights_BK.shape[1]
    count_B = weights_BK @ np.bincount(curve_N, minlength=num_curves)
    total_B = weights_BK @ _by_curve(value_N, curve_N, num_curves)
    return _estimate(float(value_N.mean()), total_B[count_B > 0] / count_B[count_B > 0])


def _reliability(p_N: np.ndarray, y_N: np.ndarray, curve_N: np.ndarray, weights_BK: np.ndarray) -> tuple[Bin, ...]:
    bins = []
    number_N = np.minimum((p_N * NUM_BINS).astype(int), NUM_BINS - 1)
    for number in np.unique(number_N).tolist():
        here_N = number_N == number
        seen = _mean(y_N[here_N].astype(np.float64), curve_N[here_N], weights_BK)
        low, high = number / NUM_BINS, (number + 1) / NUM_BINS
        bins.append(Bin(low, high, int(here_N.sum()), float(p_N[here_N].mean()), seen))
    return tuple(bins)


def _by_curve(value_N: np.ndarray, curve_N: np.ndarray, num_curves: int) -> np.ndarray:
    """Sums [K] over the runs of each curve."""
    return np.bincount(curve_N, weights=value_N, minlength=num_curves)


def _estimate(value: float, draws_B: np.ndarray) -> Estimate:
    low, high = np.quantile(draws_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
