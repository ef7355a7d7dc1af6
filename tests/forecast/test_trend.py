"""LR sensitivity over size: the planted trend, the range rule, and the conditions under which it means something."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest

from aftershock.forecast.family import find_family
from aftershock.forecast.observations import Observations
from aftershock.forecast.trend import Trend, sensitivity_trend, windows_of
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size

Plant = Callable[..., Observations]


def with_losses(found: Observations, loss: Callable[[float, float, int], float | None]) -> Observations:
    """The same runs with final losses as a function of n - 4.3, log10 rate, and seed."""
    runs = [
        run._replace(final_loss=loss(math.log10(run.num_params) - 4.3, math.log10(run.lr), run.seed))
        for run in found.runs
    ]
    return found._replace(runs=tuple(runs))


def trend_of(found: Observations, baseline: Observations | None = None, *, to: str = "96x2") -> Trend:
    family = find_family([(run.width, run.depth) for run in found.runs])
    return sensitivity_trend(found, family, parse_size(to), baseline=baseline)


def bowl(n: float, r: float, seed: int) -> float:
    """A parabola around rate 0.01 whose depth is 10^(0.5 n): its sensitivity grows by half a decade a decade."""
    return 3.0 - 0.1 * n + 0.1 * 10 ** (0.5 * n) * (1 + 0.02 * seed) * (r + 2) ** 2


def test_a_planted_trend_is_found(plant: Plant) -> None:
    """planted: slope 0.5 decades a decade, and the sensitivity of the target by the definition itself."""
    trend = trend_of(with_losses(plant(), bowl))
    assert trend.slope is not None
    assert trend.slope.value == pytest.approx(0.5, abs=0.02)
    assert trend.slope.low < 0.5 < trend.slope.high
    n = math.log10(parse_size("96x2").num_block_params) - 4.3
    losses = [bowl(n, math.log10(lr), 1) for lr in PAPER_LRS]
    assert trend.at_target is not None
    assert trend.at_target.value == pytest.approx(sum(losses) / 7 - min(losses), rel=0.05)
    assert trend.at_target.low < sum(losses) / 7 - min(losses) < trend.at_target.high
    assert trend.best_loss is None
    assert [entry.best_lr for entry in trend.sizes] == [0.01] * 3
    assert [check.holds for check in trend.checks] == [None, True, True]


def test_diverged_runs_count_as_l0(plant: Plant) -> None:
    """equivalence: None at the highest rate is a loss of l0 there."""
    died = with_losses(plant(), lambda n, r, seed: None if r > -0.6 else bowl(n, r, seed))
    capped = with_losses(plant(), lambda n, r, seed: 6.4 if r > -0.6 else bowl(n, r, seed))
    assert trend_of(died).sizes == trend_of(capped).sizes


def test_the_range_slides_with_the_best_rate(plant: Plant) -> None:
    """planted: the best rate falls by half a decade; with one more rate below, the range follows, without it cannot."""

    def moving(n: float, r: float, seed: int) -> float:
        best = -2.0 if n < 0.0 else -2.5
        return 3.0 + 0.1 * (r - best) ** 2

    longer = with_losses(plant(rates=(1e-4, *PAPER_LRS)), moving)
    trend = trend_of(longer)
    assert [entry.window for entry in trend.sizes] == [(3e-4, 3e-1), (1e-4, 1e-1), (1e-4, 1e-1)]
    sensitivities = [entry.lr_sensitivity for entry in trend.sizes]
    assert sensitivities == pytest.approx([sensitivities[0]] * 3, rel=0.02)  # rungs are 1, 3, 10: not quite even
    assert trend.checks[1].holds
    shorter = trend_of(with_losses(plant(), moving)).checks[1]
    assert shorter.holds is False
    assert "add a rate below and above" in shorter.words


@pytest.mark.parametrize(
    ("rates", "windows"),
    [
        (PAPER_LRS, [(3e-4, 3e-1)]),
        ((1e-4, *PAPER_LRS), [(1e-4, 1e-1), (3e-4, 3e-1)]),
        ((1e-3, 1e-2, 1e-1), [(1e-3, 1e-1)]),
    ],
)
def test_windows(rates: Sequence[float], windows: list[tuple[float, float]]) -> None:
    """contract."""
    assert windows_of(rates) == windows


def test_a_short_ladder_is_no_range(plant: Plant) -> None:
    """contract."""
    trend = trend_of(with_losses(plant(rates=(1e-3, 1e-2, 1e-1)), bowl))
    assert trend.checks[1].holds is False
    assert "spans 2 decades" in trend.checks[1].words


def test_a_rate_that_means_something_else_is_said_so(plant: Plant) -> None:
    """contract: by its setting, or by curves that differ where both arms are stable."""
    found = with_losses(plant(), lambda n, r, seed: bowl(n, r, seed) + 0.001 * seed)
    scaled = found._replace(
        config=dataclasses.replace(
            found.config, optim=dataclasses.replace(found.config.optim, lr_scale="parameter_rms")
        )
    )
    assert trend_of(scaled).checks[0].holds is False
    assert trend_of(found, found).checks[0].holds is True
    other = with_losses(found, lambda n, r, seed: bowl(n, r, seed) + 0.001 * seed + 0.5)
    apart = trend_of(found, other).checks[0]
    assert apart.holds is False
    assert "seed deviations" in apart.words


def test_a_loss_that_does_not_fall_is_said_so(plant: Plant) -> None:
    """contract: the metric ignores the level."""
    trend = trend_of(with_losses(plant(), lambda n, r, seed: 3.0 + n + 0.1 * (r + 2) ** 2))
    assert trend.checks[2].holds is False


def test_the_best_loss_follows_a_power_law_with_a_floor(plant: Plant) -> None:
    """planted: 1.5 + 40 N^-0.4 at four sizes."""

    def loss(n: float, r: float, seed: int) -> float:
        return 1.5 + 40 * (10 ** (n + 4.3)) ** -0.4 + 0.1 * (r + 2) ** 2 + 0.002 * math.sin(5 * seed + 9 * n)

    found = with_losses(plant(sizes=("16x2", "32x2", "64x2", "96x2")), loss)
    trend = trend_of(found, to="192x2")
    assert trend.best_loss is not None
    planted = 1.5 + 40 * parse_size("192x2").num_block_params ** -0.4
    assert trend.best_loss.value == pytest.approx(planted, abs=0.03)  # 0.002 of noise, extrapolated by 0.6 decades
    assert trend.best_loss.low < trend.best_loss.value < trend.best_loss.high


def test_only_the_rates_that_all_sizes_share_count(plant: Plant) -> None:
    """equivalence: rates that one size has beside the common ones change no sensitivity."""
    found = with_losses(plant(), bowl)
    extra = with_losses(plant(sizes=("32x2",), rates=(2e-2, 6e-2)), bowl)
    both = trend_of(found._replace(runs=found.runs + extra.runs))
    assert both.sizes == trend_of(found).sizes


def test_ladders_that_share_too_little_have_no_trend(plant: Plant) -> None:
    """contract: said in a check, not raised, since the rest of a forecast can stand."""
    found = plant()
    runs = [run for run in found.runs if run.size == "16x2" or run.lr > 0.05]
    trend = trend_of(found._replace(runs=tuple(runs)))
    assert trend.sizes == ()
    assert trend.at_target is None
    assert trend.checks[0].holds is False
    assert "the 2 rates that all sizes share; finish the sweep" in trend.checks[0].words
