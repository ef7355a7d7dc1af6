"""A forecast against runs of its size: rungs, brackets, intervals; and that the fits never see those runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from aftershock.forecast.check import check_failing, check_quantity, mean_rungs, rungs_between
from aftershock.forecast.failing import FailingRate
from aftershock.forecast.fits import Interval
from aftershock.forecast.observations import Observations
from aftershock.forecast.outlook import forecast, forecast_study, set_apart
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size

Plant = Callable[..., Observations]


def failing(rate: float, low: float, high: float, ladder_rate: float) -> FailingRate:
    return FailingRate(Interval(rate, low, high), "direct", ladder_rate, {}, None, None, "")


def test_rungs_are_those_of_the_ladder_and_go_on_beyond_it() -> None:
    """oracle: the ladder's steps counted by hand; they are not equal in decades."""
    assert [rungs_between(PAPER_LRS[0], lr, PAPER_LRS) for lr in PAPER_LRS] == pytest.approx(range(len(PAPER_LRS)))
    assert rungs_between(PAPER_LRS[-1], PAPER_LRS[-1] ** 2 / PAPER_LRS[-2], PAPER_LRS) == pytest.approx(1.0)
    assert rungs_between(PAPER_LRS[3], PAPER_LRS[1], PAPER_LRS) == pytest.approx(-2.0)


def test_a_forecast_two_rungs_high_is_found_so(plant: Plant) -> None:
    """planted: every seed fails from 0.03 on, and 0.3 was foretold: two rungs; the interval misses or meets."""
    later = plant(level=math.log10(0.02), slope=0.0, sigma=0.0, sizes=("96x2",))
    rows = check_failing(failing(0.2, 0.1, 0.4, 0.3), later, PAPER_LRS)
    assert [(row.seed, row.low, row.high, row.inside) for row in rows] == [
        (seed, pytest.approx(0.01), pytest.approx(0.03), False) for seed in (0, 1, 2)
    ]
    assert mean_rungs(rows) == pytest.approx(2.0)
    assert all(row.inside for row in check_failing(failing(0.2, 0.02, 0.4, 0.3), later, PAPER_LRS))


def test_a_size_that_never_fails_has_no_rungs(plant: Plant) -> None:
    """contract: an open bracket meets an interval that reaches beyond the ladder, and gives no number."""
    later = plant(level=2.0, slope=0.0, sigma=0.0, sizes=("96x2",))
    rows = check_failing(failing(0.9, 0.2, 4.0, 1.0), later, PAPER_LRS)
    assert all(row.inside and row.rungs is None and math.isinf(row.high) for row in rows)
    assert mean_rungs(rows) is None
    assert check_failing(FailingRate(None, None, None, {}, None, None, "why"), later, PAPER_LRS) == ()


def test_runs_within_their_intervals_are_counted(plant: Plant) -> None:
    """oracle: the plant's early logit without noise, in an interval about it and in one beside it."""
    later = plant(level=-1.0, slope=0.0, sigma=0.0, noise=0.0, sizes=("96x2",))
    values = {run.lr: 10 ** run.readings["early_logit"].low for run in later.runs}
    about = [(lr, Interval(value, 0.9 * value, 1.1 * value)) for lr, value in values.items()]
    beside = [(lr, Interval(value, 1.1 * value, 1.2 * value)) for lr, value in values.items()]
    assert check_quantity("early_logit", about, later)[1:] == (21, 21)
    assert check_quantity("early_logit", beside, later)[1:] == (0, 21)
    assert check_quantity("unheard", about, later)[1:] == (0, 0)


def test_runs_of_the_target_check_and_are_not_fitted(plant: Plant) -> None:
    """equivalence: with and without runs of the target the forecast is the same; only the check is new."""
    target = parse_size("96x2")
    alone = plant()
    mixed = alone._replace(runs=alone.runs + plant(sizes=("96x2",), draw=1).runs)
    others, later = set_apart(mixed, target)
    checked, plain = forecast(others, target, lr=0.01, later=later), forecast(alone, target, lr=0.01)
    assert checked._replace(check=None, checked_by=()) == plain
    assert (plain.check, plain.checked_by) == (None, ())
    assert checked.check is not None
    assert checked.check.num_runs == 21
    assert abs(checked.check.rungs or 0.0) <= 1
    assert "Trained since: the failing rate foretold is" in checked.check.words
    assert [one.size for one in checked.failing_by_size] == ["16x2", "32x2", "48x2", "96x2"]
    assert checked.failing_by_size[-1].rate == checked.failing.rate


def test_a_target_without_enough_other_sizes_is_refused(plant: Plant) -> None:
    """contract: what is left without the target must still be enough to fit."""
    with pytest.raises(ValueError, match="has one size, 16x2"):
        set_apart(plant(sizes=("16x2", "32x2")), parse_size("32x2"))


def test_a_study_on_disk_is_set_apart(write_study: Callable[..., Path]) -> None:
    """round trip: the same through the study's folder."""
    folder = write_study(sizes=("16x2", "32x2", "48x2"))
    outlook = forecast_study([folder], to="48x2", lr=0.01)
    assert outlook.sizes == ("16x2", "32x2")
    assert outlook.check is not None
    assert outlook.check.num_runs == 6
