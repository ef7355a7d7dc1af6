"""forecast.curves: batched fits against one by one and against scipy, planted curves, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from aftershock.forecast.curves import (
    EDGE,
    FAMILIES,
    SLOPE_SPREAD,
    TYPICAL_SLOPE,
    Curve,
    fit_curve,
    sigmoid,
)

X_N = np.linspace(19.0, 24.0, 60)
CHANCE = 0.25


def noisy(curve: Callable[[np.ndarray], np.ndarray], *, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    return np.clip(curve(X_N) + noise * np.random.default_rng(seed).normal(size=X_N.size), 0, 1)


def rising(x_N: np.ndarray) -> np.ndarray:
    return CHANCE + (1 - CHANCE) * sigmoid(1.8 * (x_N - 22.5))


def counts(num_rows: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(X_N.size, np.full(X_N.size, 1 / X_N.size), size=num_rows).astype(float)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_one_by_one(family: str) -> None:
    """oracle: B rows of weights at once against B fits of one row."""
    y_N, weights_BN = noisy(rising), counts(5)
    together = fit_curve(family, X_N, y_N, weights=weights_BN, chance=CHANCE).predict(X_N)
    alone = [fit_curve(family, X_N, y_N, weights=row_N, chance=CHANCE).predict(X_N)[0] for row_N in weights_BN]
    # Sums in another order may steer the last damped steps: far below any noise of a score.
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_repeated_runs(family: str) -> None:
    """equivalence: a run of weight 2 is that run twice, a run of weight 0 is not there."""
    y_N = noisy(rising)
    weight_N = counts(1)[0]
    times_N = np.repeat(np.arange(X_N.size), weight_N.astype(int))
    weighted = fit_curve(family, X_N, y_N, weights=weight_N, chance=CHANCE)
    if family == "broken_power_law":  # its grid lies around the runs it is given, weight 0 or not
        times_N = np.append(times_N, [0, X_N.size - 1])
        weighted = fit_curve(family, X_N, y_N, weights=np.bincount(times_N).astype(float), chance=CHANCE)
    repeated = fit_curve(family, X_N[times_N], y_N[times_N], chance=CHANCE)
    # Both are minima of one sum of squares, found from grids that differ a little.
    np.testing.assert_allclose(weighted.predict(X_N), repeated.predict(X_N), atol=5e-3)


def test_the_line_is_numpys() -> None:
    """oracle: numpy.polyfit with weights."""
    y_N, weights_BN = noisy(lambda x_N: 0.1 + 0.1 * (x_N - 19)), counts(3)
    fitted = fit_curve("line", X_N, y_N, weights=weights_BN).params_BP
    for params_P, weight_N in zip(fitted, weights_BN, strict=True):
        slope, level = np.polyfit(X_N, y_N, 1, w=np.sqrt(weight_N))
        np.testing.assert_allclose(params_P, [level, slope], rtol=1e-8)  # two solvers of one linear system


def test_the_adjusted_logit_is_a_line_through_logits() -> None:
    """oracle: the published range, then numpy.polyfit on the logits."""
    y_N = noisy(rising)
    low, high = 0.9 * y_N.min(), 1 - 0.9 * (1 - y_N.max())
    share_N = np.clip((y_N - low) / (high - low), EDGE, 1 - EDGE)
    slope, level = np.polyfit(X_N, np.log(share_N / (1 - share_N)), 1)
    fitted = fit_curve("adjusted_logit", X_N, y_N)
    np.testing.assert_allclose(fitted.params_BP[0], [low, high, level, slope], rtol=1e-8)  # one linear system
    np.testing.assert_allclose(fitted.predict(X_N)[0], low + (high - low) / (1 + np.exp(-(level + slope * X_N))))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["sigmoid", "steady_sigmoid", "broken_power_law"])
def test_no_row_is_fitted_worse_than_by_scipy(family: str, seed: int) -> None:
    """oracle: scipy's least_squares, started at our result and at four other places, finds nothing better."""
    y_N, weights_BN = noisy(rising, seed=seed), counts(2, seed)
    fitted = fit_curve(family, X_N, y_N, weights=weights_BN, chance=CHANCE)
    rng = np.random.default_rng(seed)
    for params_P, sse, weight_N in zip(fitted.params_BP, fitted.sse_B, weights_BN, strict=True):
        free, low, high = _free(family, params_P)
        pull = math.sqrt(sse / (weight_N.sum() - 2)) / SLOPE_SPREAD if family == "steady_sigmoid" else 0.0
        residual = _residual(family, params_P, free, weight_N, y_N, pull)
        ours = float((residual(params_P[free]) ** 2).sum())
        starts = [np.clip(params_P[free], low, high), *rng.uniform(low, high, size=(4, len(low)))]
        theirs = min(2 * least_squares(residual, start, bounds=(low - 1e-9, high + 1e-9)).cost for start in starts)
        # The broken power law has flat valleys: 2 % of the squares is far less than two resamples differ by.
        assert ours <= theirs * (1.02 if family == "broken_power_law" else 1.0001)


def _residual(
    family: str, params_P: np.ndarray, free: np.ndarray, weight_N: np.ndarray, y_N: np.ndarray, pull: float
) -> Callable[[np.ndarray], np.ndarray]:
    """What least squares minimise: weighted misses, and the pull on the last parameter, the log slope."""

    def residual(values: np.ndarray) -> np.ndarray:
        whole_P = params_P.copy()
        whole_P[free] = values
        miss_N = np.sqrt(weight_N) * (FAMILIES[family].shape(whole_P[None], X_N)[0] - y_N)
        return np.append(miss_N, pull * (whole_P[-1] - math.log(TYPICAL_SLOPE)))

    return residual


def _free(family: str, params_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which parameters scipy may move, and its box."""
    if family == "broken_power_law":
        low = np.array([0.0, 0.0, 0.0, 0.0, X_N[0] - params_P[6], math.log(0.05)])
        return np.arange(6), low, np.array([1.0, 2.0, 0.5, 1.0, X_N[-1] - params_P[6] + 0.5, 0.0])
    return np.array([1, 2]), np.array([X_N[0] - 2, math.log(0.1)]), np.array([X_N[-1] + 5, math.log(30.0)])


def test_a_planted_sigmoid_comes_back() -> None:
    """planted: floor at chance, midpoint 22.5, slope 1.8."""
    floor, midpoint, log_slope = fit_curve("sigmoid", X_N, noisy(rising, noise=0.01), chance=CHANCE).params_BP[0]
    assert floor == CHANCE
    assert midpoint == pytest.approx(22.5, abs=0.05)  # 60 runs of noise 0.01: standard error 0.01
    assert math.exp(log_slope) == pytest.approx(1.8, abs=0.1)  # standard error 0.03


def test_a_planted_broken_power_law_is_foretold() -> None:
    """planted: flat, a break at 10^22, then error falling by 10^-0.4 a decade; foretold a decade further."""
    params_P = np.array([[0.05, 0.9, 0.0, 0.4, 0.0, math.log(0.2), 22.0]])

    def planted(x_N: np.ndarray) -> np.ndarray:
        return FAMILIES["broken_power_law"].shape(params_P, x_N)[0]

    foretold = fit_curve("broken_power_law", X_N, noisy(planted, noise=0.005)).predict([25.0])[0, 0]
    assert foretold == pytest.approx(planted(np.array([25.0]))[0], abs=0.03)  # a decade out; the line is 0.2 off


def test_a_planted_adjusted_logit_comes_back() -> None:
    """planted: a logit line between 0.18 and 0.91, without noise."""
    y_N = 0.18 + 0.73 * sigmoid(1.2 * (X_N - 21.5))
    fitted = fit_curve("adjusted_logit", X_N, y_N)
    # The range is read off the ends of the data, so it is near the planted one and not it.
    np.testing.assert_allclose(fitted.predict(X_N)[0], y_N, atol=0.04)


def test_the_steady_sigmoid_does_not_believe_one_last_run() -> None:
    """planted: chance, but for the last of twelve runs. The plain fit calls it a step."""
    x_N = np.linspace(20, 22, 12)
    y_N = 0.02 + 0.01 * (np.arange(12) % 2)
    y_N[-1] = 0.1
    plain, steady = (
        math.exp(fit_curve(name, x_N, y_N, chance=0.02).params_BP[0, 2]) for name in ("sigmoid", "steady_sigmoid")
    )
    assert plain > 8
    assert abs(math.log(steady / TYPICAL_SLOPE)) < 2 * SLOPE_SPREAD


def test_the_floor_without_a_chance_is_the_lowest_score() -> None:
    """contract."""
    y_N = noisy(rising)
    assert fit_curve("sigmoid", X_N, y_N).params_BP[0, 0] == y_N.min()


@settings(max_examples=25)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.floats(0, 1), min_size=6, max_size=12),
    st.floats(-30, 60),
)
def test_a_curve_stays_in_its_range(family: str, y: list[float], place: float) -> None:
    """property: any scores, any place, however far out."""
    predicted = fit_curve(family, np.linspace(20, 23, len(y)), y, chance=0.1).predict([place])
    assert np.isfinite(predicted).all()
    assert ((predicted >= 0) & (predicted <= 1)).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "parabola"}, "unknown family 'parabola'; known: line"),
        ({"y": np.append(np.zeros(59), 1.2)}, "as a share of the score's range"),
        ({"y": np.zeros(3)}, "one y and one weight a row for each x"),
        ({"y": np.append(np.zeros(59), np.nan)}, "leave runs without a score"),
        ({"weights": -np.ones(60)}, "weights must not be negative"),
        ({"weights": np.eye(60)[0]}, "add models of another compute"),
        ({"x": np.full(60, 20.0)}, "add models of another compute"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], said: str) -> None:
    """contract: a sentence that says what to do."""
    given_: dict[str, object] = {"family": "line", "x": X_N, "y": np.linspace(0, 1, 60), "weights": None} | change
    family, x, y, weights = (given_[name] for name in ("family", "x", "y", "weights"))
    with pytest.raises(ValueError, match=said):
        fit_curve(family, x, y, weights=weights)  # type: ignore[arg-type]


def test_a_curve_is_its_parameters() -> None:
    """contract: what a study stores is enough to predict."""
    fitted = fit_curve("sigmoid", X_N, noisy(rising), chance=CHANCE)
    again = Curve("sigmoid", fitted.params_BP.copy(), fitted.sse_B)
    np.testing.assert_array_equal(again.predict(X_N), fitted.predict(X_N))
