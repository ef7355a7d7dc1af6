"""The normal law inside intervals, against scipy and far into the tails."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from aftershock.forecast.normal import log_cdf, log_mass, truncated_draws, truncated_moments

ENDS = [(-1.0, 2.0), (0.5, 0.7), (-np.inf, 0.3), (1.2, np.inf), (-8.0, -7.0), (7.0, 8.0), (4.0, np.inf), (-0.1, 0.1)]


@pytest.mark.parametrize(("a", "b"), ENDS)
def test_moments_are_those_of_scipy(a: float, b: float) -> None:
    """oracle: a numerical integral of the density, which knows no formula of ours."""
    z = np.linspace(max(a, -12), min(b, 12), 400_001)
    weight = stats.norm.pdf(z) / stats.norm.pdf(z).sum()
    mean = float((weight * z).sum())
    found = truncated_moments(np.array(a), np.array(b))
    assert float(found.mean) == pytest.approx(mean, abs=1e-4)  # the grid of the integral
    assert float(found.var) == pytest.approx(float((weight * (z - mean) ** 2).sum()), abs=1e-4)


@pytest.mark.parametrize(("a", "b"), ENDS)
def test_mass_is_the_difference_of_scipys_cdf(a: float, b: float) -> None:
    """oracle."""
    exact = stats.norm.logsf(a) if np.isinf(b) else stats.norm.logcdf(b)
    if np.isfinite(a) and np.isfinite(b):
        exact = (
            np.log(stats.norm.cdf(min(b, -a)) - stats.norm.cdf(min(a, -b)))
            if a < 0
            else np.log(stats.norm.sf(a) - stats.norm.sf(b))
        )
    assert float(log_mass(np.array(a), np.array(b))) == pytest.approx(float(exact), rel=1e-9)  # double precision


def test_far_tails_stay_finite_and_inside() -> None:
    """property: 30 deviations out, where Phi is 1 to every digit."""
    a, b = np.array([30.0, -31.0, 30.0]), np.array([31.0, -30.0, np.inf])
    assert np.isfinite(log_cdf(np.array(-1e3)))
    found = truncated_moments(a, b)
    draws = truncated_draws(np.random.default_rng(0), a, b)
    for values in (found.mean, draws):
        assert np.isfinite(values).all()
        assert ((values >= a) & (values <= b)).all()
    assert float(found.mean[0]) == pytest.approx(30.0332, abs=1e-3)  # 30 + 1/30 - ..., the Mills ratio
    assert ((found.var >= 0) & (found.var <= 1)).all()


def test_draws_follow_the_law() -> None:
    """oracle: Kolmogorov's distance to scipy's truncated normal; a distance of 0.02 has p = 0.03 for 5000 draws."""
    a, b = -0.5, 1.5
    draws = truncated_draws(np.random.default_rng(1), np.full(5000, a), np.full(5000, b))
    assert stats.kstest(draws, stats.truncnorm(a, b).cdf).statistic < 0.02
