from __future__ import annotations

import numpy as np
import pytest

from aftershock.report.series import rounded, thin


def test_a_short_series_is_returned_as_it_is() -> None:
    """contract."""
    steps, values = np.arange(10), np.arange(10.0)
    thinned = thin(steps, values, 10)
    assert thinned.steps is steps
    assert thinned.values is values


@pytest.mark.parametrize("points", [4, 5, 60, 400])
def test_never_more_points_than_asked_and_ends_kept(points: int) -> None:
    """contract."""
    values = np.random.default_rng(0).standard_normal(3001)
    thinned = thin(np.arange(3001), values, points)
    assert len(thinned.steps) <= points
    assert (np.diff(thinned.steps) > 0).all()
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 3000)
    assert (thinned.values == values[thinned.steps]).all()


@pytest.mark.parametrize("at", [1, 777, 4998])
@pytest.mark.parametrize("height", [50.0, -50.0, np.inf, np.nan])
def test_a_one_step_spike_survives(at: int, height: float) -> None:
    """planted: up, down or not finite, anywhere."""
    values = np.sin(np.arange(5000) / 50)
    values[at] = height
    assert at in thin(np.arange(5000), values, 100).steps


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4, got 3"):
        thin(np.arange(9), np.arange(9.0), 3)


def test_rounded_is_json() -> None:
    assert rounded(1.23456789) == 1.2346
    assert rounded(float("nan")) is None
    assert rounded(float("-inf")) is None
