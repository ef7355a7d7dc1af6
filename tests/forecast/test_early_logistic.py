"""The ridge logistic regression behind early forecasts, against a general minimiser and against its own definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aftershock.forecast.logistic import PENALTIES, choose_penalty, fit_logistic, log_loss, probability


def _rows(num_rows: int, num_features: int, *, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of unlike scales, and an outcome that the first of them drives."""
    generator = np.random.default_rng(draw)
    x_NC = generator.standard_normal((num_rows, num_features)) * 10.0 ** np.arange(num_features) + 3
    y_N = x_NC[:, 0] - 3 + generator.standard_normal(num_rows) > 0.5
    return x_NC, y_N


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_fit_is_the_minimum(penalty: float) -> None:
    """oracle: scipy's BFGS on the penalized log-likelihood, written out plainly."""
    from scipy.optimize import minimize

    x_NC, y_N = _rows(60, 4)
    z_NC = (x_NC - x_NC.mean(axis=0)) / x_NC.std(axis=0)

    def objective(beta_D: np.ndarray) -> float:
        eta_N = beta_D[0] + z_NC @ beta_D[1:]
        likelihood = sum(math.log1p(math.exp(-eta if y else eta)) for eta, y in zip(eta_N, y_N, strict=True))
        return likelihood + penalty / 2 * float((beta_D[1:] ** 2).sum())

    best = minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-7})
    fit = fit_logistic(x_NC, y_N, penalty=penalty)
    # BFGS with numerical gradients stops within about 1e-6 of the minimum
    np.testing.assert_allclose([fit.intercept, *fit.coef_C], best.x, atol=1e-4)
    np.testing.assert_allclose(fit.log_odds(x_NC), best.x[0] + z_NC @ best.x[1:], atol=1e-3)


def test_no_feature_is_the_share_and_a_constant_one_nothing() -> None:
    """contract: the base rate is the fit without features; a feature without spread gets no say, also on new rows."""
    _, y_N = _rows(40, 1)
    base = fit_logistic(np.empty((40, 0)), y_N, penalty=1.0)
    np.testing.assert_allclose(probability(base.log_odds(np.empty((3, 0)))), y_N.mean())
    flat = fit_logistic(np.full((40, 1), 7.0), y_N, penalty=1.0)
    assert flat.coef_C.tolist() == [0.0]
    np.testing.assert_allclose(probability(flat.log_odds(np.array([[1e9]]))), y_N.mean())


def test_units_do_not_matter() -> None:
    """property: any scale and offset of a feature gives the same log-odds, penalty and all."""
    x_NC, y_N = _rows(50, 3, draw=1)
    plain = fit_logistic(x_NC, y_N, penalty=1.0).log_odds(x_NC)
    moved_NC = x_NC * np.array([1e-3, 5.0, -2.0]) + np.array([1.0, -100.0, 3.0])
    # the fits end where the gradient is 1e-9 a row
    np.testing.assert_allclose(fit_logistic(moved_NC, y_N, penalty=1.0).log_odds(moved_NC), plain, atol=1e-6)


def test_separated_rows_have_a_finite_fit() -> None:
    """contract: a line divides the outcomes, and the penalty keeps the probabilities inside (0, 1)."""
    x_NC = np.arange(20.0)[:, None]
    fit = fit_logistic(x_NC, x_NC[:, 0] > 9, penalty=0.01)
    p_N = probability(fit.log_odds(x_NC))
    assert np.all(np.diff(p_N) > 0)
    assert 0 < p_N[0] < 0.01
    assert 0.99 < p_N[-1] < 1


def test_the_penalty_is_large_where_nothing_tells_and_small_where_something_does() -> None:
    """planted: eight features of noise, and one that decides; by groups left out."""
    generator = np.random.default_rng(2)
    group_N = np.repeat(np.arange(4), 20)
    noise_NC = generator.standard_normal((80, 8))
    coin_N = generator.random(80) < 0.4
    assert choose_penalty(noise_NC, coin_N, group_N) >= 30
    assert choose_penalty(noise_NC[:, :1], noise_NC[:, 0] > 0.3, group_N) == PENALTIES[0]


def test_the_penalty_is_the_one_with_the_lowest_score_left_out() -> None:
    """oracle: the sum written as loops."""
    x_NC, y_N = _rows(45, 5, draw=3)
    group_N = np.arange(45) % 3
    totals = {}
    for penalty in PENALTIES:
        total = 0.0
        for group in range(3):
            fit = fit_logistic(x_NC[group_N != group], y_N[group_N != group], penalty=penalty)
            for x_C, y in zip(x_NC[group_N == group], y_N[group_N == group], strict=True):
                p = float(probability(fit.log_odds(x_C[None]))[0])
                total -= math.log(p if y else 1 - p)
        totals[penalty] = total
    assert choose_penalty(x_NC, y_N, group_N) == min(totals, key=lambda penalty: totals[penalty])


def test_log_loss_of_certainty_is_finite() -> None:
    """contract: log-odds of 1000 give a probability that rounds to 1, and a score of 1000 where it did not happen."""
    np.testing.assert_allclose(
        log_loss(np.array([1000.0, 1000.0, 0.0]), np.array([True, False, True])), [0, 1000, math.log(2)]
    )


def test_bad_input_is_a_sentence() -> None:
    """contract."""
    x_NC = np.zeros((4, 1))
    with pytest.raises(ValueError, match="rows of both outcomes, got 4 of one"):
        fit_logistic(x_NC, np.ones(4, dtype=bool), penalty=1.0)
    with pytest.raises(ValueError, match="penalty must be above 0, got 0"):
        fit_logistic(x_NC, np.array([True, False, True, False]), penalty=0.0)
    with pytest.raises(ValueError, match="two groups or more to leave one out, got 1"):
        choose_penalty(x_NC, np.array([True, False, True, False]), np.zeros(4))
