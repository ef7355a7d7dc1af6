"""How a signal depends on size and rate: quadratic in the logarithms, for all rates jointly or for each rate alone.

Legend: N runs, C coefficients, B draws. Which of the two forms stands is decided by the error at sizes left out. The
paper fits each rate alone (Wortsman et al. 2023, figure 9); jointly, a study with few runs a rate is enough.
Must not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.forecast.family import Family, Point, find_family
from aftershock.forecast.fits import Fit, Interval, Prior, fit_map, fit_runs, interval_of, predict_draws
from aftershock.forecast.observations import Observation, Observations, Reading

Mode = Literal["joint", "per rate"]

CURVATURE = 0.1
"""Deviation of a signal's curvature over size, decades per decade^2 of N, before the data: it widens what lies far out.
Ours, as the scatter: with 0.2 the 90 % intervals of a pilot study held 104 of 105 values at four times its largest
N."""
SCATTER, SCATTER_WEIGHT = 0.05, 1.0
"""Scatter of runs in decades before the data, worth one run."""
MIN_PER_RATE = 4
MIN_COVERED = 0.5
"""Extrapolation stops where fewer of the largest size's runs lie in the 90 % interval that the others gave them."""


class Prediction(NamedTuple):
    """In decades: the estimate, and draws of what one new run would show."""

    value: float
    draws_B: np.ndarray

    @property
    def interval(self) -> Interval:
        """In the signal's own unit."""
        found = interval_of(self.value, self.draws_B)
        return Interval(*(10**end for end in found))


class Surface(NamedTuple):
    """A fitted signal. `fits` by rate, or one at rate 0 for all jointly; `errors` in decades at sizes left out (RMS),
    by form; `covered`: share of the largest size's runs in the interval from the others, nan with two sizes."""

    key: str
    mode: Mode
    family: Family
    center_lr: float
    fits: Mapping[float, Fit]
    rates: tuple[float, ...]
    errors: Mapping[str, float]
    covered: float
    num_runs: int

    @property
    def holds(self) -> bool:
        """Whether the fit may reach beyond its sizes."""
        return math.isnan(self.covered) or self.covered >= MIN_COVERED

    def at(self, point: Point, lr: float) -> Prediction:
        """What a run of this size and peak rate would show. Raises ValueError for a rate outside those trained."""
        if self.mode == "joint":
            x_C = _joint_rows(self.family, [point], [lr], self.center_lr)[0]
            fit = self.fits[0.0]
            _inside(lr, self.rates)
            return Prediction(float(x_C @ fit.coef_C), predict_draws(fit, x_C))
        x_C = self.family.features([point])[0]
        low, high, share = _neighbours(lr, tuple(self.fits))
        ends = [
            Prediction(float(x_C @ self.fits[rate].coef_C), predict_draws(self.fits[rate], x_C)) for rate in (low, high)
        ]
        return Prediction(
            (1 - share) * ends[0].value + share * ends[1].value,
            (1 - share) * ends[0].draws_B + share * ends[1].draws_B,
        )


def fit_surface(found: Observations, family: Family, key: str, *, seed: int = 0) -> Surface:
    """Fit one of `observations.QUANTITIES`, in the form that predicts sizes left out better.

    Raises ValueError where too few runs have the signal.
    """
    runs = [run for run in found.runs if key in run.readings]
    if len({run.size for run in runs}) < 2:
        raise ValueError(f"fewer than two sizes recorded {key}; train with --set measure_every=10")
    mode, errors = choose_mode(runs, key, family)
    fits = _fits(runs, key, family, mode, seed)
    return Surface(
        key=key,
        mode=mode,
        family=family,
        center_lr=_center(runs),
        fits=fits,
        rates=tuple(fits) if mode == "per rate" else tuple(sorted({run.lr for run in runs})),
        errors={each: error for each, error in errors.items() if math.isfinite(error)},
        covered=_largest_covered(runs, key, mode, seed),
        num_runs=len(runs),
    )


def size_prior(family: Family, num_extra: int, curvature: float) -> Prior:
    """Flat but for the curvature over size, which comes last of the size's features."""
    sd = [math.inf] * (1 + family.num_slopes) + [curvature] + [math.inf] * num_extra
    return Prior(np.zeros(len(sd)), np.array(sd), SCATTER, SCATTER_WEIGHT)


def choose_mode(runs: Sequence[Observation], key: str, family: Family) -> tuple[Mode, dict[Mode, float]]:
    """The form with the lower error at sizes left out, over the rates that both can carry; and the errors of both."""
    rates = rates_alone(runs, family)
    if len(rates) < 2:
        return "joint", {"joint": left_out(runs, key, "joint", sorted({run.lr for run in runs}))}
    errors: dict[Mode, float] = {"per rate": left_out(runs, key, "per rate", rates)}
    errors["joint"] = left_out(runs, key, "joint", rates)
    return min(errors, key=lambda mode: errors[mode]), errors


def rates_alone(runs: Sequence[Observation], family: Family) -> list[float]:
    """Rates at which enough runs of enough sizes lie for a fit of their own."""
    rates = []
    for lr in sorted({run.lr for run in runs}):
        sizes = [run.size for run in runs if run.lr == lr]
        if len(sizes) >= max(MIN_PER_RATE, family.num_slopes + 2) and len(set(sizes)) > family.num_slopes:
            rates.append(lr)
    return rates


def _fits(runs: Sequence[Observation], key: str, family: Family, mode: Mode, seed: int) -> dict[float, Fit]:
    """By rate, or one at rate 0 for all."""
    fits = {}
    for lr in rates_alone(runs, family) if mode == "per rate" else [0.0]:
        members = [run for run in runs if lr in (0.0, run.lr)]
        x_NC, low_N, high_N, prior = _problem(members, key, family, mode, _center(runs))
        _, units_N = np.unique([f"{run.size} {run.seed}" for run in members], return_inverse=True)
        fits[lr] = fit_runs(x_NC, low_N, high_N, prior=prior, units_N=units_N, seed=seed)
    return fits


def _problem(
    runs: Sequence[Observation], key: str, family: Family, mode: Mode, center_lr: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Prior]:
    points = [(run.width, run.depth) for run in runs]
    readings = [run.readings.get(key, Reading(-math.inf, math.inf)) for run in runs]
    low_N, high_N = (np.array(ends) for ends in zip(*readings, strict=True))
    if mode == "joint":
        x_NC = _joint_rows(family, points, [run.lr for run in runs], center_lr)
        return x_NC, low_N, high_N, size_prior(family, 2 + family.num_slopes, CURVATURE)
    return family.features(points), low_N, high_N, size_prior(family, 0, CURVATURE)


def _joint_rows(family: Family, points: Sequence[Point], lrs: Sequence[float], center_lr: float) -> np.ndarray:
    """Size features, then r, r^2, and r times each slope's coordinate; r = log10 lr, centred."""
    size_NC = family.features(points)
    r_N1 = (np.log10(lrs) - center_lr)[:, None]
    return np.concatenate([size_NC, r_N1, r_N1**2, r_N1 * size_NC[:, 1 : 1 + family.num_slopes]], axis=1)


def _center(runs: Sequence[Observation]) -> float:
    rates = np.array(sorted({run.lr for run in runs}))
    return float(np.log10(rates[[0, -1]]).mean())


def estimate(
    runs: Sequence[Observation], key: str, family: Family, mode: Mode, at: Sequence[tuple[Point, float]]
) -> np.ndarray:
    """The signal in decades at each (size, rate), by the estimate alone: no draws, so it is quick.

    In the form `per rate` the rates must be among those of `runs`. Raises ValueError where too few runs determine it.
    """
    center = _center(runs)
    values = np.empty(len(at))
    for lr in {lr for _, lr in at} if mode == "per rate" else {0.0}:
        members = [run for run in runs if lr in (0.0, run.lr)]
        x_NC, low_N, high_N, prior = _problem(members, key, family, mode, center)
        coef_C = fit_map(x_NC, low_N, high_N, prior=prior).coef_BC[0]
        for i, (point, rate) in enumerate(at):
            if lr in (0.0, rate):
                row = family.features([point]) if lr else _joint_rows(family, [point], [rate], center)
                values[i] = row[0] @ coef_C
    return values


def left_out(runs: Sequence[Observation], key: str, mode: Mode, rates: Sequence[float]) -> float:
    """RMS error in decades at values observed at `rates`, each size left out once; infinite where none can be."""
    squares = []
    for size in dict.fromkeys(run.size for run in runs):
        rest, out = ([run for run in runs if (run.size == size) is own] for own in (False, True))
        seen = [run for run in out if run.readings[key].low == run.readings[key].high and run.lr in rates]
        try:
            family = find_family([(run.width, run.depth) for run in rest])
            guesses = estimate(rest, key, family, mode, [((run.width, run.depth), run.lr) for run in seen])
        except ValueError:  # what is left is no family, or too little: no error is known
            return math.inf
        squares += [(guess - run.readings[key].low) ** 2 for guess, run in zip(guesses, seen, strict=True)]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf


def _largest_covered(runs: Sequence[Observation], key: str, mode: Mode, seed: int) -> float:
    """Share of the largest size's runs inside the interval that the smaller sizes give them."""
    largest = max(runs, key=lambda run: run.num_params).size
    rest, out = ([run for run in runs if (run.size == largest) is own] for own in (False, True))
    try:
        family = find_family([(run.width, run.depth) for run in rest])
        fits = _fits(rest, key, family, mode, seed)
    except ValueError:
        return math.nan
    center, inside = _center(rest), []
    for run in out:
        reading = run.readings[key]
        if reading.low != reading.high or (mode == "per rate" and run.lr not in fits):
            continue
        x_C = _problem([run], key, family, mode, center)[0][0]
        bounds = interval_of(0.0, predict_draws(fits[run.lr if mode == "per rate" else 0.0], x_C))
        inside.append(bounds.low <= reading.low <= bounds.high)
    return float(np.mean(inside)) if inside else math.nan


def _inside(lr: float, rates: Sequence[float]) -> None:
    if not rates[0] * (1 - 1e-9) <= lr <= rates[-1] * (1 + 1e-9):
        raise ValueError(
            f"rate {lr:g} lies outside the rates trained, {rates[0]:g} to {rates[-1]:g}; train it at small sizes first"
        )


def _neighbours(lr: float, rates: Sequence[float]) -> tuple[float, float, float]:
    """The rates trained around `lr` and the share of the way from the lower to the upper, in logarithms."""
    _inside(lr, rates)
    above = min(int(np.searchsorted(rates, lr * (1 - 1e-9))), len(rates) - 1)
    below = max(0, above - 1) if rates[above] > lr * (1 + 1e-9) else above
    low, high = rates[below], rates[above]
    return low, high, 0.0 if low == high else math.log(lr / low) / math.log(high / low)
