"""Scores of probabilities: against brute force, by hand, and their intervals over curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftershock.forecast.early_scores import (
    Estimate,
    area_under_curve,
    brier_gain,
    curve_draws,
    score_predictor,
)
from aftershock.forecast.logistic import probability


def _planted(num_curves: int, *, draw: int = 0, length: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-odds in steps of a half, so that there are ties, outcomes with these odds, and curves."""
    generator = np.random.default_rng(draw)
    log_odds_N = np.round(2 * generator.standard_normal(num_curves * length)) / 2
    y_N = generator.random(len(log_odds_N)) < probability(log_odds_N)
    return log_odds_N, y_N, np.repeat(np.arange(num_curves), length)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    """oracle: all pairs in a loop, ties a half; nan without both outcomes."""
    wins = [
        (a > b) + 0.5 * (a == b) for a, happened in rows if happened for b, happened_too in rows if not happened_too
    ]
    expected = sum(wins) / len(wins) if wins else math.nan
    found = area_under_curve(np.array([a for a, _ in rows], dtype=float), np.array([y for _, y in rows]))
    assert found == pytest.approx(expected, nan_ok=True)


def test_scores_by_hand() -> None:
    """oracle: three runs at 1/2, 3/4 and 1/4, the first two of which happened."""
    log_odds_N = np.log([1.0, 3.0, 1 / 3])
    scores = score_predictor("x", (), log_odds_N, np.array([True, True, False]), np.arange(3))
    assert scores.brier.value == pytest.approx((0.25 + 2 * 0.0625) / 3)
    assert scores.log_score.value == pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3)
    assert scores.auc is not None
    assert scores.auc.value == 1.0
    assert [(row.low, row.count, row.claimed, row.seen.value) for row in scores.reliability] == [
        (0.2, 1, pytest.approx(0.25), 0.0),
        (0.4, 1, pytest.approx(0.5), 1.0),
        (0.6, 1, pytest.approx(0.75), 1.0),
    ]


def test_intervals_are_those_of_curves_drawn_again() -> None:
    """oracle: for every draw the runs of its curves are listed, a curve drawn twice twice, and scored from scratch."""
    log_odds_N, y_N, curve_N = _planted(5)
    scores = score_predictor("x", (), log_odds_N, y_N, curve_N)
    areas, briers = [], []
    for weights_K in curve_draws(curve_N):
        again = np.concatenate([np.flatnonzero(curve_N == k) for k in np.repeat(np.arange(5), weights_K)])
        areas.append(area_under_curve(log_odds_N[again], y_N[again]))
        briers.append(float(np.mean((probability(log_odds_N[again]) - y_N[again]) ** 2)))
    assert scores.auc is not None
    assert scores.auc[1:] == pytest.approx(np.quantile(areas, [0.025, 0.975]))
    assert scores.brier[1:] == pytest.approx(np.quantile(briers, [0.025, 0.975]))


def test_runs_of_a_curve_are_one_piece_of_evidence() -> None:
    """property: every run there ten times over in its own curve changes neither score nor interval."""
    log_odds_N, y_N, curve_N = _planted(6, draw=1)
    once = score_predictor("x", (), log_odds_N, y_N, curve_N)
    more = score_predictor("x", (), np.tile(log_odds_N, 10), np.tile(y_N, 10), np.tile(curve_N, 10))
    assert once.auc is not None
    assert more.auc is not None
    np.testing.assert_allclose(more.auc, once.auc)
    np.testing.assert_allclose(more.brier, once.brier)
    np.testing.assert_allclose(more.log_score, once.log_score)


def test_true_probabilities_score_best() -> None:
    """property: both scores are proper; sharper or flatter odds than those that made the outcomes score worse."""
    generator = np.random.default_rng(5)
    log_odds_N = 2 * generator.standard_normal(2_000)
    y_N = generator.random(2_000) < probability(log_odds_N)
    curve_N = np.arange(2_000) // 200
    true, sharp, flat = (score_predictor("x", (), factor * log_odds_N, y_N, curve_N) for factor in (1.0, 2.0, 0.5))
    for score in ("brier", "log_score"):
        assert getattr(true, score).value < min(getattr(sharp, score).value, getattr(flat, score).value)
    # claimed is what is seen; a bin's share has a standard error of 0.03 at most with its 240 runs or more
    assert all(abs(row.claimed - row.seen.value) < 0.1 for row in true.reliability)
    assert min(row.count for row in true.reliability) > 240


def test_gain_is_paired() -> None:
    """property: no gain over itself with certainty, all of it over a perfect rival's opposite, below 0 when worse."""
    log_odds_N, y_N, curve_N = _planted(6, draw=2)
    assert brier_gain(log_odds_N, log_odds_N, y_N, curve_N) == Estimate(0.0, 0.0, 0.0)
    sure_N = np.where(y_N, 50.0, -50.0)
    assert brier_gain(sure_N, -sure_N, y_N, curve_N) == pytest.approx((1.0, 1.0, 1.0))
    assert brier_gain(-sure_N, log_odds_N, y_N, curve_N).high < 0


def test_one_outcome_has_no_area() -> None:
    """contract: the other scores stand."""
    scores = score_predictor("x", (), np.zeros(4), np.ones(4, dtype=bool), np.array([0, 0, 1, 1]))
    assert scores.auc is None
    assert scores.brier == Estimate(0.25, 0.25, 0.25)
