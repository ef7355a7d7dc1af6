"""Fits on logarithms where some values are only known to lie in an interval, with draws of their coefficients.

Legend: N observations (runs, or curves of runs), C coefficients, B resamples or draws, E exponents. An observation is
an interval [low, high] in decades: a point where both are equal, half open where a run died (a Tobit observation), and
without information where both ends are infinite. So diverged runs stay in every fit.
Knows arrays only, no runs; must not import the lab.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aftershock.forecast.normal import truncated_draws, truncated_moments

LEVEL = 0.9
"""Level of every interval of a forecast."""
NUM_RESAMPLES = 500
MAX_ITERATIONS, TOLERANCE = 500, 1e-7
"""Of the EM iteration; the tolerance is in decades."""
NUM_CHAINS, NUM_WARM_UP, NUM_KEPT, KEEP_EVERY = 128, 150, 8, 10
"""Of the Gibbs sampler: 128 chains, and of each 8 draws, ten sweeps apart, after 150 sweeps."""
EXPONENTS = (-3.0, 3.0)
"""Range in which the exponent of a power law is looked for."""


class Interval(NamedTuple):
    """`value` with the interval [`low`, `high`] at `LEVEL`."""

    value: float
    low: float
    high: float


class Prior(NamedTuple):
    """What is assumed before the data: coefficient c ~ N(mean_C[c], sd_C[c]^2), flat where the deviation is infinite;
    `weight` pseudo-observations of a scatter of `sigma` decades."""

    mean_C: np.ndarray
    sd_C: np.ndarray
    sigma: float
    weight: float


class MapFit(NamedTuple):
    """Coefficients [B, C] and scatter [B] that maximise the penalised likelihood, one for each weighting."""

    coef_BC: np.ndarray
    sigma_B: np.ndarray


class Fit(NamedTuple):
    """One fit y = x . coef + sigma z: the estimate, and draws of what else it could be."""

    coef_C: np.ndarray
    sigma: float
    draws_BC: np.ndarray
    sigma_B: np.ndarray


class PowerLaw(NamedTuple):
    """y = offset + factor x^exponent; each of shape [B]."""

    offset_B: np.ndarray
    factor_B: np.ndarray
    exponent_B: np.ndarray

    def at(self, x: float) -> np.ndarray:
        """y at x, [B]."""
        return self.offset_B + self.factor_B * x**self.exponent_B


def fit_map(
    x_NC: np.ndarray,
    low_N: np.ndarray,
    high_N: np.ndarray,
    *,
    prior: Prior,
    weights_BN: np.ndarray | None = None,
    prior_mean_BC: np.ndarray | None = None,
) -> MapFit:
    """Maximise the censored normal likelihood by EM, for B weightings of the observations at once.

    l = sum_n w_n log p(low_n <= x_n . coef + sigma z <= high_n) - sum_c ((coef_c - mean_c) / sd_c)^2 / 2
        - weight (log sigma + (prior.sigma / sigma)^2 / 2)

    An observed point contributes its density. `prior_mean_BC` takes the place of the prior's mean, for each weighting.
    Source: Tobin 1958; EM for it Dempster, Laird and Rubin 1977, section 4.3.
    Raises ValueError where the observations do not determine the coefficients that have a flat prior.
    """
    known_N = ~(np.isneginf(low_N) & np.isposinf(high_N))
    x_NC, low_N, high_N = x_NC[known_N], low_N[known_N], high_N[known_N]
    weights_BN = np.ones((1, len(low_N))) if weights_BN is None else weights_BN[:, known_N]
    precision_C = np.where(np.isinf(prior.sd_C), 0.0, 1 / prior.sd_C**2)
    flat = precision_C == 0
    if not len(low_N) or np.linalg.matrix_rank(x_NC[:, flat]) < flat.sum():
        raise ValueError(f"{len(low_N)} observations do not determine {int(flat.sum())} coefficients; add runs")
    num_rows, num_coefs = weights_BN.shape[0], x_NC.shape[1]
    pull_BC = precision_C * (prior.mean_C[None] if prior_mean_BC is None else prior_mean_BC)
    censored = low_N != high_N
    y_BN = np.tile(_start(low_N, high_N, prior.sigma), (num_rows, 1))
    var_BN = np.zeros_like(y_BN)
    var_BN[:, censored] = prior.sigma**2
    gram_BCC = (weights_BN @ (x_NC[:, :, None] * x_NC[:, None, :]).reshape(len(x_NC), -1)).reshape(
        num_rows, num_coefs, num_coefs
    )
    total_B = weights_BN.sum(axis=1) + prior.weight
    coef_BC, var_B = np.zeros((num_rows, num_coefs)), np.full(num_rows, prior.sigma**2)
    for _ in range(MAX_ITERATIONS):
        before_BC, before_B = coef_BC, var_B
        normal_BCC = gram_BCC + var_B[:, None, None] * np.diag(precision_C)
        moment_BC = (weights_BN * y_BN) @ x_NC + var_B[:, None] * pull_BC
        coef_BC = np.linalg.solve(normal_BCC, moment_BC[..., None])[..., 0]
        mean_BN = coef_BC @ x_NC.T
        squares_B = (weights_BN * ((y_BN - mean_BN) ** 2 + var_BN)).sum(axis=1)
        var_B = (squares_B + prior.weight * prior.sigma**2) / total_B
        if censored.any():
            sigma_B1 = np.sqrt(var_B)[:, None]
            ends = ((ends_N[censored] - mean_BN[:, censored]) / sigma_B1 for ends_N in (low_N, high_N))
            moments = truncated_moments(*ends)
            y_BN[:, censored] = mean_BN[:, censored] + sigma_B1 * moments.mean
            var_BN[:, censored] = var_B[:, None] * moments.var
        moved = max(np.abs(coef_BC - before_BC).max(), np.abs(np.sqrt(var_B) - np.sqrt(before_B)).max())
        if moved < TOLERANCE:
            break
    return MapFit(coef_BC, np.sqrt(var_B))


def fit_runs(
    x_NC: np.ndarray,
    low_N: np.ndarray,
    high_N: np.ndarray,
    *,
    prior: Prior,
    units_N: np.ndarray | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Fit:
    """`fit_map` with a bootstrap over runs, all resamples at once.

    A resample weighs the runs by a flat Dirichlet law (Rubin 1981), so none can lose a size or a rate, and draws the
    prior's mean anew, so that what the data do not determine spreads as the prior says. `units_N` numbers what is
    weighed as one, such as the runs of one seed of a size, which share weights and batches. Deviations from the
    estimate are stretched by sqrt(N / chi^2 of N - C degrees of freedom), which makes the interval of a mean Student's.
    """
    generator = np.random.default_rng(seed)
    point = fit_map(x_NC, low_N, high_N, prior=prior)
    soft = np.isfinite(prior.sd_C)
    noise_BC = np.where(soft, prior.sd_C, 0.0) * generator.standard_normal((num_resamples, len(soft)))
    units_N = np.arange(len(low_N)) if units_N is None else units_N
    draws = fit_map(
        x_NC,
        low_N,
        high_N,
        prior=prior,
        weights_BN=resample_weights(generator, int(units_N.max()) + 1, num_resamples)[:, units_N],
        prior_mean_BC=prior.mean_C + noise_BC,
    )
    num_known = int((~(np.isneginf(low_N) & np.isposinf(high_N))).sum())
    freedom = max(1, num_known - int((~soft).sum()))
    stretch_B = np.sqrt(num_known / generator.chisquare(freedom, num_resamples))
    draws_BC = point.coef_BC + (draws.coef_BC - point.coef_BC) * stretch_B[:, None]
    sigma = float(point.sigma_B[0])
    return Fit(point.coef_BC[0], sigma, draws_BC, sigma * stretch_B)


def resample_weights(generator: np.random.Generator, num_runs: int, num_resamples: int) -> np.ndarray:
    """Flat Dirichlet weights [B, N] of mean 1 (Rubin 1981)."""
    return generator.dirichlet(np.ones(num_runs), num_resamples) * num_runs


def draw_fits(x_NC: np.ndarray, low_N: np.ndarray, high_N: np.ndarray, *, prior: Prior, seed: int = 0) -> Fit:
    """Draws from the posterior of an interval-censored fit, by data augmentation (Chib 1992), chains side by side.

    A bootstrap would not do where most observations are intervals: if all seeds of a size fail at one rung of the
    ladder, no resample differs from another, and yet the threshold may lie anywhere between two rungs. Chains start
    spread over the brackets. The estimate is the posterior mean, `sigma` the posterior median.
    """
    start = fit_map(x_NC, low_N, high_N, prior=prior)
    generator = np.random.default_rng(seed)
    known_N = ~(np.isneginf(low_N) & np.isposinf(high_N))
    x_NC, low_N, high_N = x_NC[known_N], low_N[known_N], high_N[known_N]
    precision_C = np.where(np.isinf(prior.sd_C), 0.0, 1 / prior.sd_C**2)
    basis_CC, prior_share_C = _both_diagonal(x_NC.T @ x_NC, precision_C)
    width = np.where(np.isfinite(high_N - low_N), high_N - low_N, prior.sigma)
    y_BN = _start(low_N, high_N, prior.sigma) + width * (generator.random((NUM_CHAINS, 1)) - 0.5)
    sigma_B = np.full(NUM_CHAINS, float(start.sigma_B[0]))
    coefs, sigmas = [], []
    for sweep in range(NUM_WARM_UP + NUM_KEPT * KEEP_EVERY):
        weight_B1 = sigma_B[:, None] ** -2
        var_BC = 1 / ((1 - prior_share_C) * weight_B1 + prior_share_C)
        target_BC = ((y_BN @ x_NC) * weight_B1 + precision_C * prior.mean_C) @ basis_CC
        noise_BC = generator.standard_normal(var_BC.shape)
        coef_BC = (var_BC * target_BC + np.sqrt(var_BC) * noise_BC) @ basis_CC.T
        mean_BN = coef_BC @ x_NC.T
        squares_B = ((y_BN - mean_BN) ** 2).sum(axis=1) + prior.weight * prior.sigma**2
        sigma_B = np.sqrt(squares_B / generator.chisquare(len(low_N) + prior.weight, NUM_CHAINS))
        ends = ((ends_N - mean_BN) / sigma_B[:, None] for ends_N in (low_N, high_N))
        y_BN = mean_BN + sigma_B[:, None] * truncated_draws(generator, *ends)
        if sweep >= NUM_WARM_UP and (sweep - NUM_WARM_UP) % KEEP_EVERY == 0:
            coefs.append(coef_BC)
            sigmas.append(sigma_B)
    draws_BC, sigma_B = np.concatenate(coefs), np.concatenate(sigmas)
    return Fit(draws_BC.mean(axis=0), float(np.median(sigma_B)), draws_BC, sigma_B)


def predict_draws(fit: Fit, x_C: np.ndarray, *, seed: int = 1) -> np.ndarray:
    """Draws [B] of what one new run at `x_C` shows: the coefficients' doubt and the scatter of runs."""
    noise_B = np.random.default_rng(seed).standard_normal(len(fit.sigma_B))
    return fit.draws_BC @ x_C + fit.sigma_B * noise_B


def interval_of(value: float, draws_B: np.ndarray) -> Interval:
    """`value` with the interval at `LEVEL` of the draws. Infinite draws are allowed, nan is not."""
    order = np.sort(draws_B)
    tail = (1 - LEVEL) / 2
    ends = [float(order[round(share * (len(order) - 1))]) for share in (tail, 1 - tail)]
    return Interval(float(value), *ends)


def fit_power_law(x_N: np.ndarray, y_N: np.ndarray, *, weights_BN: np.ndarray | None = None) -> PowerLaw:
    """Least squares of y = offset + factor x^exponent by variable projection (Golub and Pereyra 1973).

    Offset and factor are linear, so only the exponent is searched, over `EXPONENTS`, refined four times tenfold; all
    weightings at once. Source of the form: any scaling law with a floor.

    >>> law = fit_power_law(np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 5.0, 9.0, 17.0]))
    >>> [round(float(value[0]), 3) for value in law]
    [1.0, 2.0, 1.0]

    Raises ValueError for fewer than three different x, or one that is not above 0.
    """
    if len(np.unique(x_N)) < 3 or not (x_N > 0).all():
        raise ValueError(f"a power law needs three different positive x at least, got {np.unique(x_N).tolist()}")
    weights_BN = np.ones((1, len(x_N))) if weights_BN is None else weights_BN
    scale = math.exp(float(np.log(x_N).mean()))  # powers of x / scale stay near 1
    low_B = np.full(len(weights_BN), EXPONENTS[0])
    step = (EXPONENTS[1] - EXPONENTS[0]) / 60
    exponent_B = low_B
    for _ in range(5):
        grid_BE = low_B[:, None] + step * np.arange(61)
        grid_BE = np.where(np.abs(grid_BE) < 1e-9, 1e-9, grid_BE)  # x^0 is the offset again
        exponent_B = _best_exponents(np.log(x_N / scale), y_N, weights_BN, grid_BE)
        low_B, step = exponent_B - 3 * step, step / 10
    offset_B, factor_B, _ = _projected(np.log(x_N / scale), y_N, weights_BN, exponent_B[:, None])
    return PowerLaw(offset_B[:, 0], factor_B[:, 0] * scale**-exponent_B, exponent_B)


def _start(low_N: np.ndarray, high_N: np.ndarray, sigma: float) -> np.ndarray:
    """A first guess of censored values: the middle, or one sigma inside a half-open interval."""
    low_N, high_N = np.where(np.isneginf(low_N), high_N - 2 * sigma, low_N), high_N
    return (low_N + np.where(np.isposinf(high_N), low_N + 2 * sigma, high_N)) / 2


def _both_diagonal(gram_CC: np.ndarray, precision_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A basis V in which gram and precision are diagonal and sum to 1, and the precision's share there.

    Then (gram / s^2 + precision)^-1 = V diag(1 / ((1 - share) / s^2 + share)) V' for every s, without a solve.
    """
    whole_CC = np.linalg.cholesky(gram_CC + np.diag(precision_C))
    inverse_CC = np.linalg.inv(whole_CC)
    share_C, turn_CC = np.linalg.eigh(inverse_CC @ np.diag(precision_C) @ inverse_CC.T)
    return inverse_CC.T @ turn_CC, np.clip(share_C, 0.0, 1.0)


def _best_exponents(log_x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, grid_BE: np.ndarray) -> np.ndarray:
    _, _, residual_BE = _projected(log_x_N, y_N, weights_BN, grid_BE)
    return np.take_along_axis(grid_BE, residual_BE.argmin(axis=1)[:, None], axis=1)[:, 0]


def _projected(
    log_x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray, grid_BE: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, factor and residual sum of squares [B, E] at each exponent."""
    power_BEN = np.exp(grid_BE[..., None] * log_x_N)
    share_BN = weights_BN / weights_BN.sum(axis=1, keepdims=True)
    mean_BE = np.einsum("bn,ben->be", share_BN, power_BEN)
    centred_BEN = power_BEN - mean_BE[..., None]
    mean_y_B = share_BN @ y_N
    away_BN = y_N - mean_y_B[:, None]
    square_BE = np.einsum("bn,ben->be", share_BN, centred_BEN**2)
    factor_BE = np.einsum("bn,ben,bn->be", share_BN, centred_BEN, away_BN) / square_BE
    residual_BEN = away_BN[:, None] - factor_BE[..., None] * centred_BEN
    return mean_y_B[:, None] - factor_BE * mean_BE, factor_BE, np.einsum("bn,ben->be", share_BN, residual_BEN**2)
