"""Censored fits: against brute force, against a slow loop, and on planted laws that dropping runs would bend."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from aftershock.forecast.fits import (
    Prior,
    draw_fits,
    fit_map,
    fit_power_law,
    fit_runs,
    interval_of,
    predict_draws,
    resample_weights,
)

FLAT = Prior(np.zeros(2), np.full(2, math.inf), 0.1, 2.0)


def tobit_data(
    seed: int, *, num: int = 40, sigma: float = 0.2
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y = 0.3 + x + noise, known only to lie above 0.8 where it does: design, true values, low and high ends."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(-1, 1, num)
    y = 0.3 + x + sigma * generator.standard_normal(num)
    low, high = y.copy(), y.copy()
    low[y > 0.8], high[y > 0.8] = 0.8, math.inf
    return np.stack([np.ones(num), x], axis=1), y, low, high


def objective(
    theta: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray, prior: Prior, w: np.ndarray
) -> float:
    """Minus the penalised likelihood of `fit_map`, term by term as its docstring writes it."""
    *coef, log_sigma = theta
    mean, sigma = x @ np.array(coef), math.exp(log_sigma)
    value = 0.0
    for n in range(len(x)):
        if low[n] == high[n]:
            value += w[n] * stats.norm.logpdf(low[n], mean[n], sigma)
        else:
            mass = stats.norm.cdf(high[n], mean[n], sigma) - stats.norm.cdf(low[n], mean[n], sigma)
            value += w[n] * math.log(max(mass, 1e-300))
    value -= float((((np.array(coef) - prior.mean_C) / prior.sd_C) ** 2).sum()) / 2
    return -(value - prior.weight * (log_sigma + (prior.sigma / sigma) ** 2 / 2))


def test_em_finds_the_maximum_that_a_search_finds() -> None:
    """oracle: Nelder-Mead on the likelihood written out run by run, with weights, a prior and both kinds of bound."""
    x, _, low, high = tobit_data(0)
    high[:3] = low[:3]
    low[:3] = -math.inf
    high[3], low[3] = low[3] + 0.4, low[3] - 0.1
    prior = Prior(np.array([0.0, 0.5]), np.array([math.inf, 0.3]), 0.1, 2.0)
    weights = np.random.default_rng(1).uniform(0.2, 2, len(x))
    found = fit_map(x, low, high, prior=prior, weights_BN=weights[None])
    slow = optimize.minimize(
        objective,
        [0.0, 0.5, -1.0],
        (x, low, high, prior, weights),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10},
    )
    assert found.coef_BC[0] == pytest.approx(slow.x[:2], abs=1e-4)  # the search's tolerance
    assert float(found.sigma_B[0]) == pytest.approx(math.exp(slow.x[2]), rel=1e-3)


def test_all_weightings_at_once_equal_one_at_a_time() -> None:
    """oracle: vectorised = slow loop."""
    x, _, low, high = tobit_data(2)
    weights = resample_weights(np.random.default_rng(0), len(x), 5)
    together = fit_map(x, low, high, prior=FLAT, weights_BN=weights)
    for b, row in enumerate(weights):
        alone = fit_map(x, low, high, prior=FLAT, weights_BN=row[None])
        assert together.coef_BC[b] == pytest.approx(alone.coef_BC[0], abs=1e-5)  # a hundred EM tolerances
        assert float(together.sigma_B[b]) == pytest.approx(float(alone.sigma_B[0]), abs=1e-5)


def test_without_bounds_it_is_least_squares() -> None:
    """equivalence."""
    x, y, _, _ = tobit_data(3)
    found = fit_map(x, y, y, prior=FLAT)
    assert found.coef_BC[0] == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0], abs=1e-9)


def test_censored_runs_remove_the_bias_that_dropping_them_has() -> None:
    """planted: over 30 studies the slope without the runs that died is far too low; with their bounds it is right."""
    kept, dropped = [], []
    for seed in range(30):
        x, _, low, high = tobit_data(seed, sigma=0.4)
        kept.append(fit_map(x, low, high, prior=FLAT).coef_BC[0, 1])
        seen = low == high
        dropped.append(fit_map(x[seen], low[seen], high[seen], prior=FLAT).coef_BC[0, 1])
    error = float(np.std(kept)) / math.sqrt(30)
    assert np.mean(kept) == pytest.approx(1.0, abs=3 * error)
    assert np.mean(dropped) < 0.85


def test_an_observation_without_information_changes_nothing() -> None:
    """property."""
    x, _, low, high = tobit_data(4)
    more = np.concatenate([x, [[1.0, 5.0]]])
    wide = fit_map(more, np.append(low, -math.inf), np.append(high, math.inf), prior=FLAT)
    assert wide.coef_BC == pytest.approx(fit_map(x, low, high, prior=FLAT).coef_BC, abs=1e-12)


def test_too_few_observations_are_refused() -> None:
    """contract."""
    x = np.array([[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="do not determine 2 coefficients"):
        fit_map(x, np.zeros(2), np.zeros(2), prior=FLAT)
    with pytest.raises(ValueError, match="0 observations"):
        fit_map(x, np.full(2, -math.inf), np.full(2, math.inf), prior=FLAT)


def test_bootstrap_intervals_cover() -> None:
    """planted: of 100 studies of 9 runs, the 90 % interval of one new run holds it in 80 to 97 (binomial, 3 sd)."""
    inside, point = [], np.array([1.0, 1.5])
    for seed in range(100):
        x, y, _, _ = tobit_data(seed, num=9)
        new = 0.3 + 1.5 + 0.2 * np.random.default_rng(1000 + seed).standard_normal()
        bounds = interval_of(0.0, predict_draws(fit_runs(x, y, y, prior=FLAT, seed=seed, num_resamples=200), point))
        inside.append(bounds.low <= new <= bounds.high)
    assert 0.8 <= np.mean(inside) <= 0.97


def test_runs_that_share_their_scatter_are_weighed_as_one() -> None:
    """planted: 8 curves of 10 runs, all scatter shared in a curve: the mean is as unsure as that of 8 values."""
    generator = np.random.default_rng(0)
    units = np.repeat(np.arange(8), 10)
    y = generator.standard_normal(8)[units] + 1e-3 * generator.standard_normal(80)
    ones, flat = np.ones((80, 1)), Prior(np.zeros(1), np.full(1, math.inf), 0.1, 1.0)
    shared, alone = (fit_runs(ones, y, y, prior=flat, units_N=each).draws_BC.std() for each in (units, None))
    error = float(np.std(y[::10], ddof=1)) / math.sqrt(8)
    assert shared == pytest.approx(error, rel=0.2)  # 7/8 of the variance, and 500 draws
    assert alone < 0.5 * error


def test_a_soft_coefficient_spreads_as_its_prior_where_the_data_are_silent() -> None:
    """property: a column that is zero in every run; 500 draws know a deviation to 3 %, 4 times that is allowed."""
    x, y, _, _ = tobit_data(5)
    x = np.concatenate([x, np.zeros((len(x), 1))], axis=1)
    prior = Prior(np.array([0, 0, 0.4]), np.array([math.inf, math.inf, 0.25]), 0.1, 2.0)
    fit = fit_runs(x, y, y, prior=prior)
    assert fit.coef_C[2] == pytest.approx(0.4, abs=1e-9)
    assert fit.draws_BC[:, 2].std() == pytest.approx(0.25, rel=0.15)


def test_draws_follow_the_posterior() -> None:
    """oracle: brackets of half a decade that all agree, where a bootstrap has no spread; against a grid of the law."""
    low, high = np.full(6, -1.0), np.full(6, -0.5)
    low[0], high[0] = -0.5, 0.0
    prior = Prior(np.zeros(1), np.array([math.inf]), 0.15, 3.0)
    fit = draw_fits(np.ones((6, 1)), low, high, prior=prior)
    mean, log_sigma = np.meshgrid(np.linspace(-1.5, 0.3, 300), np.linspace(-5, 0.5, 300), indexing="ij")
    sigma = np.exp(log_sigma)
    log_p = -prior.weight * (log_sigma + (prior.sigma / sigma) ** 2 / 2)
    for a, b in zip(low, high, strict=True):
        log_p += np.log(np.maximum(stats.norm.cdf((b - mean) / sigma) - stats.norm.cdf((a - mean) / sigma), 1e-300))
    weight = np.exp(log_p - log_p.max()).sum(axis=1)
    cdf = np.cumsum(weight) / weight.sum()
    quantiles = np.interp([0.05, 0.5, 0.95], cdf, mean[:, 0])
    # 1024 draws of chains that remember: an effective few hundred know a 5 % quantile to about 0.02
    assert np.quantile(fit.draws_BC[:, 0], [0.05, 0.5, 0.95]) == pytest.approx(quantiles, abs=0.04)


def test_power_law_is_that_of_a_search() -> None:
    """oracle: scipy's own least squares in three parameters, from the truth."""
    generator = np.random.default_rng(0)
    x = np.geomspace(1e3, 1e6, 12)
    y = 2.0 + 30 * x**-0.4 + 0.02 * generator.standard_normal(12)
    found = fit_power_law(x, y)
    slow, _ = optimize.curve_fit(lambda x, a, b, c: a + b * x**c, x, y, p0=(2.0, 30.0, -0.4))
    assert found.at(1e7)[0] == pytest.approx(slow[0] + slow[1] * 1e7 ** slow[2], abs=1e-3)  # the exponent's grid, 1e-5
    assert found.exponent_B[0] == pytest.approx(slow[2], abs=1e-3)


def test_power_laws_of_all_weightings_equal_one_at_a_time() -> None:
    """oracle: vectorised = slow loop."""
    x, generator = np.geomspace(1, 100, 8), np.random.default_rng(1)
    y = 1 + x**0.7 + 0.1 * generator.standard_normal(8)
    weights = resample_weights(generator, 8, 4)
    together = fit_power_law(x, y, weights_BN=weights).at(300.0)
    alone = [float(fit_power_law(x, y, weights_BN=row[None]).at(300.0)[0]) for row in weights]
    assert together == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("x", [[1.0, 2.0], [0.0, 1.0, 2.0]])
def test_a_power_law_needs_three_positive_sizes(x: list[float]) -> None:
    """contract."""
    with pytest.raises(ValueError, match="three different positive x"):
        fit_power_law(np.array(x), np.ones(len(x)))
