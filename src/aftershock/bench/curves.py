"""From tallies to numbers: precision, recall, false alarms and the area under the curve, with bootstrap intervals.

Legend: R runs, S settings (thresholds), K leads, B bootstrap samples, M targets. Runs are what is resampled: every
figure is computed from sums over runs weighted by how often each was drawn, and the weights are the same for all
detectors, so that two of them can be compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftershock.bench.scoring import BUDGET, LEADS, Tally, Target, catchable

FALSE_PER = 10_000
"""Healthy steps to which false alarms are scaled."""
SAMPLES = 1000
"""Bootstrap samples: the ends of a 95 % interval then rest on 25 samples each."""


class Field(NamedTuple):
    """What there is to find in R runs: `targets_RK` that can be caught by lead, `healthy_R` steps."""

    targets_RK: np.ndarray
    healthy_R: np.ndarray


class Counts(NamedTuple):
    """What a detector made of R runs, at S settings."""

    caught_RSK: np.ndarray
    false_RSK: np.ndarray
    quiet_RS: np.ndarray


class Points(NamedTuple):
    """The curve: a point for each setting and lead, of B samples of the runs. Precision is 0 where nothing alarmed."""

    precision_BSK: np.ndarray
    recall_BSK: np.ndarray
    false_rate_BS: np.ndarray


def field_of(targets: Sequence[Sequence[Target]], healthy: Sequence[int]) -> Field:
    """The field of runs with these targets and numbers of healthy steps."""
    by_lead = [[sum(catchable(target, lead) for target in run) for lead in LEADS] for run in targets]
    return Field(np.array(by_lead, dtype=np.float64), np.array(healthy, dtype=np.float64))


def counts_of(tallies: Sequence[Sequence[Tally]]) -> Counts:
    """Counts of `tallies[run][setting]`."""
    return Counts(
        np.array([[t.caught for t in run] for run in tallies], dtype=np.float64),
        np.array([[t.false for t in run] for run in tallies], dtype=np.float64),
        np.array([[t.quiet_false for t in run] for run in tallies], dtype=np.float64),
    )


def once(num_runs: int) -> np.ndarray:
    """Weights [1, R] that take every run once: the figures themselves."""
    return np.ones((1, num_runs))


def resampled(num_runs: int, *, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Weights [B, R]: how often each run is drawn in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=samples).astype(np.float64)


def points(counts: Counts, field: Field, weights_BR: np.ndarray) -> Points:
    """Precision, recall and false alarms per 10,000 healthy steps at each setting, for each sample of the runs."""
    caught = np.einsum("br,rsk->bsk", weights_BR, counts.caught_RSK)
    false = np.einsum("br,rsk->bsk", weights_BR, counts.false_RSK)
    targets = (weights_BR @ field.targets_RK)[:, None, :]
    healthy = (weights_BR @ field.healthy_R)[:, None]
    return Points(
        _share(caught, caught + false),
        _share(caught, np.broadcast_to(targets, caught.shape)),
        FALSE_PER * _share(weights_BR @ counts.quiet_RS, np.broadcast_to(healthy, (*caught.shape[:2],))),
    )


def area(precision_BS: np.ndarray, recall_BS: np.ndarray) -> np.ndarray:
    """Area [B] under the precision-recall curve through S points, from recall 0 to the highest that is reached.

    At each recall the best precision of any setting with that recall or more counts (the interpolated precision of
    information retrieval), so one point makes a rectangle, and settings that are worse on both counts do not matter.

    >>> area(np.array([[1.0, 0.5]]), np.array([[0.5, 1.0]])).tolist()
    [0.75]
    """
    order = np.argsort(recall_BS, axis=1, kind="stable")
    recall = np.take_along_axis(recall_BS, order, axis=1)
    precision = np.take_along_axis(precision_BS, order, axis=1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (np.diff(recall, axis=1, prepend=0.0) * best).sum(axis=1)


def areas(curve: Points) -> np.ndarray:
    """Area [B, K] by lead."""
    return np.stack([area(curve.precision_BSK[:, :, k], curve.recall_BSK[:, :, k]) for k in range(len(LEADS))], axis=1)


def areas_in_budget(curve: Points) -> np.ndarray:
    """Area [B, K] under the settings that keep to `BUDGET` false alarms; others count as never alarming."""
    usable = (curve.false_rate_BS <= BUDGET)[:, :, None]
    return areas(curve._replace(recall_BSK=np.where(usable, curve.recall_BSK, 0.0)))


def recall_in_budget(curve: Points) -> np.ndarray:
    """Highest recall [B, K] of a setting that keeps to `BUDGET` false alarms; 0 where none does."""
    usable = (curve.false_rate_BS <= BUDGET)[:, :, None]
    return np.where(usable, curve.recall_BSK, 0.0).max(axis=1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap samples, without those in which the figure has no value."""
    known = samples[np.isfinite(samples)]
    if not len(known):
        return (float("nan"), float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return (float(low), float(high))


def weighted_medians(values_M: np.ndarray, runs_M: np.ndarray, weights_BR: np.ndarray) -> np.ndarray:
    """Median [B] of values that each belong to a run, a run counting as often as it was drawn; nan of nothing."""
    if not len(values_M):
        return np.full(len(weights_BR), np.nan)
    order = np.argsort(values_M, kind="stable")
    upto = np.cumsum(weights_BR[:, runs_M[order]], axis=1)
    middle = np.argmax(2 * upto >= upto[:, -1:], axis=1)
    return np.where(upto[:, -1] > 0, values_M[order][middle], np.nan)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
