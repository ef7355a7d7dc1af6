"""The failing rate of a size never trained: planted laws, both ways to it, coverage, and when it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.forecast.failing import (
    crossing,
    direct_fit,
    forecast_failing,
    kappa_fit,
    left_out_error,
    miss,
    next_rate,
    predict_failing,
)
from aftershock.forecast.family import Family, find_family
from aftershock.forecast.fits import interval_of, predict_draws
from aftershock.forecast.observations import Curve, Observations, Reading
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size

Plant = Callable[..., Observations]
CENTER = 4.3


def family_of(found: Observations) -> Family:
    return find_family([(run.width, run.depth) for run in found.runs])


def truth(size: str, *, level: float = -0.9, slope: float = -0.3) -> float:
    return level + slope * (math.log10(parse_size(size).num_block_params) - CENTER)


@pytest.mark.parametrize("size", ["96x2", "192x2"])
def test_a_planted_law_is_foretold_4_and_16_times_beyond(plant: Plant, size: str) -> None:
    """planted: within one step of the ladder, inside the interval."""
    found = plant(sigma=0.1)
    forecast = forecast_failing(found, family_of(found), parse_size(size))
    assert forecast.rate is not None
    assert forecast.refused == ""
    assert abs(math.log10(forecast.rate.value) - truth(size)) < 0.5
    assert forecast.rate.low < 10 ** truth(size) < forecast.rate.high
    assert forecast.ladder_rate == next_rate(PAPER_LRS, forecast.rate.value)


@pytest.mark.parametrize(
    ("sizes", "target"),
    [
        (("32x2", "32x4", "32x8"), "32x32"),
        (("16x1", "32x2", "64x4"), "128x8"),
        (("32x2", "32x8", "64x2", "64x8"), "128x16"),
    ],
)
def test_depth_joint_and_both_families(plant: Plant, sizes: tuple[str, ...], target: str) -> None:
    """planted: one law of N, seen along depth, along both together, and along each on its own."""
    found = plant(sizes=sizes, sigma=0.1)
    family = family_of(found)
    family.check(parse_size(target))
    forecast = forecast_failing(found, family, parse_size(target))
    assert forecast.rate is not None
    assert abs(math.log10(forecast.rate.value) - truth(target)) < 0.5
    assert forecast.rate.low < 10 ** truth(target) < forecast.rate.high


def test_intervals_of_the_direct_way_cover() -> None:
    """planted: 100 laws with slopes from 0 to -0.6; the 90 % interval at 4 times N holds a new seed in 80 to 97, and
    the estimate lies within one step of the ladder of the law in at least 85."""
    rungs = np.log10(PAPER_LRS)
    family = find_family([(16, 2), (32, 2), (48, 2)])
    inside, near = [], []
    for draw in range(100):
        generator = np.random.default_rng(draw)
        slope, sigma = generator.uniform(-0.6, 0.0), generator.uniform(0.15, 0.35)
        curves = []
        for size in ("16x2", "32x2", "48x2"):
            for seed in range(3):
                starts = truth(size, slope=slope) + sigma * generator.standard_normal()
                i = int(np.searchsorted(rungs, starts))
                bracket = Reading(float(rungs[i - 1]), float(rungs[i]) if i < len(rungs) else math.inf)
                width = parse_size(size).width
                curves.append(Curve(size, width, 2, parse_size(size).num_block_params, seed, bracket))
        fit = direct_fit(curves, family, seed=draw).fit
        draws = predict_draws(fit, family.features([(96, 2)])[0])
        bounds = interval_of(float(np.median(draws)), draws)
        new = truth("96x2", slope=slope) + sigma * generator.standard_normal()
        inside.append(bounds.low <= new <= bounds.high)
        near.append(abs(bounds.value - truth("96x2", slope=slope)) <= 0.5)
    assert 0.8 <= np.mean(inside) <= 0.97
    assert np.mean(near) >= 0.85


def test_curves_that_never_fail_are_bounds_and_not_missing(plant: Plant) -> None:
    """planted: half of the small curves fail above the ladder; without them small models would look weaker."""
    found = plant(level=-0.75, slope=-0.5, sigma=0.15, seeds=tuple(range(8)))
    curves = found.curves
    assert sum(math.isinf(curve.bracket.high) for curve in curves if curve.size == "16x2") >= 3
    family = family_of(found)
    closed = [curve for curve in curves if math.isfinite(curve.bracket.high)]
    small = family.features([(16, 2)])[0]
    with_bounds, without = (float(direct_fit(each, family).fit.coef_C @ small) for each in (curves, closed))
    planted = truth("16x2", level=-0.75, slope=-0.5)
    assert abs(with_bounds - planted) < 0.15
    assert without < with_bounds - 0.03


def test_the_logit_way_finds_kappa_and_the_rate(plant: Plant) -> None:
    """planted: the early logit is 10 where runs fail, whatever the size."""
    found = plant(sigma=0.02, noise=0.02)
    fit = kappa_fit(found.runs, "early_logit")
    assert fit is not None
    assert float(fit.coef_C[0]) == pytest.approx(1.0, abs=0.15)  # a rung is 0.4 decades of logit
    draws = predict_failing(found, family_of(found), parse_size("96x2"), "logit")
    assert float(np.median(draws)) == pytest.approx(truth("96x2"), abs=0.25)


def test_the_way_with_the_lower_error_is_used(plant: Plant) -> None:
    """property: with an early logit that tells nothing, the direct way; the errors of both are given."""
    found = plant()
    noise = np.random.default_rng(0).normal(0, 1, len(found.runs))
    runs = [
        run._replace(readings={**run.readings, "early_logit": Reading(value, value)})
        for run, value in zip(found.runs, noise.tolist(), strict=True)
    ]
    found = found._replace(runs=tuple(runs))
    forecast = forecast_failing(found, family_of(found), parse_size("64x2"))
    assert forecast.method == "direct"
    assert forecast.errors["direct"] == left_out_error(found, "direct")
    assert forecast.errors.get("logit", math.inf) >= forecast.errors["direct"]


def test_crossing_equals_a_loop() -> None:
    """oracle: one column at a time, walking down from the highest rate; and beyond both ends."""
    log_lr = np.array([-2.0, -1.5, -1.0, -0.5])
    draws = np.array(
        [[0.0, 0.2, 0.9, 2.0], [0.0, 0.1, 0.2, 0.3], [3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 1.0, 2.0], [2, 2, 2, 2.0]]
    ).T
    level = np.array([0.5, 0.5, 1.0, 0.5, 3.0])
    expected = []
    for y, at in zip(draws.T, level, strict=True):
        right = 3
        while right > 1 and y[right - 1] >= at:
            right -= 1
        slope = (y[right] - y[right - 1]) / 0.5
        expected.append(log_lr[right - 1] + (at - y[right - 1]) / slope if slope > 0 else math.inf)
    assert crossing(log_lr, draws, level) == pytest.approx(expected)
    assert crossing(log_lr, draws[:, -1:], np.array([1.0]))[0] == -math.inf  # above its level everywhere, and flat


def test_miss_knows_open_brackets() -> None:
    """contract."""
    curve = Curve("16x2", 16, 2, 6144, 0, Reading(-1.0, -0.5))
    assert miss(curve, -0.5) == pytest.approx(0.25)
    above = curve._replace(bracket=Reading(-0.5, math.inf))
    assert miss(above, 0.3) == 0
    assert miss(above, -0.8) == pytest.approx(0.3)
    assert miss(curve._replace(bracket=Reading(-math.inf, -1.0)), -0.9) == pytest.approx(0.1)


def test_the_ladder_goes_on_beyond_its_ends() -> None:
    """contract."""
    assert next_rate((0.01, 0.1), 0.02) == 0.1
    assert next_rate((0.01, 0.1), 0.1) == 0.1
    assert next_rate((0.01, 0.1), 5.0) == pytest.approx(10.0)
    assert next_rate((0.01, 0.1), 0.0005) == pytest.approx(0.001)


def test_no_failing_run_is_refused_with_what_to_add(plant: Plant) -> None:
    """contract."""
    found = plant(level=2.0)
    forecast = forecast_failing(found, family_of(found), parse_size("64x2"))
    assert forecast.rate is None
    assert "no run fails up to rate 0.3" in forecast.refused
    assert "add higher rates" in forecast.refused


def test_nothing_that_trains_is_refused_with_what_to_add(plant: Plant) -> None:
    """contract."""
    found = plant(level=-9.0, dies=-1.0)
    forecast = forecast_failing(found, family_of(found), parse_size("64x2"))
    assert "every run diverged down to rate 0.0003" in forecast.refused


def test_a_wide_interval_and_a_missed_size_are_refused(plant: Plant) -> None:
    """contract: seeds that scatter over two decades; a largest size that fails a hundred times earlier."""
    scattered = plant(sigma=1.0, level=-1.7, sizes=("16x2", "32x2"))
    wide = forecast_failing(scattered, family_of(scattered), parse_size("64x2"))
    assert wide.rate is None
    assert "would lie anywhere from" in wide.refused
    small, large = plant(level=-0.8, sigma=0.05), plant(level=-2.8, sigma=0.05)
    mixed = small._replace(runs=small.without("48x2").runs + large.only("48x2").runs)
    missed = forecast_failing(mixed, family_of(mixed), parse_size("64x2"))
    assert "miss the failing rate of 48x2" in missed.refused


def test_two_sizes_have_a_forecast_and_no_error(plant: Plant) -> None:
    """contract."""
    found = plant(sizes=("16x2", "32x2"))
    forecast = forecast_failing(found, family_of(found), parse_size("48x2"))
    assert forecast.rate is not None
    assert forecast.errors == {}
    assert forecast.largest_error is None
