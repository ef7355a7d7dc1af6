"""Which small runs buy the narrowest forecast of a failing rate: greedy, by expected width gained per core-second.

What is bought is a curve: one more seed of a size, over a ladder around where it should fail, since a run alone cannot
be judged without the best of its curve. Legend: C features, K curves, R rates. Must not import torch at the top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftershock.forecast.failing import CURVATURE, SLOPE, direct_fit, none_or_all_fail
from aftershock.forecast.family import Family, find_family
from aftershock.forecast.fits import Fit, fit_power_law
from aftershock.forecast.normal import log_mass
from aftershock.forecast.observations import Observations
from aftershock.lab.recipe import DecoderConfig
from aftershock.lab.sizes import Size

QUANTILE = 1.6448536269514722
"""Of the normal law at 95 %: an interval at level 0.9 is so many deviations to either side."""
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Widths are so many heads, depths so many blocks."""
REACH = 2.0
"""A ladder goes this many deviations of the expected failing rate to either side."""
MIN_GAIN = 1e-3
"""Buying stops where a curve narrows the interval by less than this many decades. Ours."""
MAX_CURVES = 1000
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Purchase(NamedTuple):
    """So many new seeds of one size, each over these rates; `seconds` of one core for all of them."""

    size: str
    num_seeds: int
    lrs: tuple[float, ...]
    seconds: float


class Plan(NamedTuple):
    """What to train. `width_now` and `width_then`: decades between the ends of the interval of the failing rate of
    `target`, expected of one new seed; `floor` what is left with endless runs, the scatter of seeds."""

    target: str
    arm: str
    budget_s: float
    seconds: float
    width_now: float
    width_then: float
    floor: float
    purchases: tuple[Purchase, ...]
    notes: tuple[str, ...]


class Candidate(NamedTuple):
    """A curve that can be bought: its features, rates, cost, and information on the failing rate, 1 / decades^2."""

    size: Size
    x_C: np.ndarray
    lrs: tuple[float, ...]
    seconds: float
    information: float


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h`, `1.5h` or `1d`.

    >>> parse_budget("2h")
    7200.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"a budget is a number and a unit, such as 90s, 30m or 2h; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def make_plan(found: Observations, target: Size, *, budget_s: float, seed: int = 0) -> Plan:
    """Greedy choice of curves within the budget, in seconds of one core; costs are those of the study's own runs.

    The variance at the target is x' (P + sum_k I_k x_k x_k')^-1 x with P the prior's precision and I_k the expected
    information of curve k, an interval-censored observation of scatter sigma. Sizes lie between the smallest trained
    and the target. Raises ValueError as `Family.check` does, where no run fails yet (then only higher rates help), and
    where the budget buys no curve.
    """
    problem = none_or_all_fail(found)
    if problem:
        raise ValueError(f"no plan: {problem}, and fit again")
    family = find_family([(run.width, run.depth) for run in found.runs])
    family.check(target)
    fit = direct_fit(found.curves, family, seed=seed).fit
    step = _step(found.rates)
    target_C = family.features([(target.width, target.depth)])[0]
    information_CC = _prior_precision(family) + _known_information(found, family, fit.sigma, step)
    candidates = _candidates(found, family, fit, target, step)
    affordable = [each for each in candidates if each.seconds <= budget_s]
    if not affordable:
        cheapest = min(candidates, key=lambda each: each.seconds)
        raise ValueError(
            f"a budget of {budget_s:g} s buys no curve; the cheapest, {cheapest.size.label} at {len(cheapest.lrs)} "
            f"rates, takes {cheapest.seconds:.3g} s of one core"
        )
    now = interval_width(information_CC, target_C, fit.sigma)
    bought, spent, information_CC = choose(affordable, information_CC, target_C, fit.sigma, budget_s)
    return Plan(
        target=target.label,
        arm=found.arm,
        budget_s=budget_s,
        seconds=spent,
        width_now=now,
        width_then=interval_width(information_CC, target_C, fit.sigma),
        floor=2 * QUANTILE * fit.sigma,
        purchases=_summed(affordable, bought),
        notes=("seconds of one core, as the study's runs took; more processes take less by the clock",),
    )


def choose(
    candidates: Sequence[Candidate], information_CC: np.ndarray, target_C: np.ndarray, sigma: float, budget_s: float
) -> tuple[list[int], float, np.ndarray]:
    """Indices of what is bought, in order, the seconds spent, and the information then."""
    bought: list[int] = []
    spent = 0.0
    while len(bought) < MAX_CURVES:
        width = interval_width(information_CC, target_C, sigma)
        gains = [
            width - interval_width(information_CC + _outer(each), target_C, sigma)
            if each.seconds <= budget_s - spent
            else -math.inf
            for each in candidates
        ]
        rates = [gain / each.seconds for gain, each in zip(gains, candidates, strict=True)]
        best = int(np.argmax(rates))
        if gains[best] < MIN_GAIN:
            break
        bought.append(best)
        spent += candidates[best].seconds
        information_CC = information_CC + _outer(candidates[best])
    return bought, spent, information_CC


def interval_width(information_CC: np.ndarray, target_C: np.ndarray, sigma: float) -> float:
    """Decades between the ends of the interval of one new seed at the target."""
    variance = float(target_C @ np.linalg.solve(information_CC, target_C))
    return 2 * QUANTILE * math.sqrt(variance + sigma**2)


def bracket_information(sigma: float, step: float) -> float:
    """Expected Fisher information [1 / decades^2] on the mean of N(mean, sigma^2), seen to lie between two rungs.

    Averaged over where the mean lies between rungs `step` apart; 1 / sigma^2 for a step of 0, less for a wider one.

    >>> round(bracket_information(0.2, 1e-3) * 0.2**2, 3)
    1.0
    """
    total = []
    for offset in np.linspace(0, step, 9)[:-1]:
        rungs = np.arange(-math.ceil(6 * sigma / step) - 1, math.ceil(6 * sigma / step) + 2) * step + offset
        left, right = rungs[:-1] / sigma, rungs[1:] / sigma
        mass = np.exp(log_mass(left, right))
        density = np.exp(-0.5 * np.stack([left, right]) ** 2) / math.sqrt(2 * math.pi)
        total.append(float(((density[0] - density[1]) ** 2 / np.maximum(mass, 1e-300)).sum()))
    return float(np.mean(total)) / sigma**2


def seconds_by_size(found: Observations) -> tuple[float, float, float]:
    """offset, factor, exponent of seconds a run against N, by a power law; a straight line with two sizes."""
    means = {}
    for size in found.sizes:
        runs = found.only(size).runs
        means[runs[0].num_params] = float(np.median([run.seconds for run in runs]))
    x, y = np.array([float(n) for n in means]), np.array(list(means.values()))
    if len(x) > 2:
        law = fit_power_law(x, y)
        offset, factor, exponent = (float(value[0]) for value in law)
        if factor > 0 and 0.2 <= exponent <= 2 and offset + factor * x[0] ** exponent > 0:
            return offset, factor, exponent
    # Noise of the clock, or two sizes only: seconds a run are taken as proportional to the cost of the largest.
    slope = max(0.0, (y[-1] - y[0]) / (x[-1] - x[0]))
    return float(max(0.0, y[-1] - slope * x[-1])), float(slope), 1.0


# --------------------------------------------------------------------------------------------------- what can be bought


def _candidates(found: Observations, family: Family, fit: Fit, target: Size, step: float) -> list[Candidate]:
    offset, factor, exponent = seconds_by_size(found)
    candidates = []
    for size in _sizes(found, family, target):
        x_C = family.features([(size.width, size.depth)])[0]
        seconds = offset + factor * size.num_block_params**exponent
        expected = float(x_C @ fit.coef_C)
        doubt = float(np.hypot((fit.draws_BC @ x_C).std(), fit.sigma))
        for fine in (step, step / 2):
            lrs = _ladder(found, expected, doubt, fine)
            information = bracket_information(fit.sigma, fine)
            candidates.append(Candidate(size, x_C, lrs, seconds * len(lrs), information))
    return candidates


def _sizes(found: Observations, family: Family, target: Size) -> list[Size]:
    """Members of the family from the smallest size trained up to, and without, the target."""
    model = found.config.model
    assert isinstance(model, DecoderConfig)
    trained = {Size(run.width, run.depth, run.width // model.head_dim) for run in found.runs}
    widths = {size.width for size in trained} | {head * model.head_dim for head in MULTIPLES}
    depths = {size.depth for size in trained} | set(MULTIPLES)
    low = min(size.num_block_params for size in trained)
    members = []
    for width in sorted(widths):
        for depth in sorted(depths):
            size = Size(width, depth, width // model.head_dim)
            if not low <= size.num_block_params < target.num_block_params or width % model.head_dim:
                continue
            try:
                family.check(size)
            except ValueError:  # no member of the family
                continue
            members.append(size)
    return members


def _ladder(found: Observations, expected: float, doubt: float, step: float) -> tuple[float, ...]:
    """Rates a curve needs: the best one to compare with, and rungs around the failing rate.

    Rungs are those of the study's ladder, or a half between them.
    """
    best = min((run for run in found.runs if run.final_loss is not None), key=lambda run: run.final_loss or math.inf)
    first = math.log10(best.lr)
    low = first + max(0.0, math.floor((expected - REACH * doubt - first) / step)) * step
    num = max(2, math.ceil((expected + REACH * doubt - low) / step) + 1)
    rates = {best.lr, *(_near(found.rates, 10 ** (low + i * step)) for i in range(num))}
    return tuple(sorted(rates))


def _near(rates: Sequence[float], lr: float) -> float:
    """A rate of the study's own within a tenth, so that its runs compare; else this one, to two digits."""
    close = min(rates, key=lambda rate: abs(math.log(rate / lr)))
    return close if abs(math.log(close / lr)) < 0.1 else float(f"{lr:.2g}")


def _known_information(found: Observations, family: Family, sigma: float, step: float) -> np.ndarray:
    """Of the study's own curves; one that never fails tells less, which counts as half."""
    x_KC = family.features([(curve.width, curve.depth) for curve in found.curves])
    closed = np.array(
        [math.isfinite(curve.bracket.low) and math.isfinite(curve.bracket.high) for curve in found.curves]
    )
    weight_K = bracket_information(sigma, step) * np.where(closed, 1.0, 0.5)
    return (weight_K[:, None] * x_KC).T @ x_KC


def _prior_precision(family: Family) -> np.ndarray:
    return np.diag([0.0, *[SLOPE[1] ** -2] * family.num_slopes, CURVATURE**-2])


def _outer(candidate: Candidate) -> np.ndarray:
    return candidate.information * np.outer(candidate.x_C, candidate.x_C)


def _step(rates: Sequence[float]) -> float:
    """The ladder's usual step in decades."""
    return float(np.median(np.diff(np.log10(rates))))


def _summed(candidates: Sequence[Candidate], bought: Sequence[int]) -> tuple[Purchase, ...]:
    purchases = []
    for index in sorted(set(bought), key=lambda i: (candidates[i].size.num_block_params, candidates[i].lrs)):
        each, count = candidates[index], bought.count(index)
        purchases.append(Purchase(each.size.label, count, each.lrs, each.seconds * count))
    return tuple(purchases)
