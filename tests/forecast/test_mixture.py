"""forecast.mixture: planted shared curves, one curve against scipy, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from aftershock.forecast.curves import TYPICAL_SLOPE, fit_curve, sigmoid
from aftershock.forecast.mixture import SLOPE_PRIOR, TASK_WEIGHT, TaskPoints, fit_mixture

X_N = np.linspace(19.0, 24.0, 50)
EARLY, LATE = 20.5, 23.5


def planted(share_early: float, *, noise: float = 0.0, chance: float = 0.0, seed: int = 0) -> TaskPoints:
    kinds_2N = sigmoid(1.5 * (X_N - np.array([[EARLY], [LATE]])))
    solved_N = share_early * kinds_2N[0] + (1 - share_early) * kinds_2N[1]
    y_N = chance + (1 - chance) * solved_N + noise * np.random.default_rng(seed).normal(size=X_N.size)
    return TaskPoints(X_N, np.clip(y_N, 0, 1), chance)


def test_planted_curves_and_shares_come_back() -> None:
    """planted: nine tasks of two kinds of questions; both midpoints, and who has how much of which."""
    shares = np.linspace(0.1, 0.9, 9)
    mixture = fit_mixture([planted(share, noise=0.02, seed=i) for i, share in enumerate(shares)], num_curves=2)
    early, late = np.argsort(mixture.midpoint_K)
    assert mixture.midpoint_K[early] == pytest.approx(EARLY, abs=0.3)  # slopes and shares give a little way
    assert mixture.midpoint_K[late] == pytest.approx(LATE, abs=0.3)
    np.testing.assert_allclose(mixture.share_TK[:, early], shares, atol=0.1)  # and so do these


def test_a_mixture_foretells_a_second_rise() -> None:
    """planted: a task half early, half late, cut off before the late half; its neighbours have shown the late curve.

    One sigmoid of its own takes the first half for the whole way up, or the pause for the end.
    """
    seen_N = X_N < 22.5
    whole = [planted(share, seed=i) for i, share in enumerate((0.1, 0.3, 0.7, 0.9))]
    half = planted(0.5)
    short = TaskPoints(X_N[seen_N], np.asarray(half.y)[seen_N], 0.0)
    truth_M = np.asarray(half.y)[~seen_N]
    together_M = fit_mixture([*whole, short], num_curves=2).predict(4, X_N[~seen_N])
    alone_M = fit_curve("sigmoid", X_N[seen_N], np.asarray(short.y), chance=0.0).predict(X_N[~seen_N])[0]
    error, alone = (float(np.sqrt(np.mean((guess_M - truth_M) ** 2))) for guess_M in (together_M, alone_M))
    assert error < 0.5 * alone


def test_one_curve_is_penalised_logistic_regression() -> None:
    """oracle: with one curve and one task, scipy's minimum of the weighted log loss and the pull on the slope."""
    task = planted(0.4, noise=0.03)
    y_N, weight = np.asarray(task.y), TASK_WEIGHT / X_N.size

    def loss(values: np.ndarray) -> float:
        p_N = np.clip(sigmoid(values[1] * (X_N - values[0])), 1e-12, 1 - 1e-12)
        log_loss = -(y_N * np.log(p_N) + (1 - y_N) * np.log(1 - p_N)).sum()
        return float(weight * log_loss + SLOPE_PRIOR / 2 * (values[1] - TYPICAL_SLOPE) ** 2)

    best = minimize(loss, [22.0, 1.5], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    mixture = fit_mixture([task], num_curves=1)
    # Eighty damped steps end this near the minimum.
    np.testing.assert_allclose([mixture.midpoint_K[0], mixture.slope_K[0]], best.x, atol=1e-3)


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=8), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, math.nan]),
)
def test_shares_sum_to_one_and_curves_rise(scores: list[list[float]], num_curves: int, chance: float) -> None:
    """property: any scores; a curve lies between its floor and 1 and never falls."""
    tasks = [TaskPoints(np.linspace(20, 23, len(y)), y, chance) for y in scores]
    mixture = fit_mixture(tasks, num_curves=num_curves)
    np.testing.assert_allclose(mixture.share_TK.sum(1), 1, atol=1e-12)  # a sum of up to four
    for task in range(len(tasks)):
        curve_M = mixture.predict(task, np.linspace(10, 40, 20))
        assert (np.diff(curve_M) >= -1e-12).all()  # rounding
        assert curve_M.min() >= mixture.floor_T[task] - 1e-12
        assert curve_M.max() <= 1 + 1e-12


def test_a_second_task_with_more_runs_does_not_own_the_curve() -> None:
    """property: a task's runs given four times over change nothing."""
    first, second = planted(0.2), planted(0.8)
    often = TaskPoints(np.tile(X_N, 4), np.tile(np.asarray(second.y), 4), 0.0)
    once, four = fit_mixture([first, second]), fit_mixture([first, often])
    np.testing.assert_allclose(once.midpoint_K, four.midpoint_K, atol=1e-6)  # sums in another order, over 80 steps


@pytest.mark.parametrize(
    ("tasks", "num_curves", "said"),
    [
        ([], 3, "at least one task"),
        ([planted(0.5)], 0, "and one curve"),
        ([TaskPoints([20.0], [0.1, 0.2])], 2, "task 0: give one y for each x"),
        ([TaskPoints([], [])], 2, "at least one run"),
        ([planted(0.5), TaskPoints([20.0], [1.5])], 2, "task 1: x must be finite, and y a share"),
    ],
)
def test_bad_input_is_refused(tasks: list[TaskPoints], num_curves: int, said: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=said):
        fit_mixture(tasks, num_curves=num_curves)
