"""The learning rate at which training fails, as a function of size, by two ways; the better at sizes left out is used.

- direct: each curve (a seed of a size) says between which two rates it starts to fail; the rate's logarithm is linear
  in log size with a little curvature, plus scatter of seeds. An ordinal (interval-censored) fit.
- logit: the early attention logit as a function of size and rate (`surfaces`), and the logit kappa above which runs
  fail, learned from all runs; the failing rate is where the one crosses the other (Wortsman et al. 2023, figure 9).

Legend: K curves, N runs, C features, B draws. Rates and logits in decades. Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.forecast.family import Family, find_family
from aftershock.forecast.fits import Fit, Interval, Prior, draw_fits, fit_map, interval_of, predict_draws
from aftershock.forecast.observations import Curve, Observation, Observations
from aftershock.forecast.surfaces import choose_mode, estimate, fit_surface, rates_alone
from aftershock.lab.sizes import Size

Method = Literal["direct", "logit"]

CURVATURE = 0.1
"""Deviation of the failing rate's curvature, decades per decade^2 of N, before the data. Ours: a decade beyond the
middle of the sizes it is worth a tenth of a decade, two decades beyond it four."""
SLOPE = (-0.25, 0.25)
"""Mean and deviation of the failing rate's slope over log N before the data: one deviation reaches from no dependence
to a rate as 1 / width, which the theory of infinite width asks of hidden matrices (Yang et al. 2022, arXiv
2203.03466)."""
SCATTER, SCATTER_WEIGHT = 0.15, 3.0
"""Scatter of the failing rate over seeds in decades before the data, worth three curves. Ours."""
KAPPA_SCATTER = 0.2
"""Scatter of the logit at which single runs start to fail, in decades, before the data."""
MAX_WIDTH = 2.0
"""An interval wider than two decades of learning rate says nothing: refused."""
MAX_ERROR = 1.0
"""As is a target beyond the sizes trained, where the rest missed the largest of them by more than this many decades."""


class Threshold(NamedTuple):
    """The fit behind the direct way: x . coef is the failing rate in decades."""

    family: Family
    fit: Fit


class FailingRate(NamedTuple):
    """The failing rate of a size and its interval for one new seed; `refused` says why there is none.

    `errors`: RMS decades by which each way missed the curves of sizes left out; `largest_error` the same of the largest
    size alone, by the way used. `kappa`: the early logit above which runs fail, as a plain number; None unless it could
    be learned. `ladder_rate`: the lowest rate of the study's ladder, continued at its steps, that is at least as high.
    """

    rate: Interval | None
    method: Method | None
    ladder_rate: float | None
    errors: Mapping[str, float]
    largest_error: float | None
    kappa: Interval | None
    refused: str


class Ways(NamedTuple):
    """Which way is used, and why: RMS decades missed at sizes left out (infinite: not known), and at the largest."""

    method: Method
    errors: Mapping[str, float]
    largest_error: float
    kappa: Interval | None


def forecast_failing(
    found: Observations, family: Family, target: Size, *, ways: Ways | None = None, seed: int = 0
) -> FailingRate:
    """The failing rate of `target`, which must be a size that `family.check` lets pass.

    `ways`: what `weigh_ways` of the same runs said, for a second target of one study.
    """
    refused = none_or_all_fail(found)
    if refused:
        return FailingRate(None, None, None, {}, None, None, refused)
    ways = weigh_ways(found, seed=seed) if ways is None else ways
    draws_B = predict_failing(found, family, target, ways.method, seed=seed)
    rate = Interval(*(10**end for end in interval_of(float(np.median(draws_B)), draws_B)))
    refused = _refusal(found, target, rate, ways.largest_error)
    return FailingRate(
        rate=None if refused else rate,
        method=ways.method,
        ladder_rate=None if refused else next_rate(found.rates, rate.value),
        errors={name: error for name, error in ways.errors.items() if math.isfinite(error)},
        largest_error=ways.largest_error if math.isfinite(ways.largest_error) else None,
        kappa=ways.kappa,
        refused=refused,
    )


def weigh_ways(found: Observations, *, seed: int = 0) -> Ways:
    """Both ways at every size left out once. Only where some runs fail and some do not."""
    kappa = kappa_fit(found.runs, "early_logit", seed=seed) if _has_early(found) else None
    errors = {"direct": left_out_error(found, "direct")}
    if kappa is not None:
        errors["logit"] = left_out_error(found, "logit")
    method: Method = "logit" if errors.get("logit", math.inf) < errors["direct"] else "direct"
    line = None
    if kappa is not None:
        line = Interval(*(10**end for end in interval_of(float(kappa.coef_C[0]), kappa.draws_BC[:, 0])))
    return Ways(method, errors, left_out_error(found, method, sizes=found.sizes[-1:]), line)


def none_or_all_fail(found: Observations) -> str:
    """Why no failing rate can be learned, or empty: nothing failed, or nothing bounds it from below."""
    brackets = [curve.bracket for curve in found.curves]
    if all(math.isinf(bracket.high) for bracket in brackets):
        return f"no run fails up to rate {found.rates[-1]:g}, so the failing rate lies above: add higher rates"
    if all(math.isinf(bracket.low) for bracket in brackets):
        return f"every run diverged down to rate {found.rates[0]:g}: add lower rates"
    return ""


def direct_fit(curves: Sequence[Curve], family: Family, *, seed: int = 0) -> Threshold:
    """Draws of the failing rate's dependence on size, from the brackets of the curves."""
    x_KC, low_K, high_K, prior = _direct_problem(curves, family)
    return Threshold(family, draw_fits(x_KC, low_K, high_K, prior=prior, seed=seed))


def kappa_fit(runs: Sequence[Observation], key: str, *, seed: int = 0) -> Fit | None:
    """The value of a signal above which runs fail, by a probit: a failing run's own threshold lies below its value.

    None where no failing run, or no other, has the signal.
    """
    problem = _kappa_problem(runs, key)
    return None if problem is None else draw_fits(*problem[:3], prior=problem[3], seed=seed)


def predict_failing(found: Observations, family: Family, target: Size, method: Method, *, seed: int = 0) -> np.ndarray:
    """Draws [B] of log10 of the failing rate that one new seed of `target` would show."""
    point = (target.width, target.depth)
    if method == "direct":
        fit = direct_fit(found.curves, family, seed=seed).fit
        return predict_draws(fit, family.features([point])[0])
    surface, kappa = (
        fit_surface(found, family, "early_logit", seed=seed),
        kappa_fit(found.runs, "early_logit", seed=seed),
    )
    assert kappa is not None, "the logit way is only taken where kappa was learned"
    draws_RB = np.stack([surface.at(point, lr).draws_B for lr in surface.rates])
    level_B = np.resize(predict_draws(kappa, np.ones(1), seed=2), draws_RB.shape[1])
    return crossing(np.log10(surface.rates), draws_RB, level_B)


def crossing(log_lr_R: np.ndarray, draws_RB: np.ndarray, level_B: np.ndarray) -> np.ndarray:
    """Where each column rises above its level for good, linear between rates; beyond an end by the slope there.

    Where that slope does not rise there is no crossing: infinite, of the sign of the side it would lie on.
    """
    below_RB = draws_RB < level_B
    num_rates = len(log_lr_R)
    after_B = np.where(below_RB.any(axis=0), num_rates - below_RB[::-1].argmax(axis=0), 0)
    right_B = np.clip(after_B, 1, num_rates - 1)
    columns = np.arange(draws_RB.shape[1])
    x0_B, x1_B = log_lr_R[right_B - 1], log_lr_R[right_B]
    y0_B, y1_B = draws_RB[right_B - 1, columns], draws_RB[right_B, columns]
    slope_B = (y1_B - y0_B) / (x1_B - x0_B)
    rising = slope_B > 1e-9
    found_B = x0_B + (level_B - y0_B) / np.where(rising, slope_B, 1.0)
    return np.where(rising, found_B, np.where(after_B == 0, -math.inf, math.inf))


def left_out_error(found: Observations, method: Method, *, sizes: Sequence[str] = ()) -> float:
    """RMS decades by which the failing rate, predicted from the other sizes, misses the brackets of one left out.

    Over all sizes, or those given. To the middle of a closed bracket; of an open one only what lies outside counts.
    Infinite where leaving one out leaves nothing to fit.
    """
    squares = []
    for size in sizes or found.sizes:
        rest, out = found.without(size), found.only(size)
        first = out.runs[0]
        try:
            if none_or_all_fail(rest):
                return math.inf
            family = find_family([(run.width, run.depth) for run in rest.runs])
            guess = _point(rest, family, Size(first.width, first.depth, 1), method)
        except ValueError:  # the rest is no family, or too little of one
            return math.inf
        squares += [miss(curve, guess) ** 2 for curve in out.curves]
    return math.sqrt(sum(squares) / len(squares))


def miss(curve: Curve, guess: float) -> float:
    """Decades between a predicted failing rate and what a curve says of it."""
    low, high = curve.bracket
    if math.isfinite(low) and math.isfinite(high):
        return abs(guess - (low + high) / 2)
    return max(0.0, low - guess, guess - high)


def next_rate(rates: Sequence[float], lr: float) -> float:
    """The lowest rate of the ladder, continued in its last (first) step where it ends, that is at least `lr`."""
    ladder = list(rates)
    while ladder[-1] < lr * (1 - 1e-9):
        ladder.append(ladder[-1] ** 2 / ladder[-2])
    while ladder[0] >= lr * (1 - 1e-9):
        ladder.insert(0, ladder[0] ** 2 / ladder[1])
    return next(rate for rate in ladder if rate >= lr * (1 - 1e-9))


def _point(found: Observations, family: Family, target: Size, method: Method) -> float:
    """The estimate alone, by maximum likelihood: quick enough to leave every size out once."""
    point = (target.width, target.depth)
    if method == "direct":
        x_KC, low_K, high_K, prior = _direct_problem(found.curves, family)
        coef_C = fit_map(x_KC, low_K, high_K, prior=prior).coef_BC[0]
        return float(family.features([point])[0] @ coef_C)
    problem = _kappa_problem(found.runs, "early_logit")
    if problem is None:
        raise ValueError("no kappa without failing and other runs")
    kappa = fit_map(*problem[:3], prior=problem[3]).coef_BC[0]
    runs = [run for run in found.runs if "early_logit" in run.readings]
    mode, _ = choose_mode(runs, "early_logit", family)
    rates = sorted({run.lr for run in runs})
    if mode == "per rate":
        rates = rates_alone(runs, family)
    values = estimate(runs, "early_logit", family, mode, [(point, lr) for lr in rates])
    return float(crossing(np.log10(rates), values[:, None], kappa)[0])


def _direct_problem(curves: Sequence[Curve], family: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray, Prior]:
    low_K, high_K = (np.array(ends) for ends in zip(*(curve.bracket for curve in curves), strict=True))
    slopes = family.num_slopes
    prior = Prior(
        np.array([0.0, *[SLOPE[0]] * slopes, 0.0]),
        np.array([math.inf, *[SLOPE[1]] * slopes, CURVATURE]),
        SCATTER,
        SCATTER_WEIGHT,
    )
    return family.features([(curve.width, curve.depth) for curve in curves]), low_K, high_K, prior


def _kappa_problem(runs: Sequence[Observation], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Prior] | None:
    seen = [(run.readings[key].low, run.fails) for run in runs if key in run.readings and _observed(run, key)]
    if len({fails for _, fails in seen}) < 2:
        return None
    low_N = np.array([-math.inf if fails else value for value, fails in seen])
    high_N = np.array([value if fails else math.inf for value, fails in seen])
    return (
        np.ones((len(seen), 1)),
        low_N,
        high_N,
        Prior(np.zeros(1), np.array([math.inf]), KAPPA_SCATTER, SCATTER_WEIGHT),
    )


def _observed(run: Observation, key: str) -> bool:
    return run.readings[key].low == run.readings[key].high


def _has_early(found: Observations) -> bool:
    """Whether the study measured early enough: nearly every run has an early logit then."""
    return sum("early_logit" in run.readings for run in found.runs) >= len(found.runs) / 2


def _refusal(found: Observations, target: Size, rate: Interval, largest: float) -> str:
    beyond = target.num_block_params > max(run.num_params for run in found.runs)
    if beyond and math.isfinite(largest) and largest > MAX_ERROR:
        return (
            f"the other sizes miss the failing rate of {found.sizes[-1]} by a factor {10**largest:.3g}, so they say "
            "nothing of a larger one: add sizes or seeds"
        )
    if not 0 < rate.low <= rate.high < math.inf or math.log10(rate.high / rate.low) > MAX_WIDTH:
        return (
            f"the failing rate of {target.label} would lie anywhere from {rate.low:.2g} to {rate.high:.2g}: add sizes "
            "nearer the target, seeds, or rates between the last that trains and the first that fails"
        )
    return ""
