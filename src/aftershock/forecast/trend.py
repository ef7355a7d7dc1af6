"""LR sensitivity against size: the trend with an interval, by the paper's range rule, and whether the metric is valid.

Wortsman et al. 2023, arXiv 2309.14322: definition section 2.2, range rule and validity appendix B. Legend: K curves.
Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aftershock.forecast.family import Family
from aftershock.forecast.fits import Interval, fit_power_law, fit_runs, interval_of, predict_draws, resample_weights
from aftershock.forecast.observations import MIN_RATES, Observation, Observations
from aftershock.forecast.sensitivity import lr_sensitivity
from aftershock.forecast.surfaces import size_prior
from aftershock.lab.sizes import Size

RANGE_DECADES, RANGE_SLACK = 3.0, 0.02
"""The paper's range of rates, and what rounding a ladder to one digit may take off it."""
CURVATURE = 0.1
"""Deviation of the trend's curvature, decades per decade^2 of N, before the data. Ours."""
NUM_SDS = 2.0
"""Curves that differ by less than this many seed deviations count as indistinguishable, as in claim P3."""
MIN_SIZES_FOR_FLOOR = 4
NUM_RESAMPLES = 500


class SizeSensitivity(NamedTuple):
    """One size's mean curve over seeds: sensitivity [nats] over `window`, best rate and the loss there [nats]."""

    size: str
    num_params: int
    lr_sensitivity: float
    best_lr: float
    best_loss: float
    window: tuple[float, float]


class Check(NamedTuple):
    """One condition under which LR sensitivity means something. `holds` None: this study cannot tell."""

    condition: str
    holds: bool | None
    words: str


class Trend(NamedTuple):
    """`slope`: decades of sensitivity per decade of N (None where width and depth vary each on its own); `at_target`
    [nats] for one new seed; `best_loss` [nats] at the target, by a power law with a floor, from four sizes on. `sizes`
    empty: there is no trend, and the check says why."""

    sizes: tuple[SizeSensitivity, ...]
    slope: Interval | None
    at_target: Interval | None
    best_loss: Interval | None
    checks: tuple[Check, ...]


def sensitivity_trend(
    found: Observations, family: Family, target: Size, *, baseline: Observations | None = None, seed: int = 0
) -> Trend:
    """The trend of an arm, and what `target` would have. `baseline`: the untouched arm, to compare curves with.

    Over the rates that every size has, from curves that have them all.
    """
    rates = sorted(set.intersection(*({run.lr for run in found.only(size).runs} for size in found.sizes)))
    curves = _full_curves(found, rates)
    names = [size for size in found.sizes if any(size == name for name, _ in curves)]
    if len(names) < 2 or len(rates) < MIN_RATES:
        words = f"{len(names)} sizes have curves over the {len(rates)} rates that all sizes share; finish the sweep"
        return Trend((), None, None, None, (Check("two sizes share three rates", False, words),))
    windows = windows_of(rates)
    sizes = tuple(_size(size, [runs for (name, _), runs in curves.items() if name == size], windows) for size in names)
    chosen = {entry.size: entry.window for entry in sizes}
    points, decades = [], []
    for (size, _), runs in curves.items():
        own = _sensitivity(runs, chosen[size])
        if own > 0:  # a flat curve has no logarithm: it is no part of a trend in decades
            points.append((runs[0].width, runs[0].depth))
            decades.append(math.log10(own))
    slope = at_target = None
    if len(set(points)) >= 2 and len(points) > family.num_slopes + 1:
        y_K = np.array(decades)
        fit = fit_runs(family.features(points), y_K, y_K, prior=size_prior(family, 0, CURVATURE), seed=seed)
        if family.num_slopes == 1:
            slope = interval_of(float(fit.coef_C[1]), fit.draws_BC[:, 1])
        x_C = family.features([(target.width, target.depth)])[0]
        bounds = interval_of(float(x_C @ fit.coef_C), predict_draws(fit, x_C))
        at_target = Interval(*(10**end for end in bounds))
    checks = (
        _same_meaning(found, baseline),
        _optimum(sizes, rates),
        _level(sizes),
    )
    return Trend(sizes, slope, at_target, _best_loss(found, target, seed), checks)


def windows_of(rates: Sequence[float]) -> list[tuple[float, float]]:
    """Ranges of three decades that the ladder holds, ascending; the whole of a shorter ladder."""
    windows = []
    for low in rates:
        high = next((rate for rate in rates if math.log10(rate / low) >= RANGE_DECADES - RANGE_SLACK), None)
        if high is not None:
            windows.append((low, high))
    return windows or [(rates[0], rates[-1])]


def mean_losses(runs: Sequence[Observation]) -> dict[float, float]:
    """Final loss [nats] by rate, mean over runs of min(loss, l0), a diverged run counting as l0."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        capped = run.initial_loss if run.final_loss is None else min(run.final_loss, run.initial_loss)
        losses.setdefault(run.lr, []).append(capped)
    return {lr: math.fsum(values) / len(values) for lr, values in losses.items()}


def _full_curves(found: Observations, rates: Sequence[float]) -> dict[tuple[str, int], list[Observation]]:
    """Curves with a run at each of these rates, and those runs, in ascending rate."""
    groups: dict[tuple[str, int], list[Observation]] = {}
    for run in sorted(found.runs, key=lambda run: (run.num_params, run.seed, run.lr)):
        if run.lr in rates:
            groups.setdefault((run.size, run.seed), []).append(run)
    return {
        key: runs
        for key, runs in groups.items()
        if [run.lr for run in runs] == rates and any(run.final_loss is not None for run in runs)
    }


def _sensitivity(runs: Sequence[Observation], window: tuple[float, float]) -> float:
    """Over the rates of a window; the mean where several runs share a rate."""
    means = list(mean_losses([run for run in runs if window[0] <= run.lr <= window[1]]).values())
    return lr_sensitivity(means, max(means))  # capped already, so the highest is as good a cap


def _size(
    size: str, curves: Sequence[Sequence[Observation]], windows: Sequence[tuple[float, float]]
) -> SizeSensitivity:
    """The lower sensitivity of all windows, which is the paper's rule where the optimum shifts (figure 6)."""
    runs = [run for curve in curves for run in curve]
    by_window = {window: _sensitivity(runs, window) for window in windows}
    window = min(by_window, key=lambda each: by_window[each])
    means = mean_losses(runs)
    best = min(means, key=lambda lr: (means[lr], lr))
    return SizeSensitivity(size, runs[0].num_params, by_window[window], best, means[best], window)


def _best_loss(found: Observations, target: Size, seed: int) -> Interval | None:
    """Loss at the best rate against N, one value a curve, as floor + factor N^exponent; bootstrap over curves."""
    if len(found.sizes) < MIN_SIZES_FOR_FLOOR:
        return None
    best: dict[tuple[int, int], float] = {}
    for run in found.runs:
        if run.final_loss is not None:
            key = (run.num_params, run.seed)
            best[key] = min(run.final_loss, best.get(key, math.inf))
    x_K, y_K = np.array([float(n) for n, _ in best]), np.array(list(best.values()))
    if len(np.unique(x_K)) < MIN_SIZES_FOR_FLOOR:
        return None
    weights_BK = resample_weights(np.random.default_rng(seed), len(x_K), NUM_RESAMPLES)
    value = float(fit_power_law(x_K, y_K).at(target.num_block_params)[0])
    return interval_of(value, fit_power_law(x_K, y_K, weights_BN=weights_BK).at(target.num_block_params))


# ---------------------------------------------------------------------------------------------------- the conditions


def _same_meaning(found: Observations, baseline: Observations | None) -> Check:
    """Appendix B, 1: below a critical rate the curves with and without an intervention must be one curve."""
    condition = "the rate means the same as in the baseline"
    if found.config.optim.lr_scale != "none":
        return Check(condition, False, f"optim.lr_scale={found.config.optim.lr_scale} makes the rate another quantity")
    if baseline is None:
        return Check(condition, None, "no baseline arm with the same sizes to compare the curves with")
    failing = [run.lr for run in (*found.runs, *baseline.runs) if run.fails]
    critical = min(failing, default=math.inf)
    worst, where = 0.0, ""
    for size in found.sizes:
        for lr in found.rates:
            if lr < critical:
                here, there = (_losses(each, size, lr) for each in (found, baseline))
                if len(here) > 1 and len(there) > 1:
                    spread = math.sqrt((np.var(here, ddof=1) + np.var(there, ddof=1)) / 2)
                    ratio = abs(float(np.mean(here) - np.mean(there))) / max(spread, 1e-12)
                    worst, where = max((worst, where), (ratio, f"{size} at rate {lr:g}"))
    if not where:
        return Check(condition, None, "two seeds of both arms below the failing rate are needed to compare the curves")
    words = f"below rate {critical:.2g} the arms differ by {worst:.2g} seed deviations at most, {where}"
    return Check(condition, worst <= NUM_SDS, words)


def _losses(found: Observations, size: str, lr: float) -> list[float]:
    return [run.final_loss for run in found.runs if (run.size, run.lr) == (size, lr) and run.final_loss is not None]


def _optimum(sizes: Sequence[SizeSensitivity], rates: Sequence[float]) -> Check:
    """Appendix B, 2: where the best rate moves with size the range must move with it."""
    condition = "the range of rates follows the best rate"
    best = {entry.size: entry.best_lr for entry in sizes}
    span = math.log10(rates[-1] / rates[0])
    if span < RANGE_DECADES - RANGE_SLACK:
        return Check(condition, False, f"the ladder spans {span:.2g} decades, the metric's range is three: add rates")
    shift = math.log10(max(best.values()) / min(best.values()))
    if shift == 0:
        return Check(condition, True, f"the best rate is {next(iter(best.values())):g} at every size")
    words = f"the best rate moves by {shift:.2g} decades ({_listed(best)})"
    if len(windows_of(rates)) > 1:
        return Check(condition, True, f"{words}; the lowest sensitivity of the ranges in the ladder is taken")
    return Check(condition, False, f"{words} and the ladder holds one range only: add a rate below and above it")


def _level(sizes: Sequence[SizeSensitivity]) -> Check:
    """Appendix B, 3: a model that is equally bad everywhere scores 0."""
    losses = {entry.size: entry.best_loss for entry in sizes}
    falling = all(b <= a for a, b in zip(list(losses.values())[:-1], list(losses.values())[1:], strict=True))
    words = f"best losses {_listed(losses)}"
    return Check("the best loss falls with size", falling, words if falling else f"{words}: read the loss curves too")


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{size} {value:.3g}" for size, value in values.items())
