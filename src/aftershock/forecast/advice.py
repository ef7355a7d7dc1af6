"""Danger lines of the forecast signals, AdamW's eps against the gradient, and what to change where a line is crossed.

Pure: takes predictions, reads no files. Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aftershock.forecast.failing import FailingRate
from aftershock.forecast.family import Family, Point
from aftershock.forecast.fits import Interval
from aftershock.forecast.surfaces import Surface
from aftershock.lab.recipe import DecoderConfig, RunConfig

PAPER_LOGIT = 1e4
"""Above it every run of the paper diverged (arXiv 2309.14322, figure 9), at 2 % of the run; used where the study's own
runs show no line, because none or all of them fail."""
LOG_Z_LINE = 100.0
"""bfloat16 keeps 8 bits, so logits of 100 are half a nat apart. Ours."""
SHRINK_FRAC = 0.1
"""The update is in danger where eps takes more than this share of it. Ours; at gradient = eps it is a half."""
SAFE_FRAC = 0.01
"""The eps that is advised takes no more than this share, at the lower end of the gradient's interval."""
MIN_EPS = 1e-30
"""Below about 1e-19 the squares of such gradients leave float32; an eps this small is as good as none."""
NUM_SCANNED = 60


class Line(NamedTuple):
    """A danger line: `value` in the signal's unit, and where it comes from."""

    value: float
    source: str


class Eps(NamedTuple):
    """AdamW's eps against the gradient of the target at rate `lr`. `kept` is the share g / (g + eps) of the update that
    eps leaves. `meets_lr`: the rate at which the target's gradient equals eps, `meets_params`: the N at which it does
    at `lr`; None where neither happens inside what the fit supports. `lower`: an eps that leaves 99 % at least."""

    eps: float
    lr: float
    grad_rms: Interval
    kept: Interval
    meets_lr: float | None
    meets_params: float | None
    lower: float
    kept_with_lower: Interval


class Advice(NamedTuple):
    """What to change, and why: one line crossed."""

    key: str
    why: str
    change: str


def logit_line(kappa: Interval | None) -> Line:
    """The early logit above which runs fail: learned, else the paper's."""
    if kappa is None:
        return Line(PAPER_LOGIT, "the paper's line; this study has no run that fails beside runs that train")
    return Line(kappa.value, "learned from the runs that fail and those that train")


def gradient_line(eps: float) -> Line:
    """The gradient RMS below which eps takes more than `SHRINK_FRAC` of the update."""
    return Line(eps * (1 / SHRINK_FRAC - 1), f"eps {eps:g} takes {SHRINK_FRAC:.0%} of the update there")


def kept(grad_rms: float, eps: float) -> float:
    """Share of Adam's update that eps leaves, g / (g + eps): the update is m / (sqrt(v) + eps), and both go as g.

    A tensor's RMS stands for its elements, as in arXiv 2309.14322, section 3.4.

    >>> kept(1e-8, 1e-8)
    0.5
    """
    return grad_rms / (grad_rms + eps)


def eps_outlook(surface: Surface, family: Family, point: Point, lr: float, eps: float) -> Eps:
    """Where the gradient meets eps, and what a lower eps buys. `surface` is that of `grad_rms`."""
    grad = surface.at(point, lr).interval
    lower = eps
    while kept(grad.low, lower) < 1 - SAFE_FRAC and lower > MIN_EPS:
        lower /= 10
    lower = float(f"{lower:.0e}")  # a product of tenths is not a round number
    rates = np.geomspace(surface.rates[0], surface.rates[-1], NUM_SCANNED)
    sizes = () if family.kind == "both" else _members(family)
    return Eps(
        eps=eps,
        lr=lr,
        grad_rms=grad,
        kept=Interval(*(kept(g, eps) for g in grad)),
        meets_lr=next((float(r) for r in rates if surface.at(point, float(r)).value <= math.log10(eps)), None),
        meets_params=next((n for n, at in sizes if surface.at(at, lr).value <= math.log10(eps)), None),
        lower=lower,
        kept_with_lower=Interval(*(kept(g, lower) for g in grad)),
    )


def advise(
    config: RunConfig,
    lr: float,
    failing: FailingRate,
    values: Mapping[str, Interval],
    lines: Mapping[str, Line],
    eps: Eps | None,
) -> list[Advice]:
    """One entry for each line that an interval crosses; none where all is well. `values` hold at rate `lr`."""
    found = []
    if failing.rate is not None and failing.rate.low <= lr:
        why = f"at rate {lr:.3g} training may fail: the failing rate lies in {_range(failing.rate)}"
        found.append(Advice("failing_lr", why, f"a rate below {failing.rate.low:.2g}, or {_steadier(config)}"))
    for key in ("early_logit", "logit"):
        if key in values and key in lines and values[key].high >= lines[key].value:
            why = f"{_range(values[key])} reaches {lines[key].value:.3g}, {lines[key].source}"
            found.append(Advice(key, why, _steadier(config)))
    if "abs_log_z" in values and values["abs_log_z"].high >= lines["abs_log_z"].value:
        why = f"{_range(values['abs_log_z'])} reaches {lines['abs_log_z'].value:.3g}, {lines['abs_log_z'].source}"
        z_loss = "z-loss 1e-4" if config.optim.z_loss == 0 else f"z-loss above its {config.optim.z_loss:g}"
        decay = "weight decay" if config.optim.weight_decay == 0 else "more weight decay"
        found.append(Advice("abs_log_z", why, f"{z_loss}, or {decay}"))
    if eps is not None and "grad_rms" in lines and eps.grad_rms.low <= lines["grad_rms"].value:
        why = f"{_range(eps.grad_rms)} reaches {lines['grad_rms'].value:.3g}, {lines['grad_rms'].source}"
        change = f"eps {eps.lower:g}, which leaves {eps.kept_with_lower.low:.1%} of the update at least"
        found.append(Advice("grad_rms", why, change))
    return found


def _steadier(config: RunConfig) -> str:
    """What holds attention logits down that is not there yet."""
    longer = f"a warm-up longer than {config.optim.warmup_steps} steps"
    if isinstance(config.model, DecoderConfig) and config.model.qk_norm == "off":
        return f"qk-layernorm, or {longer}"
    return longer


def _members(family: Family) -> list[tuple[float, Point]]:
    """N and shape of members from the smallest size trained to the furthest a forecast may go."""
    low, high = family.log_n
    ends = np.linspace(low, high + family.reach * (high - low), NUM_SCANNED)
    return [(10 ** float(n), family.point_at(float(n))) for n in ends]


def _range(interval: Interval) -> str:
    return f"{interval.low:.2g} to {interval.high:.2g}"
