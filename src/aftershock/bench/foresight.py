"""Fits the live forecast on the corpus and judges it: on other seeds, and on specimens that it has never seen.

A row is a step at risk: after 20 finite losses, in no labelled spike, and what came within k steps is known.
y says whether an onset came in the steps t + 1 .. t + k. For k above 8 every k / 8-th step is a row: neighbours hold
nearly the same. Ours and the baselines go through the same fit and calibration; only the features differ.
Legend: N rows, C features, R runs, B bootstrap samples. Must not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from typing import NamedTuple

import numpy as np

from aftershock.bench.corpus import Progress, Signal, Trace
from aftershock.bench.curves import interval, once, resampled
from aftershock.bench.precursors import Run, Scored
from aftershock.bench.precursors_record import Forecaster, Reliable, Share
from aftershock.bench.records import rounded
from aftershock.forecast.hazard import (
    SETS,
    SHAPES,
    SHIPPED,
    SLOTS,
    WITHIN,
    Fitted,
    Hazard,
    Line,
    Slot,
    Track,
    calibrated,
    feature_names,
    fit_line,
)
from aftershock.forecast.logistic import choose_penalty, log_loss, probability
from aftershock.lab.workers import worker_pool

SIGNAL_OF: dict[Slot, str] = {
    "loss": "loss/train/mean",
    "gradient": "grad/all/norm",
    "update": "update/all/norm",
    "rms_t_share": "optim/max/rms_t_share",
    "log_z": "output/log_z",
    "logit": "attention/max/logit",
}
BASELINES: dict[str, tuple[str, ...]] = {
    "robust z of the loss": ("loss/now",),
    "robust z of the gradient norm": ("gradient/now",),
    "robust z of the update norm": ("update/now",),
}
"""Forecasts from one feature: what a threshold on a robust z would be as a probability."""
GRADIENT_ALONE = "robust z of the gradient norm"
ALARM_WITHIN = 8
ALARMS = SHIPPED
"""Forecasts that are also read as alarms."""
FOLDS = 4
"""Groups of specimens by which the penalty is chosen, and within which calibration finds rows that are new to a fit."""
BINS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0001)
"""Edges of the reliability table."""
EVERY = {k: max(1, k // 8) for k in WITHIN}


class Steps(NamedTuple):
    """All features [N, C] of a run's steps from the first on, which slots it has, and the steps to the next onset
    [N]; -1 where a step is not at risk, inf where none came."""

    x_NC: np.ndarray
    there: frozenset[Slot]
    ahead_N: np.ndarray


class Rows(NamedTuple):
    """Rows of several runs: features, outcome, number of the run, number of the specimen."""

    x_NC: np.ndarray
    y_N: np.ndarray
    run_N: np.ndarray
    specimen_N: np.ndarray


class Forecasts(NamedTuple):
    """The model of all specimens, which is what ships, and those without each specimen; log-odds [N] of the scoring
    rows by either; `base`, the share of tuning rows with an onset; `usual`, their mean features."""

    line: Fitted
    apart: dict[int, Fitted]
    penalty: float
    base: float
    usual: tuple[float, ...]
    rows: Rows
    seen_N: np.ndarray
    unseen_N: np.ndarray


NAMES = feature_names(SLOTS)


def steps_of(signals: Mapping[str, Signal], trace: Trace) -> Steps:
    """Features of every step, by the tracks that a live forecast uses, and how far the next onset was."""
    present: frozenset[Slot] = frozenset(slot for slot in SLOTS if SIGNAL_OF[slot] in signals)
    values = {
        slot: dict(zip(signals[SIGNAL_OF[slot]].steps, signals[SIGNAL_OF[slot]].values, strict=True))
        for slot in present
    }
    tracks = {slot: Track(slot) for slot in SLOTS}
    blank = [0.0] * len(SHAPES)
    rows, armed = [], np.zeros(trace.num_steps, dtype=bool)
    for step in range(trace.num_steps):
        for slot, series in values.items():
            if step in series:
                tracks[slot].add(series[step])
        rows.append([value for slot in SLOTS for value in (tracks[slot].features() if slot in present else blank)])
        armed[step] = tracks["loss"].armed
    ahead = np.full(trace.num_steps, np.inf)
    for target in reversed(trace.targets):
        ahead[: target.onset] = target.onset - np.arange(target.onset)
    for target in trace.targets:
        ahead[target.onset : target.end + 1] = -1
    ahead[~armed] = -1
    return Steps(np.array(rows), present, ahead)


def rows_of(
    steps: Sequence[Steps], specimens: Sequence[int], chosen: Sequence[int], features: Sequence[str], k: int
) -> Rows:
    """Rows of the `chosen` runs that have all `features`, for one k."""
    columns = [NAMES.index(name) for name in features]
    needed = {name.split("/")[0] for name in features}
    parts = []
    for run in chosen:
        one = steps[run]
        if not one.there.issuperset(needed):
            continue
        number = len(one.ahead_N)
        known = (one.ahead_N <= k) | (np.arange(number) + k < number)
        at = np.flatnonzero((one.ahead_N > 0) & known & (np.arange(number) % EVERY[k] == 0))
        parts.append((one.x_NC[at][:, columns], one.ahead_N[at] <= k, np.full(len(at), run)))
    x_NC, y_N, run_N = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Rows(x_NC, y_N, run_N, np.asarray(specimens)[run_N])


def fit_and_forecast(tuning: Rows, held: Rows) -> Forecasts:
    """The calibrated model of the tuning rows, its log-odds of the held ones, and those of models without the
    specimen in question. Every calibration is on rows whose specimen the fit had not seen."""
    penalty = choose_penalty(tuning.x_NC, tuning.y_N, tuning.specimen_N % FOLDS)
    line = _calibrated_fit(tuning, penalty)
    apart, unseen_N = {}, np.empty(len(held.y_N))
    for specimen in np.unique(np.concatenate([tuning.specimen_N, held.specimen_N])).tolist():
        mine = held.specimen_N == specimen
        apart[specimen] = _calibrated_fit(_where(tuning, tuning.specimen_N != specimen), penalty)
        unseen_N[mine] = apart[specimen].log_odds(held.x_NC[mine])
    usual = tuple(tuning.x_NC.mean(axis=0).tolist())
    return Forecasts(line, apart, penalty, float(tuning.y_N.mean()), usual, held, line.log_odds(held.x_NC), unseen_N)


def _calibrated_fit(rows: Rows, penalty: float) -> Fitted:
    out_N = np.empty(len(rows.y_N))
    order = {specimen: place % FOLDS for place, specimen in enumerate(np.unique(rows.specimen_N).tolist())}
    fold_N = np.array([order[s] for s in rows.specimen_N.tolist()])
    for fold in range(FOLDS):
        inside = fold_N == fold
        if inside.any():
            out_N[inside] = fit_line(rows.x_NC[~inside], rows.y_N[~inside], penalty=penalty).log_odds(rows.x_NC[inside])
    return calibrated(fit_line(rows.x_NC, rows.y_N, penalty=penalty), out_N, rows.y_N)


def _where(rows: Rows, chosen_N: np.ndarray) -> Rows:
    return Rows(*(array[chosen_N] for array in rows))


# ------------------------------------------------------------------------------------------------------- judging


class Judged(NamedTuple):
    """The models to ship, their figures, and by run the log-odds of an onset within `ALARM_WITHIN` steps, of each
    forecast of `ALARMS`, from a model that had no run of its specimen: scores to set beside indicators'."""

    hazards: list[Hazard]
    forecasters: list[Forecaster]
    scored: list[Scored]


def judge_forecasts(
    runs: Sequence[Run],
    *,
    tuning_seeds: Sequence[int],
    sets: Sequence[tuple[Slot, ...]] = SETS,
    processes: int = 2,
    on_progress: Progress | None = None,
) -> Judged:
    """Fit, calibrate and judge a model for each of `sets` of signals and each k, and the baselines beside them."""
    names = list(dict.fromkeys(run.trace.specimen for run in runs))
    specimens = [names.index(run.trace.specimen) for run in runs]
    steps = [steps_of(run.signals, run.trace) for run in runs]
    kinds = [run.trace.kind for run in runs]
    halves = [[i for i, run in enumerate(runs) if (run.trace.seed in tuning_seeds) == first] for first in (True, False)]
    sets = [signals for signals in sets if _both_halves(steps, halves, signals)]
    wanted = {live_name(signals): feature_names(signals) for signals in sets} | BASELINES
    jobs = [(name, k) for name in wanted for k in WITHIN]
    found: dict[tuple[str, int], Forecasts] = {}
    with worker_pool(processes) as pool:
        futures = {}
        for name, k in jobs:
            tuning, held = (rows_of(steps, specimens, chosen, wanted[name], k) for chosen in halves)
            futures[pool.submit(fit_and_forecast, tuning, held)] = (name, k)
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            if on_progress is not None:
                on_progress(len(found), len(jobs))
    forecasters = [
        _forecaster(name, wanted[name], k, found[name, k], found[GRADIENT_ALONE, k], kinds) for name, k in jobs
    ]
    scored = [_alarm_scores(one, specimen, found) for one, specimen in zip(steps, specimens, strict=True)]
    return Judged([_hazard(signals, found) for signals in sets if signals in SHIPPED], forecasters, scored)


def _both_halves(steps: Sequence[Steps], halves: Sequence[Sequence[int]], signals: Sequence[Slot]) -> bool:
    """Whether runs of either half have these signals."""
    return all(any(steps[i].there.issuperset(signals) for i in half) for half in halves)


def live_name(signals: Sequence[Slot]) -> str:
    """What the forecast from these signals is called in the record."""
    return "live forecast: " + ", ".join(signals)


def _alarm_scores(one: Steps, specimen: int, found: Mapping[tuple[str, int], Forecasts]) -> Scored:
    scored: Scored = {}
    for signals in ALARMS:
        if one.there.issuperset(signals) and (live_name(signals), ALARM_WITHIN) in found:
            columns = [NAMES.index(name) for name in feature_names(signals)]
            line = found[live_name(signals), ALARM_WITHIN].apart[specimen]
            log_odds_N = line.log_odds(one.x_NC[:, columns])
            armed_N = one.ahead_N != -1
            start = int(np.argmax(armed_N)) if armed_N.any() else len(armed_N)
            log_odds_N[:start] = -np.inf
            scored[live_name(signals), "level"] = (np.arange(len(log_odds_N)), log_odds_N.astype(np.float32))
    return scored


def _hazard(signals: tuple[Slot, ...], found: Mapping[tuple[str, int], Forecasts]) -> Hazard:
    fits = [found[live_name(signals), k] for k in WITHIN]
    lines = tuple(Line(fit.line.intercept, tuple(fit.line.coef_C.tolist())) for fit in fits)
    return Hazard(signals, fits[0].usual, tuple(fit.base for fit in fits), lines)


def _forecaster(
    name: str, features: Sequence[str], k: int, fit: Forecasts, gradient: Forecasts, kinds: Sequence[str]
) -> Forecaster:
    rows = fit.rows
    flat_N = np.full(len(rows.y_N), math.log(fit.base / (1 - fit.base)))
    other_N = gradient.unseen_N[np.isin(gradient.rows.run_N, np.unique(rows.run_N))]
    assert len(other_N) == len(rows.y_N), "every run has a gradient norm"
    sums = _Sums(rows)
    by_kind = {}
    for kind in ("spontaneous", "planted"):
        inside = np.array([kinds[run] == kind for run in rows.run_N.tolist()])
        if inside.any():
            by_kind[kind] = _Sums(_where(rows, inside)).skill(log_loss, fit.unseen_N[inside], flat_N[inside])
    return Forecaster(
        name=name,
        signals=sorted({feature.split("/")[0] for feature in features}, key=lambda s: [*map(str, SLOTS)].index(s)),
        k=k,
        steps=len(rows.y_N),
        onsets=int(rows.y_N.sum()),
        brier=_digits(float(_brier(fit.unseen_N, rows.y_N).mean())),
        brier_skill=sums.skill(_brier, fit.seen_N, flat_N),
        log_skill=sums.skill(log_loss, fit.seen_N, flat_N),
        unseen_brier_skill=sums.skill(_brier, fit.unseen_N, flat_N),
        unseen_log_skill=sums.skill(log_loss, fit.unseen_N, flat_N),
        gain_over_gradient=sums.gain(log_loss, fit.unseen_N, other_N, flat_N),
        by_kind=by_kind,
        reliability=_reliability(fit.seen_N, rows, sums),
        unseen_reliability=_reliability(fit.unseen_N, rows, sums),
    )


Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores [N] of log-odds and outcomes: low is good."""


def _brier(log_odds_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    return (probability(log_odds_N) - y_N) ** 2


class _Sums:
    """Scores summed by run, and resampled over runs."""

    def __init__(self, rows: Rows) -> None:
        self._y_N = rows.y_N
        self.runs, self._at_N = np.unique(rows.run_N, return_inverse=True)
        self.weights_BR = np.concatenate([once(len(self.runs)), resampled(len(self.runs))])

    def by_run(self, value_N: np.ndarray) -> np.ndarray:
        return np.bincount(self._at_N, weights=value_N, minlength=len(self.runs))

    def skill(self, score: Score, log_odds_N: np.ndarray, base_N: np.ndarray) -> Share:
        """1 - score / score of the base."""
        return _share(1 - self._total(score, log_odds_N) / self._total(score, base_N))

    def gain(self, score: Score, log_odds_N: np.ndarray, other_N: np.ndarray, base_N: np.ndarray) -> Share:
        """Skill less that of the other forecast."""
        base_B = self._total(score, base_N)
        return _share((self._total(score, other_N) - self._total(score, log_odds_N)) / base_B)

    def _total(self, score: Score, log_odds_N: np.ndarray) -> np.ndarray:
        return self.weights_BR @ self.by_run(score(log_odds_N, self._y_N))


def _reliability(log_odds_N: np.ndarray, rows: Rows, sums: _Sums) -> list[Reliable]:
    p_N, found = probability(log_odds_N), []
    for low, high in itertools.pairwise(BINS):
        inside_N = (p_N >= low) & (p_N < high)
        if not inside_N.any():
            continue
        happened_B = sums.weights_BR @ sums.by_run(inside_N & rows.y_N)
        count_B = sums.weights_BR @ sums.by_run(inside_N.astype(np.float64))
        share_B = np.divide(happened_B, count_B, out=np.full(len(count_B), np.nan), where=count_B > 0)
        claimed = _digits(float(p_N[inside_N].mean()))
        found.append(Reliable(low, min(high, 1.0), int(inside_N.sum()), claimed, _share(share_B)))
    return found


def _share(value_B: np.ndarray) -> Share:
    """The figure itself comes first, then its samples."""
    low, high = interval(value_B[1:])
    return Share(rounded(float(value_B[0])), rounded(low), rounded(high))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
