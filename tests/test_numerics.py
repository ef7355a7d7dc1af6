"""numerics: each statistic against a slow scalar oracle, and its behaviour on what is not finite."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aftershock import numerics

VALUES = st.floats(-1e6, 1e6)
SERIES = st.lists(VALUES, min_size=1, max_size=40)
WILD_SERIES = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=40)


@given(SERIES)
def test_rms_oracle(values: list[float]) -> None:
    """oracle: math.fsum of squares. 1e-12: float64 round-off of 40 terms; a mean over N-1 would miss by 1e-2."""
    # Below 1e-150 the oracle's own squares underflow; there the scaled form is the better one.
    expected = math.sqrt(math.fsum(v * v for v in values) / len(values))
    assert float(numerics.rms(values)) == pytest.approx(expected, rel=1e-12, abs=1e-150)


@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-100, 100, width=32)))
def test_rms_over_axes_is_rms_of_each_slice_oracle(x: np.ndarray) -> None:
    """oracle: one slice at a time. 1e-14: the two scale by different maxima, so only the last bits differ."""
    slices = [float(numerics.rms(x[:, j])) for j in range(4)]
    np.testing.assert_allclose(numerics.rms(x, axis=(0, 2)), slices, rtol=1e-14, atol=1e-150)


@pytest.mark.parametrize("size", [1e-200, 1e-8, 1.0, 1e200])
def test_rms_survives_extremes(size: float) -> None:
    """planted: a naive square underflows at 1e-200 and overflows at 1e200."""
    assert float(numerics.rms(np.full(7, size))) == pytest.approx(size, rel=1e-15)


def test_rms_of_zeros_and_of_what_is_not_finite() -> None:
    assert float(numerics.rms(np.zeros(3))) == 0.0
    assert math.isnan(float(numerics.rms([1.0, math.nan])))
    assert float(numerics.rms([1.0, -math.inf])) == math.inf
    np.testing.assert_array_equal(numerics.rms([[1.0, math.nan], [2.0, 2.0]], axis=1), [math.nan, 2.0])


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((3, 0), 1)])
def test_rms_of_nothing_is_an_error(shape: tuple[int, ...], axis: int | None) -> None:
    with pytest.raises(ValueError, match="empty"):
        numerics.rms(np.zeros(shape), axis=axis)


@given(SERIES)
def test_median_mad_oracle(values: list[float]) -> None:
    """oracle: the statistics module. 1e-12: one scaling in float64; an unscaled MAD would miss by a third."""
    median = statistics.median(values)
    found = numerics.median_mad(values)
    assert found.median == pytest.approx(median, rel=1e-12)
    assert found.mad == pytest.approx(1.482602218505602 * statistics.median(abs(v - median) for v in values), rel=1e-12)


def test_mad_estimates_sigma_and_ignores_spikes() -> None:
    """planted: a tenth of the sample is wild; 5 %: the standard error of a MAD from 10,000 draws is 1.2 %."""
    rng = np.random.default_rng(0)
    sample = rng.normal(2.0, 3.0, 10_000)
    assert numerics.median_mad(sample).mad == pytest.approx(3.0, rel=0.05)
    sample[:1000] = 1e9
    assert numerics.median_mad(sample).mad < 4.0


def test_mad_constant_comes_from_the_normal_distribution() -> None:
    """oracle: the standard library's inverse normal; 1e-12: both are float64."""
    assert pytest.approx(1 / statistics.NormalDist().inv_cdf(0.75), rel=1e-12) == numerics.MAD_TO_SIGMA


@pytest.mark.parametrize(("values", "says"), [([], "empty"), ([1.0, math.nan, math.inf], "2 non-finite of 3")])
def test_median_mad_refuses_what_has_no_median(values: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        numerics.median_mad(values)


def test_finite_mask() -> None:
    np.testing.assert_array_equal(
        numerics.finite_mask([1.0, math.nan, math.inf, -math.inf]), [True, False, False, False]
    )
    np.testing.assert_array_equal(numerics.finite_mask([[1.0], [math.nan]], [1.0, 2.0]), [[True, True], [False, False]])
    with pytest.raises(ValueError, match="one shape"):
        numerics.finite_mask([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least one"):
        numerics.finite_mask()


@given(WILD_SERIES, st.floats(0.0, 0.99))
def test_ema_oracle(values: list[float], decay: float) -> None:
    """oracle: the weighted mean written out, over the finite values. 1e-9: 40 float64 steps at decay 0.99, where the
    first weights are 1e-2 and cancel to about 1e-14 each; a biased average would miss by decay^t."""
    got = numerics.ema(values, decay=decay)
    for t in range(len(values)):
        kept = [v for v in values[: t + 1] if math.isfinite(v)]
        weights = [decay ** (len(kept) - 1 - i) for i in range(len(kept))]
        if not kept:
            assert math.isnan(got[t])
            continue
        expected = math.fsum(w * v for w, v in zip(weights, kept, strict=True)) / math.fsum(weights)
        assert got[t] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_ema_of_a_constant_is_that_constant() -> None:
    """planted: without debiasing the first value would be 0.01. 1e-13: a hundred float64 updates."""
    np.testing.assert_allclose(numerics.ema(np.full((100, 2), 7.0), decay=0.99), 7.0, rtol=1e-13)


def test_ema_in_the_middle_round_trip() -> None:
    """round trip: stopping after any value and going on gives the same bits, and a NaN disturbs only its own column."""
    x_NS = np.random.default_rng(0).normal(size=(20, 3))
    x_NS[5, 1] = math.nan
    whole, state = numerics.ema(x_NS, decay=0.9), numerics.ema_start((3,))
    for step in range(20):
        before = (state.moment.copy(), state.weight.copy())
        new = numerics.ema_update(state, x_NS[step], decay=0.9)
        np.testing.assert_array_equal(state.moment, before[0])
        np.testing.assert_array_equal(state.weight, before[1])
        state = numerics.EmaState(*(np.array(part.tolist()) for part in new))
        np.testing.assert_array_equal(numerics.ema_value(state), whole[step])
    np.testing.assert_array_equal(numerics.ema(x_NS[:, 0], decay=0.9), whole[:, 0])


def test_ema_errors() -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="decay"):
            numerics.ema([1.0], decay=decay)
    with pytest.raises(ValueError, match="single number"):
        numerics.ema(1.0, decay=0.5)
    with pytest.raises(ValueError, match="shape"):
        numerics.ema_update(numerics.ema_start((2,)), [1.0, 2.0, 3.0], decay=0.5)
    assert numerics.ema([], decay=0.5).shape == (0,)
