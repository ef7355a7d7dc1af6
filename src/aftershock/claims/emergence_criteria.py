"""Criteria of E1 to E4, on public benchmark scores: can a score be foretold from compute, and what is in a jump?

All were fixed before any was run; a change is a new version of the claim. The data are read from a folder of the
user's (see `load_scores`), and none comes with the package. The runs are whatever models were published, not drawn,
so the intervals (95 %, percentile bootstrap over tasks, or over families where that is said) speak of other tasks like
these. Rules on directions and limits as in `claims.criteria`.
Legend: T tasks, D tasks of one draw. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aftershock.claims.claim import Judgement, ScoreTrial, Verdict
from aftershock.claims.criteria import at_least, at_most, below_zero
from aftershock.claims.grid import Interval, bootstrap
from aftershock.forecast.curves import fit_curve
from aftershock.forecast.emergence import SAME, why_not
from aftershock.forecast.jumps import find_jump
from aftershock.forecast.mixture import NUM_CURVES, TaskPoints, fit_mixture
from aftershock.forecast.scores import ScoreTable, TaskScores, join_tables, read_scores

MODELS, CHECKPOINTS = "bigbench_scores.csv", "pythia_scores.csv"
CUTOFF = 8.4e22
"""FLOPs up to which models are fitted, those above are scored: the cut-off of Ruan et al. 2024 (arXiv 2405.10938)."""

_X_CUT = math.log10(CUTOFF) + SAME

MIXED_EXPERTS = ("deepseek-ai/deepseek-moe-16b-base", "deepseek-ai/DeepSeek-V2", "deepseek-ai/DeepSeek-Coder-V2-Base")
"""Left out: mixtures of experts, whose compute in the files is not that of their active parameters."""

MIN_HELD_OUT = 5
"""Models above the cut-off that a curve needs to be counted."""

LITTLE = 0.5
"""E1: `little` is less than half of the variance."""

NOTHING = 0.1
"""E2: R2 below this, as published."""

MOST_JUMPS = 0.5
"""E3: the share of jumps with a smooth companion that supports the claim."""


_FLAT = 1e-12
"""A variance below this share of the mean square is rounding."""


class _Rise(NamedTuple):
    """An improvement foretold, or one before, and the improvement that came."""

    foretold: float
    came: float


def load_scores(folder: str | Path, files: Sequence[str]) -> ScoreTable:
    """The tables of these files of a folder in one, in the columns of `read_scores`.

    Raises ValueError as `read_scores` does when a file is missing or damaged.
    """
    return join_tables(*(read_scores(Path(folder) / name) for name in files))


def judge_e1(table: ScoreTable) -> Judgement:
    """E1: the logit over the adjusted range against the straight line, both fitted up to `CUTOFF` and scored above.

    Counted: every curve of a metric with a threshold (no Brier, no BLEU) with at least `MIN_HELD_OUT` models above.
    Effect: root mean square error of the logit minus that of the line, mean over tasks (curves of one task, from
    different sources, are averaged first); both kept within the range of scores. R2: squared correlation, over all
    (curve, model) pairs above the cut-off, of the rise that the logit foretells and the rise that came, both from the
    curve's mean score below the cut-off.

    Supported: the interval of the effect lies below 0 (better), and R2 is below `LITTLE` (yet little). Contradicted:
    that interval lies above 0, or the interval of R2 lies above `LITTLE`. Otherwise inconclusive.
    """
    tasks = _by_task(_counted(table))
    errors: dict[str, dict[str, float]] = {"adjusted_logit": {}, "line": {}}
    rises: dict[str, list[_Rise]] = {}
    for task, curves in tasks.items():
        rises[task] = []
        for name in errors:
            errors[name][task] = float(np.mean([_held_out_error(curve, name) for curve in curves]))
        for curve in curves:
            below, above = _split(curve)
            base = float(below.fraction_N.mean())
            foretold_M = _forecast(curve, "adjusted_logit")
            rises[task] += [_Rise(*pair) for pair in zip(foretold_M - base, above.fraction_N - base, strict=True)]
    measured = _mean_over_tasks({task: errors["adjusted_logit"][task] - errors["line"][task] for task in tasks})
    explained = _r2_over(rises)
    verdict: Verdict = "inconclusive"
    if measured.low > 0 or explained.low > LITTLE:
        verdict = "contradicted"
    elif measured.high < 0 and explained.value < LITTLE:
        verdict = "supported"
    return Judgement(
        verdict=verdict,
        effect=measured.value,
        interval=measured.bounds,
        meaning="error above the cut-off, logit over the adjusted range minus straight line, share of the score range",
        detail={
            "error of the logit": errors["adjusted_logit"],
            "error of the line": errors["line"],
            "R2 of the rise foretold by the logit": explained._asdict(),
        },
    )


def judge_e2(table: ScoreTable) -> Judgement:
    """E2: squared correlation of the improvement small to middle with that from middle to large; below `NOTHING`.

    One triple for each family and curve of a metric with a threshold, where the family has three different values of
    compute: the smallest, the median (the lower one of an even number) and the largest. Improvements are in shares of
    the score range per decade of compute, because steps in compute are unequal; the R2 of the plain ones is in the
    detail. The interval draws families. A limit: see `claims.criteria`.
    """
    per_decade: dict[str, list[_Rise]] = {}
    plain: dict[str, list[_Rise]] = {}
    for curve in _sharp(table):
        for family in dict.fromkeys(name for name in curve.family_N.tolist() if name):
            runs = curve.where(curve.family_N == family)
            x, first = np.unique(runs.log_flops_N, return_index=True)
            if x.size < 3:
                continue
            chosen = [0, (x.size - 1) // 2, x.size - 1]
            y = runs.fraction_N[first][chosen]
            x = x[chosen]
            plain.setdefault(family, []).append(_Rise(float(y[1] - y[0]), float(y[2] - y[1])))
            steps = np.diff(y) / np.diff(x)
            per_decade.setdefault(family, []).append(_Rise(float(steps[0]), float(steps[1])))
    if not per_decade:
        raise ValueError("no family has three sizes on any task; add the column model_family, or more sizes")
    measured, raw = _r2_over(per_decade), _r2_over(plain)
    pairs = [rise for rises in per_decade.values() for rise in rises]
    return Judgement(
        verdict=_below(measured, NOTHING),
        effect=measured.value,
        interval=measured.bounds,
        meaning="R2 between the last and the next improvement, per decade of compute",
        detail={
            "R2 of plain improvements": raw._asdict(),
            "counts": {"triples": float(len(pairs)), "families": float(len(per_decade))},
            "correlation": {"per decade": _correlation(_sums(pairs))},
        },
    )


def judge_e3(table: ScoreTable) -> Judgement:
    """E3: among the curves that jump and have a smooth companion, the share whose companion improves before the jump.

    A jump, and a companion that improves steadily before it, are what `forecast.jumps.find_jump` calls so: the score
    stays within a tenth of its rise for a third of the decades, while the companion makes a fifth of its own way with
    a rank correlation above 0. Companions: Brier score, BLEU or perplexity of the same models on the same questions.
    The effect is the mean over tasks of the share of their curves (numbers of shots, sources). Supported: at least
    `MOST_JUMPS`; contradicted: the whole interval lies below; inconclusive otherwise and where nothing jumps.

    That accuracy is p^L needs the score of the parts, which these files do not have: that part is not judged.
    """
    shares: dict[str, list[float]] = {}
    found: dict[str, dict[str, float]] = {}
    for curve in _sharp(table):
        if not curve.companion:
            continue
        jump = find_jump(curve.log_flops_N, curve.fraction_N, curve.companion_N)
        if jump is None:
            continue
        shares.setdefault(curve.task, []).append(float(jump.metric_only))
        found[f"{curve.label}, companion {curve.companion}"] = {
            "log10 onset": math.log10(jump.onset),
            "companion's share by then": jump.companion_share,
            "companion's rank correlation until then": jump.companion_rank,
            "metric only": float(jump.metric_only),
        }
    measured = Interval(math.nan, math.nan, math.nan)
    if shares:
        measured = _mean_over_tasks({task: float(np.mean(values)) for task, values in shares.items()})
    return Judgement(
        verdict=at_least(measured, MOST_JUMPS),
        effect=measured.value,
        interval=measured.bounds,
        meaning="share of jumps before which a smooth companion improves steadily, mean over tasks that jump",
        detail=found,
    )


def judge_e4(table: ScoreTable) -> Judgement:
    """E4: error of the mixture minus that of one logit a task, both fitted up to `CUTOFF` and scored above; below 0.

    Mixture: `forecast.mixture.fit_mixture` of `NUM_CURVES` shared curves over all counted curves together (those of
    E1). One logit: the sigmoid from chance to 1, least squares, each curve on its own. The effect is the mean over
    tasks of the difference of root mean square errors. A direction: see `claims.criteria`. Mixtures of 1, 2 and 5
    curves are in the detail.
    """
    curves = _counted(table)
    points = [
        TaskPoints(below.log_flops_N, below.fraction_N, below.chance_fraction) for below, _ in map(_split, curves)
    ]
    sizes = sorted({1, 2, NUM_CURVES, 5})
    by_size = {}
    for size in sizes:
        mixture = fit_mixture(points, num_curves=size)
        by_size[size] = {
            curve.label: _rmse(mixture.predict(t, above.log_flops_N), above.fraction_N)
            for t, (curve, above) in enumerate((curve, _split(curve)[1]) for curve in curves)
        }
    alone = {curve.label: _held_out_error(curve, "sigmoid") for curve in curves}

    def difference(size: int) -> Interval:
        return _mean_over_tasks(
            {
                task: float(np.mean([by_size[size][curve.label] - alone[curve.label] for curve in members]))
                for task, members in _by_task(curves).items()
            }
        )

    measured = difference(NUM_CURVES)
    return Judgement(
        verdict=below_zero(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning=f"error above the cut-off, mixture of {NUM_CURVES} shared logits minus one a task, share of range",
        detail={
            "error of the mixture": by_size[NUM_CURVES],
            "error of one logit": alone,
            "difference by number of curves": {str(size): difference(size).value for size in sizes},
        },
    )


SCORE_TRIALS: Mapping[str, ScoreTrial] = {
    "E1": ScoreTrial(files=(MODELS,), criterion=judge_e1),
    "E2": ScoreTrial(files=(MODELS,), criterion=judge_e2),
    "E3": ScoreTrial(files=(MODELS, CHECKPOINTS), criterion=judge_e3),
    "E4": ScoreTrial(files=(MODELS,), criterion=judge_e4),
}
"""Claim id -> study: the files of a folder, and what is made of them."""


# ------------------------------------------------------------------------------------------------------------- pieces


def _sharp(table: ScoreTable) -> list[TaskScores]:
    """Curves of metrics with a threshold, without mixtures of experts."""
    return [c.where(~np.isin(c.model_N, MIXED_EXPERTS)) for c in table.curves if not c.smooth]


def _counted(table: ScoreTable) -> list[TaskScores]:
    """The sharp curves that can be fitted below the cut-off and scored above it."""
    counted = [
        curve
        for curve in _sharp(table)
        if not why_not(curve, _X_CUT) and (curve.log_flops_N > _X_CUT).sum() >= MIN_HELD_OUT
    ]
    if not counted:
        raise ValueError(f"no curve has enough models below and above {CUTOFF:.2g} FLOPs; add models to the file")
    return counted


def _by_task(curves: Sequence[TaskScores]) -> dict[str, list[TaskScores]]:
    tasks: dict[str, list[TaskScores]] = {}
    for curve in curves:
        tasks.setdefault(curve.task, []).append(curve)
    return tasks


def _split(curve: TaskScores) -> tuple[TaskScores, TaskScores]:
    """The runs up to the cut-off, and those above."""
    below_N = curve.log_flops_N <= _X_CUT
    return curve.where(below_N), curve.where(~below_N)


def _forecast(curve: TaskScores, family: str) -> np.ndarray:
    below, above = _split(curve)
    fitted = fit_curve(family, below.log_flops_N, below.fraction_N, chance=curve.chance_fraction)
    return fitted.predict(above.log_flops_N)[0]


def _held_out_error(curve: TaskScores, family: str) -> float:
    return _rmse(_forecast(curve, family), _split(curve)[1].fraction_N)


def _rmse(guess_M: np.ndarray, truth_M: np.ndarray) -> float:
    return float(np.sqrt(np.mean((guess_M - truth_M) ** 2)))


def _mean_over_tasks(values: Mapping[str, float]) -> Interval:
    value_T = np.array(list(values.values()))
    return bootstrap(lambda draw_D: float(value_T[draw_D].mean()), value_T.size)


def _r2_over(rises: Mapping[str, Sequence[_Rise]]) -> Interval:
    """Squared correlation over all pairs, its interval over draws of the mapping's keys."""
    sums_T6 = np.array([_sums(members) for members in rises.values()])
    return bootstrap(lambda draw_D: _correlation(sums_T6[draw_D].sum(axis=0)) ** 2, len(rises))


def _sums(rises: Sequence[_Rise]) -> np.ndarray:
    """What a correlation needs of these pairs (a, b): 1, a, b, a^2, b^2, a b, summed."""
    a_R, b_R = np.array(rises).T
    return np.array([a_R.size, a_R.sum(), b_R.sum(), a_R @ a_R, b_R @ b_R, a_R @ b_R])


def _correlation(sums_6: np.ndarray) -> float:
    """Pearson's; nan where one side does not vary."""
    n, a, b, aa, bb, ab = sums_6.tolist()
    spread_a, spread_b = aa - a * a / n, bb - b * b / n
    if spread_a <= _FLAT * aa or spread_b <= _FLAT * bb:
        return math.nan
    return (ab - a * b / n) / math.sqrt(spread_a * spread_b)


def _below(measured: Interval, limit: float) -> Verdict:
    """`at_most` for a limit that must be kept strictly."""
    return "inconclusive" if measured.value == limit else at_most(measured, limit)
