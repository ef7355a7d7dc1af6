"""Signals against size and rate: planted laws are found in both forms, and what lies outside is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.forecast.family import find_family
from aftershock.forecast.observations import Observations, Reading
from aftershock.forecast.surfaces import choose_mode, estimate, fit_surface

Plant = Callable[..., Observations]
WIDTHS = [(16.0, 2.0), (32.0, 2.0), (48.0, 2.0)]


def with_law(found: Observations, law: Callable[[float, float], float], *, sigma: float = 0.05) -> Observations:
    """The same runs with log10 of the end logit as a law of n - 4.3 and log10 rate, plus noise."""
    generator = np.random.default_rng(7)
    runs = []
    for run in found.runs:
        y = law(math.log10(run.num_params) - 4.3, math.log10(run.lr)) + sigma * float(generator.standard_normal())
        runs.append(run._replace(readings={**run.readings, "logit": Reading(y, y)}))
    return found._replace(runs=tuple(runs))


def quadratic(n: float, r: float) -> float:
    return 2.0 + 0.5 * n + 0.05 * n**2 + 0.9 * r + 0.1 * r**2 + 0.2 * n * r


def kinked(n: float, r: float) -> float:
    """No quadratic over the rates, but one at each."""
    return 0.6 + max(0.0, 2.0 * (r + 1.5) + 0.5 * n)


@pytest.mark.parametrize(("law", "mode"), [(quadratic, "joint"), (kinked, "per rate")])
def test_a_planted_law_is_found_four_times_beyond(
    plant: Plant, law: Callable[[float, float], float], mode: str
) -> None:
    """planted: the form that suits the law is chosen, and its interval at 96x2 holds the truth at every rate."""
    found = with_law(plant(), law)
    surface = fit_surface(found, find_family(WIDTHS), "logit")
    assert surface.mode == mode
    assert surface.holds
    for lr in found.rates:
        at = surface.at((96, 2), lr)
        truth = law(math.log10(12 * 2 * 96**2) - 4.3, math.log10(lr))
        assert math.log10(at.interval.low) < truth < math.log10(at.interval.high)
        assert at.value == pytest.approx(truth, abs=0.25)  # half of what extrapolation over 0.6 decades is unsure of


def test_between_two_rates_the_forms_interpolate(plant: Plant) -> None:
    """property: alone, a rate between two others lies on the line between them; outside the ladder none is given."""
    found = with_law(plant(), kinked)
    surface = fit_surface(found, find_family(WIDTHS), "logit")
    low, high = surface.at((64, 2), 0.03), surface.at((64, 2), 0.1)
    middle = surface.at((64, 2), math.sqrt(0.003))
    assert middle.value == pytest.approx((low.value + high.value) / 2)
    assert surface.at((64, 2), 0.1).value == high.value
    for lr in (1e-4, 0.5):
        with pytest.raises(ValueError, match="outside the rates trained, 0.0003 to 0.3"):
            surface.at((64, 2), lr)


def test_the_quick_estimate_is_that_of_the_fit(plant: Plant) -> None:
    """equivalence: `estimate` and the whole fit, in both forms."""
    for law in (quadratic, kinked):
        found = with_law(plant(), law)
        family = find_family(WIDTHS)
        surface = fit_surface(found, family, "logit")
        at = [((96.0, 2.0), lr) for lr in (0.01, 0.3)]
        quick = estimate(found.runs, "logit", family, surface.mode, at)
        assert quick == pytest.approx([surface.at(*point).value for point in at], abs=1e-5)  # EM's tolerance


def test_runs_that_died_pull_a_fit_up(plant: Plant) -> None:
    """planted: of runs above 0.05 at 48x2 only a bound is known; without them the fit would come out lower."""
    found = with_law(plant(), quadratic)
    hidden, without = [], []
    for run in found.runs:
        value = run.readings["logit"].low
        died = run.size == "48x2" and run.lr > 0.05
        hidden.append(
            run._replace(readings={"logit": Reading(value - 0.02, math.inf) if died else run.readings["logit"]})
        )
        without += [] if died else [hidden[-1]]
    family, at = find_family(WIDTHS), [((48.0, 2.0), 0.3)]
    bounded, dropped = (estimate(runs, "logit", family, "joint", at)[0] for runs in (hidden, without))
    assert bounded > dropped
    truth = quadratic(math.log10(12 * 2 * 48**2) - 4.3, math.log10(0.3))
    assert abs(bounded - truth) < 0.3


def test_a_largest_size_that_breaks_the_trend_stops_extrapolation(plant: Plant) -> None:
    """planted: 48x2 lies two decades above what the others say."""
    found = with_law(plant(), lambda n, r: quadratic(n, r) + (2.0 if n > 0.3 else 0.0))
    surface = fit_surface(found, find_family(WIDTHS), "logit")
    assert surface.covered < 0.2
    assert not surface.holds


def test_few_runs_a_rate_are_fitted_jointly(plant: Plant) -> None:
    """contract: one seed leaves three runs a rate."""
    found = plant(seeds=(0,), sizes=("16x2", "32x2", "48x2"))
    mode, errors = choose_mode(found.runs, "logit", find_family(WIDTHS))
    assert mode == "joint"
    assert list(errors) == ["joint"]


def test_a_signal_of_one_size_is_refused(plant: Plant) -> None:
    """contract."""
    found = plant()
    runs = [run if run.size == "16x2" else run._replace(readings={}) for run in found.runs]
    with pytest.raises(ValueError, match="fewer than two sizes recorded logit"):
        fit_surface(found._replace(runs=tuple(runs)), find_family(WIDTHS), "logit")
