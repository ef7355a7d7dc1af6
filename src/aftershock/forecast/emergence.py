"""Forecasts of benchmark scores at more compute: fitted below a cut-off, scored above it, with an interval.

The forecast of a curve is a weighted mean of three families, each moved by what it misses on runs of the same model or
family. How the families weigh, and how wide the interval is, is decided by leaving the last runs out again and again
inside the range of the fit; nothing above the cut-off is looked at but to score.

Legend: N runs below the cut-off, M places to predict at, B resamples, J members, F folds. x is log10 of compute, y the
score as a share of its range. Must not import torch or scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftershock.forecast.curves import FAMILIES, fit_curve
from aftershock.forecast.jumps import Jump, find_jump
from aftershock.forecast.mixture import TaskPoints, fit_mixture
from aftershock.forecast.rivals import Rivalry, against_rivals, model_counts
from aftershock.forecast.scores import ScoreTable, TaskScores

LEVEL = 0.9
"""Nominal coverage of the interval."""
NORMAL_QUANTILE = 1.6449
"""Of a normal at `LEVEL`: the interval is never narrower than that many deviations."""
MIN_RUNS, MIN_SIZES = 8, 3
"""Runs, and different values of compute, that a fit needs below the cut-off."""
FOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Inner cut-offs: quantiles of x below the cut-off."""
MIN_FOLD_RUNS, MIN_FOLD_HELD_OUT = 6, 2
FIT_SHARE = 0.8
"""Share of the runs below the cut-off, where none is given."""
MEMBERS = {"adjusted_logit": False, "steady_sigmoid": True, "broken_power_law": True}
"""Families of the forecast -> whether the mean over resamples stands for the fit: it tames those that can jump."""
GROUP_VARIANCE, GROUP_DECADES = 2.0, 2.0
"""How much more a group's effect varies than a run's noise, and the distance over which it fades by a factor e."""
RIVALS = ("line", "sigmoid")
"""Families that a forecast must not fall behind: what anybody would fit."""
MIXTURE_TASKS = 3
"""Curves in a table from which on a mixture of shared ones is fitted."""
SCORE_NOISE = 0.005
"""A deviation that every score has, as a share of the range: keeps weights and intervals finite."""
SAME = 1e-9
"""Decades within which a run lies at the cut-off and not above: two libraries' log10 differ by less."""
_INNER_RESAMPLES = 40
_TRACE = 1e-3
"""Weight that every run keeps in a resample, so that no resample is without two values of compute."""


class TaskFit(NamedTuple):
    """What a fit says of one curve. Scores, errors, `forecast`, `low` and `high` are in the metric's own unit.

    `error` is the root mean square error above the cut-off by family, of the mixture and of the `forecast` (nan without
    runs above it). `weight` is each member's in the forecast and `best` the heaviest. The forecast is for `flops`, with
    a `LEVEL` interval; `actual` is the score of the run there (nan when there is none). `covered` is the share of runs
    above the cut-off inside their intervals. `versus` sets it against the better of `RIVALS`; None without such runs.
    """

    label: str
    num_runs: int
    num_held_out: int
    cutoff: float
    error: dict[str, float]
    weight: dict[str, float]
    best: str
    flops: float
    forecast: float
    low: float
    high: float
    actual: float
    covered: float
    versus: Rivalry | None
    jump: Jump | None
    sentence: str


class ScoreFits(NamedTuple):
    """The fits in order of the table, a sentence for every curve that could not be fitted, and the cut-off [FLOPs]."""

    fits: list[TaskFit]
    refused: list[str]
    cutoff: float


class _Runs(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    group: np.ndarray
    model: np.ndarray

    def where(self, chosen: np.ndarray) -> _Runs:
        return _Runs(*(values[chosen] for values in self))


class _Prediction(NamedTuple):
    """The members at M places: `moved_JM` with the shift of the groups, `plain_JM` without, `members_JBM` resampled.

    `miss_JN` is what each misses the known runs by, without the shift.
    """

    moved_JM: np.ndarray
    plain_JM: np.ndarray
    miss_JN: np.ndarray
    members_JBM: np.ndarray

    def mean(self, weight_J: np.ndarray) -> np.ndarray:
        return weight_J @ self.moved_JM

    def deviation(self, weight_J: np.ndarray) -> np.ndarray:
        """Noise of a run, and disagreement of resamples and members, as one deviation at each place."""
        num_runs = self.miss_JN.shape[1]
        noise = float(((weight_J @ self.miss_JN) ** 2).sum()) / max(num_runs - 2, 1)
        center_M = weight_J @ self.plain_JM
        spread_M = weight_J @ ((self.members_JBM - center_M) ** 2).mean(axis=1)
        return np.sqrt(noise + spread_M + SCORE_NOISE**2)


class _Fold(NamedTuple):
    prediction: _Prediction
    truth_M: np.ndarray


def fit_scores(
    table: ScoreTable,
    *,
    cutoff: float | None = None,
    at: float | None = None,
    tasks: Sequence[str] = (),
    num_resamples: int = 200,
    seed: int = 0,
) -> ScoreFits:
    """Fit every curve of a table on the runs with compute up to `cutoff` [FLOPs], and score it on those above.

    Without a cut-off, four fifths of the table's runs lie below it. The forecast is made for compute `at`, by default
    that of each curve's largest run. `tasks` chooses curves by task or label. Deterministic in `seed`.

    A run's group (its model where a curve has several checkpoints, else its family) moves the forecast by what its
    members below the cut-off were missed by; a run of a new group gets none of that, and neither does `at`. The single
    families are given without it, as a rival would have them. Resamples draw models, not rows.

    The interval is forecast +- q deviations, where a deviation unites the noise of runs, the spread of resamples and
    that of the members; q is the `LEVEL` quantile of |error| / deviation over the inner folds, half from the curve
    itself and half from all curves of the table, and at least a normal's. It covers a new run of a typical family.

    >>> from aftershock.forecast.scores import read_scores
    >>> fit_scores(read_scores("scores.csv"), cutoff=8.4e22).fits  # doctest: +SKIP

    Raises ValueError for a cut-off or `at` that is no positive number, an unknown task, no run above the cut-off
    where no `at` is given either, and when no curve can be fitted, with the reasons.
    """
    curves = choose_curves(table, tasks)
    for name, value in (("cutoff", cutoff), ("at", at)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number of FLOPs, got {value}")
    x_cut = usual_cutoff(curves) if cutoff is None else math.log10(cutoff) + SAME
    fitting, refused = [], []
    for curve in curves:
        reason = why_not(curve, x_cut)
        if reason:
            refused.append(f"{curve.label}: {reason}")
        else:
            fitting.append(curve)
    if not fitting:
        raise ValueError(f"no curve can be fitted: {'; '.join(refused)}")
    if at is None and not any((curve.log_flops_N > x_cut).any() for curve in fitting):
        raise ValueError(f"no run has more compute than the cut-off {10**x_cut:.3g}; lower it, or say at which compute")
    mixture = _mixture_errors(fitting, x_cut)
    done = [_fit_one(curve, x_cut, at, num_resamples, seed) for curve in fitting]
    pooled = _quantile(np.concatenate([one.score_S for one in done]))
    return ScoreFits(
        [_task_fit(curve, x_cut, one, pooled, error) for curve, one, error in zip(fitting, done, mixture, strict=True)],
        refused,
        _flops(x_cut),
    )


def choose_curves(table: ScoreTable, tasks: Sequence[str]) -> list[TaskScores]:
    """The curves of these tasks or labels, all without any. Raises ValueError for a name that is neither."""
    known = {name for curve in table.curves for name in (curve.task, curve.label)}
    for name in tasks:
        if name not in known:
            raise ValueError(f"no task {name!r}; the file has {', '.join(sorted({c.task for c in table.curves}))}")
    return [curve for curve in table.curves if not tasks or curve.task in tasks or curve.label in tasks]


def usual_cutoff(curves: Sequence[TaskScores]) -> float:
    """log10 of the compute that `FIT_SHARE` of the different runs of all curves do not exceed."""
    runs = {(m, x) for curve in curves for m, x in zip(curve.model_N.tolist(), curve.log_flops_N.tolist(), strict=True)}
    return float(np.quantile([x for _, x in runs], FIT_SHARE))


def why_not(curve: TaskScores, x_cut: float) -> str:
    """Why the curve cannot be fitted up to that log10 of compute, and what to add; empty when it can."""
    x_N = curve.log_flops_N[curve.log_flops_N <= x_cut]
    if x_N.size < MIN_RUNS:
        return (
            f"{x_N.size} runs up to the cut-off {10**x_cut:.3g}, a fit needs {MIN_RUNS}; add runs of smaller models, "
            "or raise the cut-off"
        )
    if np.unique(x_N).size < MIN_SIZES:
        return (
            f"only {np.unique(x_N).size} different values of compute up to the cut-off {10**x_cut:.3g}, a fit needs "
            f"{MIN_SIZES}; add models of other sizes"
        )
    return ""


# ----------------------------------------------------------------------------------------------------------- one curve


class _Fitted(NamedTuple):
    """`score_S`: |error| / deviation of all inner held-out runs; `plain`: each family [M] above the cut-off."""

    weight_J: np.ndarray
    score_S: np.ndarray
    held_out: _Runs
    prediction: _Prediction
    at: _Prediction
    x_at: float
    plain: dict[str, np.ndarray]


def _fit_one(curve: TaskScores, x_cut: float, at: float | None, num_resamples: int, seed: int) -> _Fitted:
    runs = _Runs(curve.log_flops_N, curve.fraction_N, curve.group_N, curve.model_N)
    below_N = runs.x <= x_cut
    known, held_out = runs.where(below_N), runs.where(~below_N)
    rng = np.random.default_rng(seed)
    folds = list(_folds(known, curve.chance_fraction, rng))
    weight_J = _weights(folds)
    x_at = float(runs.x[-1]) if at is None else math.log10(at)
    group_at = runs.group[-1:] if at is None else np.array([""])
    x_M = np.append(held_out.x, x_at)
    group_M = np.append(held_out.group, group_at)
    both = _predict(known, curve.chance_fraction, x_M, group_M, _resamples(known.model, num_resamples, rng))
    plain = {
        family: fit_curve(family, known.x, known.y, chance=curve.chance_fraction).predict(held_out.x)[0]
        for family in FAMILIES
    }
    scores = [
        np.abs(fold.prediction.mean(weight_J) - fold.truth_M) / fold.prediction.deviation(weight_J) for fold in folds
    ]
    return _Fitted(
        weight_J=weight_J,
        score_S=np.concatenate(scores) if scores else np.array([]),
        held_out=held_out,
        prediction=_places(both, slice(0, -1)),
        at=_places(both, slice(-1, None)),
        x_at=x_at,
        plain=plain,
    )


def _task_fit(curve: TaskScores, x_cut: float, one: _Fitted, pooled: float, mixture_error: float) -> TaskFit:
    own = _quantile(one.score_S)
    known = [value for value in (own, pooled) if math.isfinite(value)]
    quantile = max(NORMAL_QUANTILE, float(np.mean(known)) if known else NORMAL_QUANTILE)
    mean_M, deviation_M = one.prediction.mean(one.weight_J), one.prediction.deviation(one.weight_J)
    inside_M = np.abs(mean_M - one.held_out.y) <= quantile * deviation_M
    mean, deviation = float(one.at.mean(one.weight_J)[0]), float(one.at.deviation(one.weight_J)[0])
    ends = [curve.to_score(float(np.clip(mean + sign * quantile * deviation, 0, 1))) for sign in (-1, 1)]
    unit = abs(curve.best - curve.worst)
    truth_M = one.held_out.y
    error = {name: _rmse(plain_M, truth_M) for name, plain_M in one.plain.items()}
    versus = against_rivals(mean_M, {name: one.plain[name] for name in RIVALS}, truth_M, one.held_out.model)
    error |= {"mixture": mixture_error, "forecast": _rmse(mean_M, truth_M)}
    weight = dict(zip(MEMBERS, one.weight_J.tolist(), strict=True))
    there_N = curve.log_flops_N == one.x_at
    jump = find_jump(curve.log_flops_N, curve.fraction_N, curve.companion_N)
    fit = TaskFit(
        label=curve.label,
        num_runs=int((curve.log_flops_N <= x_cut).sum()),
        num_held_out=one.held_out.x.size,
        cutoff=_flops(x_cut),
        error={name: unit * value for name, value in error.items()},
        weight=weight,
        best=max(weight, key=lambda name: weight[name]),
        flops=_flops(one.x_at),
        forecast=curve.to_score(mean),
        low=min(ends),
        high=max(ends),
        actual=float(curve.score_N[there_N][-1]) if there_N.any() else math.nan,
        covered=float(inside_M.mean()) if inside_M.size else math.nan,
        versus=None if versus is None else versus.scaled(unit),
        jump=jump,
        sentence="",
    )
    return fit._replace(sentence=_sentence(curve, fit, unit))


def _sentence(curve: TaskScores, fit: TaskFit, unit: float) -> str:
    words = []
    if fit.high - fit.low > unit / 2:
        words.append("the interval spans more than half of the range: these runs do not say what comes")
    if fit.jump is not None:
        words.append(fit.jump.sentence(curve.companion, smooth=curve.smooth))
    return "; ".join(words)


# ------------------------------------------------------------------------------------------------------- the forecast


def _predict(known: _Runs, chance: float, x_M: np.ndarray, group_M: np.ndarray, weights_BN: np.ndarray) -> _Prediction:
    num_known = known.x.size
    x_all = np.concatenate([known.x, x_M])
    carry_MN = _carry(known, x_M, group_M)
    plain, miss, moved, members = [], [], [], []
    for family, averaged in MEMBERS.items():
        resampled_B = fit_curve(family, known.x, known.y, weights=weights_BN, chance=chance).predict(x_all)
        whole = (
            resampled_B.mean(0) if averaged else fit_curve(family, known.x, known.y, chance=chance).predict(x_all)[0]
        )
        miss.append(known.y - whole[:num_known])
        plain.append(whole[num_known:])
        moved.append(np.clip(plain[-1] + carry_MN @ miss[-1], 0, 1))
        members.append(resampled_B[:, num_known:])
    return _Prediction(np.array(moved), np.array(plain), np.array(miss), np.array(members))


def _carry(known: _Runs, x_M: np.ndarray, group_M: np.ndarray) -> np.ndarray:
    """Weights [M, N] of what was missed, by kriging. An empty group has no members.

    covariance = GROUP_VARIANCE [same group] exp(-|dx| / GROUP_DECADES), plus 1 for the noise of a run.
    """

    def covariance(x_K: np.ndarray, group_K: np.ndarray) -> np.ndarray:
        same_KN = (group_K[:, None] == known.group) & (group_K[:, None] != "")
        return GROUP_VARIANCE * same_KN * np.exp(-np.abs(x_K[:, None] - known.x) / GROUP_DECADES)

    noisy_NN = covariance(known.x, known.group) + np.eye(known.x.size)
    return np.linalg.solve(noisy_NN, covariance(x_M, group_M).T).T


def _folds(known: _Runs, chance: float, rng: np.random.Generator) -> Sequence[_Fold]:
    folds = []
    for cut in np.unique(np.quantile(known.x, FOLDS)):
        below_N = known.x <= cut
        early, late = known.where(below_N), known.where(~below_N)
        if early.x.size < MIN_FOLD_RUNS or late.x.size < MIN_FOLD_HELD_OUT or np.unique(early.x).size < MIN_SIZES:
            continue
        weights_BN = _resamples(early.model, _INNER_RESAMPLES, rng)
        folds.append(_Fold(_predict(early, chance, late.x, late.group, weights_BN), late.y))
    return folds


def _weights(folds: Sequence[_Fold]) -> np.ndarray:
    """One over each member's mean square error, averaged over the folds; equal where there are none."""
    if not folds:
        return np.full(len(MEMBERS), 1 / len(MEMBERS))
    square_FJ = np.array([((fold.prediction.moved_JM - fold.truth_M) ** 2).mean(1) for fold in folds])
    weight_J = 1 / (square_FJ.mean(0) + SCORE_NOISE**2)
    return weight_J / weight_J.sum()


def _resamples(model_N: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    return model_counts(model_N, num_resamples, rng) + _TRACE


def _mixture_errors(curves: Sequence[TaskScores], x_cut: float) -> list[float]:
    """Error above the cut-off of one mixture fitted to all curves below it; nan with too few curves."""
    if len(curves) < MIXTURE_TASKS:
        return [math.nan] * len(curves)
    parts = [(curve, curve.log_flops_N <= x_cut) for curve in curves]
    mixture = fit_mixture([TaskPoints(c.log_flops_N[b], c.fraction_N[b], c.chance_fraction) for c, b in parts])
    return [_rmse(mixture.predict(t, c.log_flops_N[~b]), c.fraction_N[~b]) for t, (c, b) in enumerate(parts)]


def _places(prediction: _Prediction, chosen: slice) -> _Prediction:
    return prediction._replace(
        moved_JM=prediction.moved_JM[:, chosen],
        plain_JM=prediction.plain_JM[:, chosen],
        members_JBM=prediction.members_JBM[:, :, chosen],
    )


def _quantile(score_S: np.ndarray) -> float:
    return float(np.quantile(score_S, LEVEL)) if score_S.size else math.nan


def _flops(x: float) -> float:
    """10^x to six digits: logs and back leave a tail of noise."""
    return float(f"{10**x:.6g}")


def _rmse(guess_M: np.ndarray, truth_M: np.ndarray) -> float:
    return float(np.sqrt(np.mean((guess_M - truth_M) ** 2))) if truth_M.size else math.nan
