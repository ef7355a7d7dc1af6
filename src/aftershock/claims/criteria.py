"""Criteria that read final losses: where training fails, LR sensitivity, the best rate.

Legend: D seeds of one draw, R rates, S seeds (see `claims.grid`). All were fixed before any run of their studies; a
change is a new version of the claim. Three rules hold wherever the published criterion leaves the verdict open:

- of a direction (`below 0`), supported: the whole interval lies on that side; contradicted: on the other;
- of a limit (`at most`, `at least`, `within`), supported: the effect keeps it; contradicted: the whole interval
  breaks it;
- otherwise inconclusive, also when nothing could be measured.

Intervals: 95 %, over seeds, coarse with 3 of them (`grid.bootstrap`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from aftershock.claims.claim import Judgement, RunResult, Verdict
from aftershock.claims.grid import Grid, Interval, slope

BASELINE, NO_QK = "baseline", "no_qk_norm"
MUP = "mup:simple+model.mup_base_width=16"
COUPLED = "coupled_decay:0.1"
WHOLE_WIDTH = "qk_norm_width"
DEPTH_FAMILY, WIDTH_FAMILY = ("32x2", "32x4", "32x8"), ("32x2", "48x2", "64x2")
DECAY_RANGES = ((1e-4, 1e-1), (3e-4, 3e-1))
"""The paper's two ranges (arXiv 2309.14322, figure 6): the lower sensitivity of the two counts."""
NUM_SDS = 2.0
TINY_SD = 1e-12
"""Keeps a ratio to a seed deviation of 0 finite."""


def below_zero(measured: Interval) -> Verdict:
    """A direction: see the rules at the top."""
    return "supported" if measured.high < 0 else "contradicted" if measured.low > 0 else "inconclusive"


def above_zero(measured: Interval) -> Verdict:
    """A direction: see the rules at the top."""
    return "supported" if measured.low > 0 else "contradicted" if measured.high < 0 else "inconclusive"


def at_most(measured: Interval, limit: float) -> Verdict:
    """A limit: see the rules at the top."""
    return "supported" if measured.value <= limit else "contradicted" if measured.low > limit else "inconclusive"


def at_least(measured: Interval, limit: float) -> Verdict:
    """A limit: see the rules at the top."""
    return "supported" if measured.value >= limit else "contradicted" if measured.high < limit else "inconclusive"


def failing_rate_falls(runs: Sequence[RunResult]) -> Judgement:
    """P1: slope of log10(failing LR) against log10 N without qk-layernorm; below 0.

    The failing rate is that of each seed's own curve; seeds are averaged in log rate. Where no rate of the ladder
    fails, the rate one ladder step above its end stands in: the lowest value it can have, so the slope errs towards 0
    when, as claimed, it is the small models that do not fail.
    """
    grid = Grid(runs)
    beyond = float(grid.lrs[-1] ** 2 / grid.lrs[-2])
    found = {
        (size, arm): [grid.failing_lr(size, arm, int(s)) for s in grid.everyone]
        for size in grid.sizes
        for arm in grid.arms
    }
    log_S = {key: np.log10([beyond if lr is None else lr for lr in lrs]) for key, lrs in found.items()}

    def steepness(draw_D: np.ndarray, arm: str = NO_QK) -> float:
        return slope(grid.log_n, [log_S[size, arm][draw_D].mean() for size in grid.sizes])

    measured = grid.interval(steepness)
    return Judgement(
        verdict=below_zero(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="decades of failing learning rate per decade of N, without qk-layernorm",
        detail={
            "failing rate": {f"{size} {arm}": 10 ** float(log_S[size, arm].mean()) for size, arm in found},
            "seeds that fail at no rate": {f"{s} {arm}": float(lrs.count(None)) for (s, arm), lrs in found.items()},
            "slope": {arm: steepness(grid.everyone, arm) for arm in grid.arms},
        },
    )


def qk_norm_lowers_sensitivity(runs: Sequence[RunResult]) -> Judgement:
    """P2: LR sensitivity with qk-layernorm minus without, paired by seed; below 0 at every size.

    Supported: below 0 at every size, and the interval of the largest size excludes 0. Contradicted: the interval of any
    size lies above 0. The effect is that of the largest size.
    """
    grid = Grid(runs)
    by_size = {size: _sensitivity_difference(grid, [size], BASELINE, NO_QK) for size in grid.sizes}
    largest = by_size[grid.sizes[-1]]
    if any(measured.low > 0 for measured in by_size.values()):
        verdict: Verdict = "contradicted"
    elif all(measured.value < 0 for measured in by_size.values()) and largest.high < 0:
        verdict = "supported"
    else:
        verdict = "inconclusive"
    return Judgement(
        verdict=verdict,
        effect=largest.value,
        interval=largest.bounds,
        meaning="nats of LR sensitivity, with qk-layernorm minus without, at the largest size",
        detail={"LR sensitivity": _sensitivities(grid), "difference": {s: m.value for s, m in by_size.items()}},
    )


def arms_coincide(runs: Sequence[RunResult]) -> Judgement:
    """P3: largest |difference of mean losses| / seed deviation over the rates below the critical one; at most 2.

    The critical rate of a size is the lowest failing rate of any seed without qk-layernorm (the ladder's end when none
    fails). The deviation at a rate is the root of the mean of both arms' variances over seeds (n - 1); the interval
    redraws the differences and keeps it.
    """
    grid = Grid(runs)
    ratios_S: dict[str, np.ndarray] = {}
    critical: dict[str, float] = {}
    for size in grid.sizes:
        failing = [lr for s in grid.everyone if (lr := grid.failing_lr(size, NO_QK, int(s))) is not None]
        critical[size] = min(failing, default=math.inf)
        on_RS, off_RS = grid.capped_RS(size, BASELINE), grid.capped_RS(size, NO_QK)
        sd_R = np.sqrt((on_RS.var(axis=1, ddof=1) + off_RS.var(axis=1, ddof=1)) / 2).clip(min=TINY_SD)
        for r in np.flatnonzero(grid.lrs < critical[size]):
            ratios_S[f"{size} lr {grid.lrs[r]:g}"] = (off_RS[r] - on_RS[r]) / sd_R[r]
    measured = _largest_mean(grid, ratios_S)
    return Judgement(
        verdict=at_most(measured, NUM_SDS),
        effect=measured.value,
        interval=measured.bounds,
        meaning="largest difference of the arms below the critical rate, in seed standard deviations",
        detail={
            "without minus with, in seed standard deviations": {k: float(x_S.mean()) for k, x_S in ratios_S.items()},
            "critical rate": critical,
        },
    )


def warmup_lowers_sensitivity(runs: Sequence[RunResult]) -> Judgement:
    """P7: LR sensitivity at the largest size never rises with the length of the warm-up.

    Arms come from the shortest warm-up to the longest. Supported: each is at most the one before, and the interval of
    longest minus shortest lies below 0. Contradicted: it lies above 0. `More so for larger models` is in the detail and
    no part of the criterion: the slope of that difference against log10 N.
    """
    grid = Grid(runs)
    largest = grid.sizes[-1]
    ends = {size: _sensitivity_difference(grid, [size], grid.arms[-1], grid.arms[0]) for size in grid.sizes}
    at_largest = [grid.sensitivity(largest, arm, grid.everyone) for arm in grid.arms]
    monotone = all(after <= before for before, after in itertools.pairwise(at_largest))
    verdict = below_zero(ends[largest])
    return Judgement(
        verdict=verdict if verdict != "supported" or monotone else "inconclusive",
        effect=ends[largest].value,
        interval=ends[largest].bounds,
        meaning=f"nats of LR sensitivity at the largest size, {grid.arms[-1]} minus {grid.arms[0]}",
        detail={
            "LR sensitivity": _sensitivities(grid),
            "monotone at the largest size": {"1 yes, 0 no": float(monotone)},
            "longest minus shortest": {size: measured.value for size, measured in ends.items()},
            "slope of it per decade of N": {"nats": slope(grid.log_n, [m.value for m in ends.values()])},
        },
    )


def independent_decay_lowers_sensitivity(runs: Sequence[RunResult]) -> Judgement:
    """P8: LR sensitivity with independent decay minus with coupled, paired by seed, mean over sizes; below 0.

    Each sensitivity is the lower of those over 1e-4..1e-1 and 3e-4..3e-1, as in the paper.
    """
    grid = Grid(runs)

    def lower(size: str, arm: str, draw_D: np.ndarray) -> float:
        return min(grid.sensitivity(size, arm, draw_D, within=within) for within in DECAY_RANGES)

    def difference(draw_D: np.ndarray) -> float:
        return float(np.mean([lower(size, BASELINE, draw_D) - lower(size, COUPLED, draw_D) for size in grid.sizes]))

    measured = grid.interval(difference)
    return Judgement(
        verdict=below_zero(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="nats of LR sensitivity, independent minus coupled weight decay, mean over sizes",
        detail={
            "LR sensitivity": {f"{s} {arm}": lower(s, arm, grid.everyone) for s in grid.sizes for arm in grid.arms}
        },
    )


def depth_raises_sensitivity_faster(runs: Sequence[RunResult]) -> Judgement:
    """P9: slope of LR sensitivity against log10 N in the depth family minus that in the width family; above 0.

    The families share their smallest member; N is counted, so members need not match exactly.
    """
    grid = Grid(runs)
    log_n = dict(zip(grid.sizes, grid.log_n, strict=True))

    def steepness(family: Sequence[str], draw_D: np.ndarray) -> float:
        return slope([log_n[s] for s in family], [grid.sensitivity(s, BASELINE, draw_D) for s in family])

    measured = grid.interval(lambda draw_D: steepness(DEPTH_FAMILY, draw_D) - steepness(WIDTH_FAMILY, draw_D))
    return Judgement(
        verdict=above_zero(measured),
        effect=measured.value,
        interval=measured.bounds,
        meaning="nats of LR sensitivity per decade of N, depth minus width",
        detail={
            "LR sensitivity": _sensitivities(grid),
            "slope": {
                "depth": steepness(DEPTH_FAMILY, grid.everyone),
                "width": steepness(WIDTH_FAMILY, grid.everyone),
            },
        },
    )


def mup_fixes_the_best_rate_only(runs: Sequence[RunResult]) -> Judgement:
    """P10: |slope of log10(best LR) against log10 width| with muParam minus without: below 0, with no other gain.

    Best rate and the loss there are the vertex of the parabola around the best point of the ladder. Loss and LR
    sensitivity: muParam minus standard, mean over all sizes but the smallest, which is the base and has equal arms.
    Supported: the interval of the effect lies below 0, and neither of the other two does. Contradicted: it lies above
    0, or one of the other two lies below.
    """
    grid = Grid(runs)
    wider = grid.sizes[1:]
    log_width = [grid.log_n[i] / 2 for i in range(len(grid.sizes))]  # at one depth N grows as width^2

    def drift(arm: str, draw_D: np.ndarray) -> float:
        return slope(log_width, [grid.best_point(size, arm, draw_D).log_lr for size in grid.sizes])

    def loss(draw_D: np.ndarray) -> float:
        best = [grid.best_point(s, MUP, draw_D).loss - grid.best_point(s, BASELINE, draw_D).loss for s in wider]
        return float(np.mean(best))

    nearer = grid.interval(lambda draw_D: abs(drift(MUP, draw_D)) - abs(drift(BASELINE, draw_D)))
    losses, sensitivity = grid.interval(loss), _sensitivity_difference(grid, wider, MUP, BASELINE)
    verdict = below_zero(nearer)
    if losses.high < 0 or sensitivity.high < 0:
        verdict = "contradicted"
    return Judgement(
        verdict=verdict,
        effect=nearer.value,
        interval=nearer.bounds,
        meaning="|decades of best rate per decade of width|, muParam (simple) minus standard",
        detail={
            "slope of the best rate": {arm: drift(arm, grid.everyone) for arm in grid.arms},
            "best rate": {
                f"{s} {arm}": 10 ** grid.best_point(s, arm, grid.everyone).log_lr
                for s in grid.sizes
                for arm in grid.arms
            },
            "loss at the best rate, muParam minus standard": losses._asdict(),
            "LR sensitivity, muParam minus standard": sensitivity._asdict(),
        },
    )


def length_and_batch_hardly_matter(runs: Sequence[RunResult]) -> Judgement:
    """P13: largest |difference of LR sensitivity to the baseline| / seed deviation over arms and sizes; at most 2.

    Sensitivity of each seed's own curve. The deviation is the root of the mean of both arms' variances over seeds
    (n - 1); the interval redraws the paired differences and keeps it.
    """
    grid = Grid(runs)
    ratios_S: dict[str, np.ndarray] = {}
    for size in grid.sizes:
        usual_S = grid.seed_sensitivity_S(size, BASELINE)
        for arm in grid.arms:
            if arm != BASELINE:
                other_S = grid.seed_sensitivity_S(size, arm)
                sd = math.sqrt((usual_S.var(ddof=1) + other_S.var(ddof=1)) / 2)
                ratios_S[f"{size} {arm}"] = (other_S - usual_S) / max(sd, TINY_SD)
    measured = _largest_mean(grid, ratios_S)
    return Judgement(
        verdict=at_most(measured, NUM_SDS),
        effect=measured.value,
        interval=measured.bounds,
        meaning="largest change of LR sensitivity over lengths and batches, in seed standard deviations",
        detail={
            "LR sensitivity": _sensitivities(grid),
            "change, in seed standard deviations": {key: float(x_S.mean()) for key, x_S in ratios_S.items()},
        },
    )


def per_head_is_as_good(runs: Sequence[RunResult]) -> Judgement:
    """P17: LR sensitivity with qk-layernorm per head minus over the whole width, mean over sizes; at most 0.

    A limit, as published: a difference of exactly nothing supports it, so support here is weak evidence.
    """
    grid = Grid(runs)
    measured = _sensitivity_difference(grid, grid.sizes, BASELINE, WHOLE_WIDTH)
    return Judgement(
        verdict=at_most(measured, 0.0),
        effect=measured.value,
        interval=measured.bounds,
        meaning="nats of LR sensitivity, per head minus over the whole width, mean over sizes",
        detail={"LR sensitivity": _sensitivities(grid)},
    )


def _largest_mean(grid: Grid, values_S: Mapping[str, np.ndarray]) -> Interval:
    """The mean over seeds that is largest in size of any case."""
    return grid.interval(lambda draw_D: max(abs(float(x_S[draw_D].mean())) for x_S in values_S.values()))


def _sensitivity_difference(grid: Grid, sizes: Sequence[str], arm: str, minus: str) -> Interval:
    """LR sensitivity [nats] of `arm` minus that of `minus`, mean over sizes, seeds paired."""

    def difference(draw_D: np.ndarray) -> float:
        pairs = [grid.sensitivity(size, arm, draw_D) - grid.sensitivity(size, minus, draw_D) for size in sizes]
        return float(np.mean(pairs))

    return grid.interval(difference)


def _sensitivities(grid: Grid) -> dict[str, float]:
    return {f"{s} {arm}": grid.sensitivity(s, arm, grid.everyone) for s in grid.sizes for arm in grid.arms}
