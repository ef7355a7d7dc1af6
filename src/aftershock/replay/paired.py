"""What the arms of many spikes say together: paired differences, and the hazard of the next spike.

Pure numbers, of `replay.arms` or read from a file. Must not import torch.
Legend: C classes, G runs of a class, S spikes of a run, D draws, N values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from aftershock.replay.response import TINY, wilson

LIMIT = math.log(1e6)
"""A log ratio counts as no more than this: an arm that was lost is a million times worse, and a mean stays a number."""
LEAST_RUNS = 5
"""Runs to resample; of fewer there is no interval, since few draws differ."""
RESAMPLES = 2000

Word = Literal["lower", "higher", ""]


class Arm(NamedTuple):
    """One arm as it ended, after `steps` accepted steps from the snapshot.

    - `spiked`: whether a spike began before the recorded one's end, or the loss rose half as high over the calm band
    - `again`: the step at which another spike begins after that end; None where none does
    - `loss`: median of the readings at the end; inf where one of them is not finite
    - `training`: median training loss of as many last steps, likewise. Where a model learns its batches by heart the
      held-out loss is that of an overfitted model, and this one says more
    - `distance`: 2-norm from the weights at the snapshot to those at the end
    """

    steps: int
    spiked: bool
    again: int | None
    loss: float
    training: float
    distance: float


class Pair(NamedTuple):
    """One spike's difference of two arms. Spikes of one `run` are not independent, so runs are resampled."""

    run: str
    difference: float


class Paired(NamedTuple):
    """A statistic of differences with its 95 % interval, nan of fewer than 5 runs; of `num` spikes in `num_runs`."""

    value: float
    low: float
    high: float
    num: int
    num_runs: int

    @property
    def word(self) -> Word:
        """Where the first arm lies against the second, said only when the interval excludes 0."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else ""


class Hazard(NamedTuple):
    """`count` of `total` arms spiked again; `share` with Wilson's 95 % interval, nan of none."""

    count: int
    total: int
    share: float
    low: float
    high: float


Spikes = Iterable[tuple[str, Mapping[str, Arm]]]
"""Of each spike its run, and its arms by name."""


def pairs(spikes: Spikes, arm: str, minus: str, *, of: Callable[[Arm, Arm], float] | None = None) -> list[Pair]:
    """`of(arm, minus)`, by default `log_ratio` of their losses, for each spike that has both arms.

    Example:
        paired(pairs(spikes, "push", "skip")).word
    """
    measure = log_ratio if of is None else of
    return [Pair(run, measure(arms[arm], arms[minus])) for run, arms in spikes if arm in arms and minus in arms]


def log_ratio(arm: Arm, minus: Arm) -> float:
    """ln of the ratio of their losses: negative where `arm` ended lower. 0 where both are lost; within +-13.8.

    Raises ValueError for a loss below 0, which has no ratio.
    """
    return _log_ratio(arm.loss, minus.loss)


def log_training_ratio(arm: Arm, minus: Arm) -> float:
    """As `log_ratio`, of the training losses."""
    return _log_ratio(arm.training, minus.training)


def spiked_again(arm: Arm, minus: Arm) -> float:
    """1 where only `arm` spiked again, -1 where only the other did, else 0: its mean is a difference of hazards."""
    return float(arm.again is not None) - float(minus.again is not None)


def paired(found: Sequence[Pair], *, of: Literal["median", "mean"] = "median") -> Paired:
    """Median or mean of the differences; the interval resamples runs, with all spikes of each (cluster bootstrap).

    Percentiles of 2,000 draws of a fixed generator. nan of no spikes.

    >>> paired([Pair(str(seed), -0.5) for seed in range(6)])
    Paired(value=-0.5, low=-0.5, high=-0.5, num=6, num_runs=6)
    """
    return pooled([found], of=of)


def pooled(classes: Sequence[Sequence[Pair]], *, of: Literal["median", "mean"] = "median") -> Paired:
    """The mean over classes of each class's statistic, so that no class counts for more by having more spikes.

    Runs are resampled within their class. No interval where a class has fewer than 5 runs; nan of no class, or of one
    without a spike.
    """
    runs_GS = [_by_run(found) for found in classes]
    num, num_runs = sum(map(len, classes)), sum(map(len, runs_GS))
    if not classes or not all(classes):
        return Paired(math.nan, math.nan, math.nan, num, num_runs)
    value = float(np.mean([_statistic(of, run_GS.reshape(1, -1)) for run_GS in runs_GS]))
    if min(map(len, runs_GS)) < LEAST_RUNS:
        return Paired(value, math.nan, math.nan, num, num_runs)
    random = np.random.default_rng(0)
    draws_CD = [_statistic(of, _drawn(run_GS, random)) for run_GS in runs_GS]
    low, high = np.quantile(np.mean(draws_CD, axis=0), [0.025, 0.975])
    return Paired(value, float(low), float(high), num, num_runs)


def hazard(arms: Iterable[Arm]) -> Hazard:
    """Share of these arms that spiked again, after the end of the spike and before that of the arm.

    Wilson (1927). It takes the arms as independent: with several spikes of one run it is too narrow.
    """
    again = [arm.again is not None for arm in arms]
    if not again:
        return Hazard(0, 0, math.nan, math.nan, math.nan)
    return Hazard(sum(again), len(again), sum(again) / len(again), *wilson(sum(again), len(again)))


def _log_ratio(loss: float, minus: float) -> float:
    for one in (loss, minus):
        if one < 0 or math.isnan(one):
            raise ValueError(f"losses are compared by their ratio, and {one} has none; give losses of 0 or more")
    if loss == minus:
        return 0.0
    difference = math.log(max(loss, TINY)) - math.log(max(minus, TINY))
    return max(-LIMIT, min(LIMIT, difference))


def _by_run(found: Sequence[Pair]) -> np.ndarray:
    """One row a run, filled up with nan."""
    runs: dict[str, list[float]] = {}
    for run, difference in found:
        runs.setdefault(run, []).append(difference)
    longest = max(map(len, runs.values()), default=0)
    return np.array([values + [math.nan] * (longest - len(values)) for values in runs.values()])


def _drawn(run_GS: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[D, G S]: the spikes of as many runs as there are, drawn with replacement."""
    return run_GS[random.integers(len(run_GS), size=(RESAMPLES, len(run_GS)))].reshape(RESAMPLES, -1)


def _statistic(of: Literal["median", "mean"], values_DN: np.ndarray) -> np.ndarray:
    return np.nanmedian(values_DN, axis=1) if of == "median" else np.nanmean(values_DN, axis=1)
