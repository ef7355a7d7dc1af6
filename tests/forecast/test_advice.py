"""Danger lines, eps against the gradient, and what is advised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from aftershock.forecast.advice import (
    LOG_Z_LINE,
    PAPER_LOGIT,
    Line,
    advise,
    eps_outlook,
    gradient_line,
    kept,
    logit_line,
)
from aftershock.forecast.failing import FailingRate
from aftershock.forecast.family import find_family
from aftershock.forecast.fits import Interval
from aftershock.forecast.observations import Observations
from aftershock.forecast.surfaces import fit_surface
from aftershock.lab.recipe import RunConfig

Plant = Callable[..., Observations]
NO_RATE = FailingRate(None, None, None, {}, None, None, "nothing fails")
WIDTHS = [(16.0, 2.0), (32.0, 2.0), (48.0, 2.0)]


def test_lines() -> None:
    """contract: learned from the study's own runs, else the paper's; eps takes a tenth at a gradient of 9 eps."""
    assert logit_line(None).value == PAPER_LOGIT
    assert logit_line(Interval(8.0, 7.0, 9.0)).value == 8.0
    line = gradient_line(1e-8)
    assert line.value == pytest.approx(9e-8)
    assert kept(line.value, 1e-8) == pytest.approx(0.9)


def test_where_the_gradient_meets_eps(plant: Plant) -> None:
    """planted: log10 g = -3 - 0.8 (log10 lr + 2) - 0.4 (n - 4.3), exactly, so every crossing is known."""
    found = plant()
    family = find_family(WIDTHS)
    surface = fit_surface(found, family, "grad_rms")
    eps = 1e-4
    outlook = eps_outlook(surface, family, (96.0, 2.0), 0.1, eps)
    n = 5.3448  # log10 N of 96x2
    assert outlook.grad_rms.value == pytest.approx(10 ** (-3.8 - 0.4 * (n - 4.3)), rel=0.05)  # the scatter's prior
    assert outlook.kept.value == pytest.approx(kept(outlook.grad_rms.value, eps))
    assert outlook.kept.low < outlook.kept.value < outlook.kept.high
    meets = 10 ** (-2 + (1 - 0.4 * (n - 4.3)) / 0.8)
    assert outlook.meets_lr == pytest.approx(meets, rel=0.15)  # sixty rates over three decades
    assert outlook.meets_params == pytest.approx(10 ** (4.3 + 0.2 / 0.4), rel=0.15)  # sixty sizes
    assert outlook.lower < eps
    assert outlook.kept_with_lower.low >= 0.99
    assert kept(outlook.grad_rms.low, 10 * outlook.lower) < 0.99


def test_an_eps_far_below_meets_nothing(plant: Plant) -> None:
    """planted: the clean case."""
    found = plant()
    family = find_family(WIDTHS)
    outlook = eps_outlook(fit_surface(found, family, "grad_rms"), family, (96.0, 2.0), 0.1, 1e-15)
    assert (outlook.meets_lr, outlook.meets_params, outlook.lower) == (None, None, 1e-15)


def test_each_crossed_line_has_its_change(config: RunConfig) -> None:
    """contract: logits, log Z, gradient and rate, by the settings that are not there yet; none where all is well."""
    lines = {"early_logit": logit_line(None), "abs_log_z": Line(LOG_Z_LINE, "here"), "grad_rms": gradient_line(1e-8)}
    calm = {"early_logit": Interval(5, 4, 6), "abs_log_z": Interval(6, 5, 7)}
    assert advise(config, 0.01, NO_RATE, calm, lines, None) == []
    wild = {"early_logit": Interval(5, 4, 2e4), "abs_log_z": Interval(6, 5, 700)}
    failing = NO_RATE._replace(rate=Interval(0.05, 0.005, 0.1), refused="")
    found = {advice.key: advice.change for advice in advise(config, 0.01, failing, wild, lines, None)}
    assert set(found) == {"failing_lr", "early_logit", "abs_log_z"}
    assert "rate below 0.005" in found["failing_lr"]
    assert "qk-layernorm" in found["early_logit"]
    assert found["abs_log_z"] == "z-loss above its 0.0001, or more weight decay"
    bare = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, qk_norm="head"),
        optim=dataclasses.replace(config.optim, z_loss=0.0, weight_decay=0.0),
    )
    found = {advice.key: advice.change for advice in advise(bare, 0.01, NO_RATE, wild, lines, None)}
    assert found["early_logit"] == "a warm-up longer than 10 steps"
    assert found["abs_log_z"] == "z-loss 1e-4, or weight decay"


def test_a_gradient_near_eps_asks_for_a_lower_one(plant: Plant, config: RunConfig) -> None:
    """planted."""
    found = plant()
    family = find_family(WIDTHS)
    surface = fit_surface(found, family, "grad_rms")
    outlook = eps_outlook(surface, family, (96.0, 2.0), 0.1, 1e-4)
    [advice] = advise(config, 0.1, NO_RATE, {}, {"grad_rms": gradient_line(1e-4)}, outlook)
    assert advice.change.startswith(f"eps {outlook.lower:g}")
    between = eps_outlook(surface, family, (96.0, 2.0), 0.1, outlook.grad_rms.value / 9)
    line = gradient_line(between.eps)
    assert between.grad_rms.low < line.value < between.grad_rms.high
    assert len(advise(config, 0.1, NO_RATE, {}, {"grad_rms": line}, between)) == 1
    far = eps_outlook(surface, family, (96.0, 2.0), 0.1, 1e-8)
    assert advise(config, 0.1, NO_RATE, {}, {"grad_rms": gradient_line(1e-8)}, far) == []
