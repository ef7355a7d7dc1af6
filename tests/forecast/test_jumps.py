"""forecast.jumps: planted jumps with and without a smooth companion, and curves that do not jump."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.forecast.curves import sigmoid
from aftershock.forecast.jumps import find_jump, never_falling

X_N = np.linspace(19.0, 24.0, 60)
NOTHING_N = np.full(X_N.size, np.nan)
PER_PART_N = sigmoid(1.2 * (X_N - 20.5))


def noise(scale: float, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=X_N.size)


@pytest.mark.parametrize("parts", [8, 20])
def test_all_parts_right_is_named_a_jump_of_the_metric(parts: int) -> None:
    """planted: accuracy p^L beside the smooth p; the number of parts comes back."""
    p_N = np.clip(PER_PART_N + noise(0.003), 0, 1)
    jump = find_jump(X_N, p_N**parts, p_N)
    assert jump is not None
    assert jump.metric_only
    assert jump.parts == pytest.approx(parts, rel=0.05)  # the grid's step is 1 %, and noise
    sentence = jump.sentence("p")
    assert "this jump may be in the metric only" in sentence
    assert f"as if of {jump.parts:.1f} parts" in sentence


def test_a_falling_companion_of_a_wide_range_counts_too() -> None:
    """planted: a perplexity from 1e6 down to 4, which only in logs is smooth."""
    jump = find_jump(X_N, PER_PART_N**12, 4 + 1e6 * 10 ** (-2.4 * (X_N - 19)))
    assert jump is not None
    assert jump.metric_only
    assert math.isnan(jump.parts)


@pytest.mark.parametrize(
    ("companion_N", "said"),
    [
        (NOTHING_N, "without a smooth companion nobody can say"),
        (sigmoid(6 * (X_N - 22.5)), "p does not improve steadily before either"),  # jumps itself
        (0.5 + noise(0.2, 3), "p does not improve steadily before either"),  # says nothing
    ],
)
def test_another_jump_is_not_named_so(companion_N: np.ndarray, said: str) -> None:
    """planted: no companion, one that jumps at the same place, one of noise."""
    jump = find_jump(X_N, sigmoid(6 * (X_N - 22.5)), companion_N)
    assert jump is not None
    assert not jump.metric_only
    assert jump.onset == pytest.approx(10**22.1, rel=0.3)  # a tenth of the way, to the next run
    assert said in jump.sentence("p")
    assert "the jump is not the metric's" in jump.sentence("", smooth=True)


@pytest.mark.parametrize(
    "y_N",
    [
        0.1 + 0.16 * (X_N - 19),  # a line
        sigmoid(0.9 * (X_N - 21.5)),  # rises over the whole range
        1 - 0.9 * 0.4 ** (X_N - 19),  # quickest at first
        0.25 + noise(0.02),  # chance
        sigmoid(6 * (X_N - 19.8)),  # jumps, but at once
        0.9 - 0.16 * (X_N - 19),  # falls
    ],
)
def test_what_does_not_jump(y_N: np.ndarray) -> None:
    """planted: the clean cases."""
    assert find_jump(X_N, np.clip(y_N, 0, 1), PER_PART_N) is None


def test_order_and_few_runs() -> None:
    """property: the order of rows says nothing; nine runs are too few, and so is one size."""
    order_N = np.random.default_rng(0).permutation(X_N.size)
    y_N = PER_PART_N**12
    assert find_jump(X_N[order_N], y_N[order_N], PER_PART_N[order_N]) == find_jump(X_N, y_N, PER_PART_N)
    assert find_jump(X_N[:9], y_N[:9], PER_PART_N[:9]) is None
    assert find_jump(np.full(X_N.size, 20.0), y_N, PER_PART_N) is None


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_the_never_falling_curve(values: list[float]) -> None:
    """property: it never falls, keeps the mean, and a sequence that does not fall is its own."""
    curve_N = never_falling(values)
    assert (np.diff(curve_N) >= 0).all()
    assert curve_N.mean() == pytest.approx(np.mean(values), abs=1e-9)  # sums in another order
    np.testing.assert_array_equal(never_falling(sorted(values)), sorted(values))


@pytest.mark.parametrize(
    ("x", "y", "said"), [([1.0, 2.0], [0.1], "one y and one companion for each x"), ([1.0], [np.nan], "must be finite")]
)
def test_bad_input_is_refused(x: list[float], y: list[float], said: str) -> None:
    """contract."""
    with pytest.raises(ValueError, match=said):
        find_jump(x, y, [0.0] * len(x))
