"""The grid of runs, seed bootstrap and slope."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.claims.claim import RunResult
from aftershock.claims.grid import Grid, bootstrap, slope
from aftershock.forecast.sensitivity import LossRow, sensitivity_table

Plant = Callable[..., list[RunResult]]


def curve(size: str, arm: str, lr: float, seed: int) -> float | None:
    return None if lr > 0.2 and seed == 1 else 2.3 + 0.2 * (seed + 1) * math.log10(lr / 1e-2) ** 2


def test_oracle_sensitivity_is_the_table_s(plant: Plant) -> None:
    """The same curve through `forecast`: seeds averaged after the cap. Rounding only."""
    runs = plant("P2", curve)
    grid = Grid(runs)
    rows = [LossRow(r.size, r.lr, r.final_loss) for r in runs if r.arm == "baseline"]
    for entry in sensitivity_table(rows, 6.4):
        assert grid.sensitivity(entry.group, "baseline", grid.everyone) == pytest.approx(
            entry.lr_sensitivity, rel=1e-12
        )


def test_sizes_ascend_whatever_the_order(plant: Plant) -> None:
    runs = plant("P9", curve)
    grid = Grid(runs[::-1])
    assert grid.sizes[0] == "32x2"
    assert (np.diff(grid.log_n) >= 0).all()
    assert list(grid.lrs) == sorted(grid.lrs)


def test_a_hole_in_the_grid_is_an_error(plant: Plant) -> None:
    runs = plant("P2", curve)
    with pytest.raises(ValueError, match=r"no run of size 96x2, arm no_qk_norm, lr 0.3, seed 2"):
        Grid(runs[:-1])
    with pytest.raises(ValueError, match="twice"):
        Grid([*runs, runs[0]])
    with pytest.raises(ValueError, match="got none"):
        Grid([])


def test_a_seed_that_never_trained_is_an_error(plant: Plant) -> None:
    runs = [dataclasses.replace(r, final_loss=None) if r.seed == 2 else r for r in plant("P2", curve)]
    with pytest.raises(ValueError, match=r"no run of size 16x2, arm baseline, seed 2 trained"):
        Grid(runs).sensitivity("16x2", "baseline", np.array([0]))


def test_planted_best_rate_between_the_rates(plant: Plant) -> None:
    """A parabola in log rate comes back exactly; at the ladder's end, the end."""
    grid = Grid(plant("P2", lambda size, arm, lr, seed: 2.3 + 0.1 * (math.log10(lr) + 1.8) ** 2))
    assert grid.best_point("16x2", "baseline", grid.everyone) == pytest.approx((-1.8, 2.3), abs=1e-9)
    falling = Grid(plant("P2", lambda size, arm, lr, seed: 3 - math.log10(lr) / 10))
    end = math.log10(0.3)
    assert falling.best_point("16x2", "baseline", falling.everyone) == pytest.approx((end, 3 - end / 10), abs=1e-12)


def test_oracle_bootstrap_of_three_seeds() -> None:
    """All 27 draws, one by one."""
    values = np.array([1.0, 2.0, 6.0])
    draws = [values[list(draw)].mean() for draw in itertools.product(range(3), repeat=3)]
    measured = bootstrap(lambda draw_D: float(values[draw_D].mean()), 3)
    assert measured.value == 3.0
    assert measured.bounds == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), rel=1e-12)


def test_bootstrap_of_many_seeds_repeats_itself() -> None:
    values = np.arange(8.0)
    first, again = (bootstrap(lambda draw_D: float(values[draw_D].mean()), 8) for _ in range(2))
    assert first == again
    assert 1 < first.low < 3.5 < first.high < 6  # standard error 0.81


def test_bootstrap_leaves_out_what_was_not_measured() -> None:
    nothing = bootstrap(lambda draw_D: math.nan, 3)
    assert all(map(math.isnan, nothing))
    some = bootstrap(lambda draw_D: math.nan if 0 in draw_D else 1.0, 3)
    assert some.bounds == (1.0, 1.0)


def test_oracle_slope() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 0.5])
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-12)
    assert slope([1.0, 2.0, 3.0], [1.0, math.nan, 5.0]) == 2.0
    assert math.isnan(slope([1.0, 1.0], [1.0, 2.0]))
