"""Criteria of what a forecast rests on: the early logit that tells failing runs, and a failing rate foretold.

Wortsman et al. 2023, arXiv 2309.14322, figure 9. Legend: D seeds of one draw. Fixed before any run of their studies;
rules of the verdicts: see `claims.criteria`. Holds the studies of P4, P5, P11 and P12. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from aftershock.claims import stress
from aftershock.claims.claim import Forecast, Judgement, RunResult, Trial
from aftershock.claims.criteria import NO_QK, at_least, at_most
from aftershock.claims.grid import Grid
from aftershock.claims.growth import LOGIT
from aftershock.forecast.failing import FailingRate, forecast_failing, none_or_all_fail, weigh_ways
from aftershock.forecast.family import find_family
from aftershock.forecast.observations import Observation, Observations, early_reading, early_step, judged
from aftershock.forecast.outlook import plain
from aftershock.lab.presets import tiny_run
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size
from aftershock.lab.sweep import SweepSpec

SEEDS = (3, 4, 5)
"""Seeds of their own: seeds 0 to 2 of some of these runs were looked at while the criteria were written."""
STRESS_SEEDS = (0, 1, 2)
TINY = tiny_run(steps=200)
EARLY = dataclasses.replace(TINY, measure_every=4)
"""2 % of 200 steps is step 4, so that step must be one of those measured."""
FITTED, HELD_OUT = ("16x2", "32x2", "48x2"), ("96x2", "192x2")
"""The held-out sizes have 4 and 16 times the parameters of the largest fitted one."""

MIN_AUC, MAX_STEPS = 0.95, 1.0
"""The published limits of P4 and P5."""


def early_logit_separates(runs: Sequence[RunResult]) -> Judgement:
    """P4: AUC of the early max |logit| of block 0, failing against other runs of one seed, mean over seeds; at least
    0.95.

    Runs without qk-layernorm, all sizes and rates together; early is the first measurement at 2 % of the run or later,
    at most 5 %. A run fails as `run_fails` above the best rate of its own size and seed. The AUC is the chance that a
    failing run of a seed has the higher logit than another run of it, ties counting a half; seeds without both kinds
    are left out. Runs without a finite early logit had ended by then: left out and counted. No run takes part in
    anything that judges it: an AUC needs no threshold, and the reported accuracy of a seed is that of the threshold of
    the other seeds, the one that divides them with the fewest mistakes. The detail has the AUC of the rate alone,
    which knows nothing of the run: a logit that does no better is no news.
    """
    found = observations_of([run for run in runs if run.arm == NO_QK])
    seeds = sorted({run.seed for run in found.runs})
    by_seed = {seed: [run for run in found.runs if run.seed == seed] for seed in seeds}
    seen = {seed: [run for run in own if "early_logit" in run.readings] for seed, own in by_seed.items()}
    grid = Grid(runs)

    def mean_auc(draw_D: np.ndarray, *, by_rate: bool = False) -> float:
        values = [_auc(seen[seeds[int(s)]], by_rate=by_rate) for s in draw_D]
        known = [value for value in values if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan

    thresholds = {seed: _threshold([run for other in seeds if other != seed for run in seen[other]]) for seed in seeds}
    measured = grid.interval(mean_auc)
    return Judgement(
        verdict=at_least(measured, MIN_AUC),
        effect=measured.value,
        interval=measured.bounds,
        meaning="chance that of two runs of a seed the failing one has the higher early attention logit",
        detail={
            "threshold from the other seeds": {f"seed {seed}": 10**value for seed, value in thresholds.items()},
            "accuracy at it": {f"seed {seed}": _accuracy(seen[seed], thresholds[seed]) for seed in seeds},
            "AUC": {f"seed {seed}": _auc(seen[seed]) for seed in seeds},
            "AUC of the rate alone": {"mean over seeds": mean_auc(grid.everyone, by_rate=True)},
            "AUC by size": {
                size: _auc([r for own in seen.values() for r in own if r.size == size]) for size in grid.sizes
            },
            "runs": {
                "failed": float(sum(run.fails for run in found.runs)),
                "all": float(len(found.runs)),
                "without an early logit": float(sum("early_logit" not in run.readings for run in found.runs)),
            },
        },
    )


def failing_rate_is_foretold(runs: Sequence[RunResult]) -> Judgement:
    """P5: steps of the ladder between the failing rate foretold and the one found, the worse held-out size; at most 1.

    Foretold from the runs of `FITTED` alone by `forecast.failing.forecast_failing`: of its two ways (early logit
    against size and rate with a threshold, or failing rates against size) the one that predicts the fitted sizes
    better when each is left out. The logit of the claim is thus used where it is the better guide, and the detail says
    which way it was. Foretold is the lowest rate of the ladder at or above the estimate; found, the failing rate of
    each seed's own curve, one step beyond the ladder where no rate fails, as in P1. Steps are counted in rungs, since
    those of the ladder are not all equal in decades, and averaged over seeds with their sign. The interval redraws the
    held-out seeds; that of the forecast itself, for one new seed, is in the detail with the share of seeds whose
    bracket it meets, and the error of the simplest forecast, that the failing rate stays what it was at the largest
    fitted size. Inconclusive where a forecast is refused. It is on disk before a held-out size is trained
    (`claims.foretold`).
    """
    fitted = [run for run in runs if run.size in FITTED]
    forecasts = foretell(fitted)
    grid = Grid([run for run in runs if run.size in HELD_OUT])
    found_S = {size: _failing_rungs(grid, size) for size in grid.sizes}
    before = Grid(fitted)
    naive = float(_failing_rungs(before, before.sizes[-1]).mean())
    foretold = {size: _rung(forecasts[size].ladder_rate, grid.lrs) for size in grid.sizes}

    def worst(draw_D: np.ndarray) -> float:
        errors = [abs(foretold[size] - float(found_S[size][draw_D].mean())) for size in grid.sizes]
        return max(errors) if all(math.isfinite(error) for error in errors) else math.nan

    measured = grid.interval(worst)
    known = {size: forecast.rate for size, forecast in forecasts.items() if forecast.rate is not None}
    held = observations_of([run for run in runs if run.size in HELD_OUT]).curves
    met = {
        size: [
            c.bracket.low <= math.log10(rate.high) and c.bracket.high >= math.log10(rate.low)
            for c in held
            if c.size == size
        ]
        for size, rate in known.items()
    }
    return Judgement(
        verdict=at_most(measured, MAX_STEPS) if len(known) == len(grid.sizes) else "inconclusive",
        effect=measured.value,
        interval=measured.bounds,
        meaning="steps of the ladder between the failing rate foretold and found, the worse of the held-out sizes",
        detail={
            "failing rate foretold": {size: forecasts[size].ladder_rate or math.nan for size in grid.sizes},
            "estimate": {size: rate.value for size, rate in known.items()},
            "interval, low": {size: rate.low for size, rate in known.items()},
            "interval, high": {size: rate.high for size, rate in known.items()},
            "failing rate found, seeds averaged in rungs": {
                size: _rate_at(float(found_S[size].mean()), grid.lrs) for size in grid.sizes
            },
            "steps off": {size: abs(foretold[size] - float(found_S[size].mean())) for size in grid.sizes},
            "share of seeds the interval meets": {size: float(np.mean(inside)) for size, inside in met.items()},
            "steps off, if it stayed as at the largest fitted size": {
                size: abs(naive - float(found_S[size].mean())) for size in grid.sizes
            },
            "way used (1: by the early logit, 0: directly)": {
                size: float(forecast.method == "logit") for size, forecast in forecasts.items()
            },
        },
    )


# ------------------------------------------------------------------------------------------------------ the forecast


def foretell(fitted: Sequence[RunResult]) -> dict[str, FailingRate]:
    """The forecast of each held-out size from the runs of the fitted ones. Deterministic."""
    found = observations_of(fitted)
    family = find_family([(run.width, run.depth) for run in found.runs])
    for size in HELD_OUT:
        family.check(parse_size(size))
    ways = None if none_or_all_fail(found) else weigh_ways(found)
    return {size: forecast_failing(found, family, parse_size(size), ways=ways) for size in HELD_OUT}


def to_commit(fitted: Sequence[RunResult]) -> dict[str, Any]:
    """`foretell` as JSON holds it: what lies on disk before a held-out size is trained."""
    return plain(foretell(fitted))


def observations_of(runs: Sequence[RunResult]) -> Observations:
    """A claim's runs as the forecast sees them, with their early logit. Raises ValueError where it was not measured."""
    seen = []
    for number, run in enumerate(runs):
        size = parse_size(run.size)
        signal = run.signals.get(LOGIT)
        if signal is None:
            raise ValueError(f"run {run.size} {run.arm} lr {run.lr:g} seed {run.seed} has not recorded {LOGIT}")
        step, problem = early_step(range(0, EARLY.steps, EARLY.measure_every), EARLY.steps)
        assert step is not None, problem
        reading = early_reading(signal.steps, signal.values, step, died=run.final_loss is None)
        exact = reading is not None and reading.low == reading.high
        loss = run.final_loss if run.final_loss is not None and math.isfinite(run.final_loss) else None
        seen.append(
            Observation(
                run_id=str(number),
                size=run.size,
                width=size.width,
                depth=size.depth,
                num_params=run.num_params,
                lr=run.lr,
                seed=run.seed,
                initial_loss=run.initial_loss,
                final_loss=loss,
                fails=False,
                seconds=0.0,
                readings={"early_logit": reading} if reading is not None and exact else {},
            )
        )
    return Observations("claim", NO_QK, EARLY, judged(seen), ())


def _failing_rungs(grid: Grid, size: str) -> np.ndarray:
    """Number of the rung from which each seed fails, that after the last where none does."""
    found = [grid.failing_lr(size, NO_QK, int(s)) for s in grid.everyone]
    return np.array([float(len(grid.lrs)) if lr is None else _rung(lr, grid.lrs) for lr in found])


def _rung(lr: float | None, lrs: np.ndarray) -> float:
    """Number of a rate on the ladder, the ladder going on beyond its ends in its last steps; nan for none."""
    if lr is None:
        return math.nan
    log_lrs, at = np.log10(lrs), math.log10(lr)
    if at > log_lrs[-1]:
        return len(lrs) - 1 + (at - log_lrs[-1]) / float(log_lrs[-1] - log_lrs[-2])
    if at < log_lrs[0]:
        return (at - log_lrs[0]) / float(log_lrs[1] - log_lrs[0])
    return float(np.interp(at, log_lrs, np.arange(len(lrs))))


def _rate_at(rung: float, lrs: np.ndarray) -> float:
    """The rate of a (fractional) rung; the first one beyond the ladder as `failing.next_rate` has it."""
    ladder = [*lrs, lrs[-1] ** 2 / lrs[-2]]
    return 10 ** float(np.interp(rung, np.arange(len(ladder)), np.log10(ladder)))


def _auc(runs: Sequence[Observation], *, by_rate: bool = False) -> float:
    scores = [(math.log10(run.lr) if by_rate else run.readings["early_logit"].low, run.fails) for run in runs]
    failing, others = ([score for score, fails in scores if fails is own] for own in (True, False))
    if not failing or not others:
        return math.nan
    wins = np.subtract.outer(failing, others)
    return float((wins > 0).mean() + 0.5 * (wins == 0).mean())


def _threshold(runs: Sequence[Observation]) -> float:
    """The logit, in decades, that divides failing runs from others with the fewest mistakes; the middle of a tie."""
    values = sorted(run.readings["early_logit"].low for run in runs)
    cuts = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    mistakes = [sum((run.readings["early_logit"].low > cut) != run.fails for run in runs) for cut in cuts]
    best = [cut for cut, count in zip(cuts, mistakes, strict=True) if count == min(mistakes)]
    return float(np.median(best))


def _accuracy(runs: Sequence[Observation], threshold: float) -> float:
    return float(np.mean([(run.readings["early_logit"].low > threshold) == run.fails for run in runs]))


def _early_sweep(name: str, title: str, sizes: tuple[str, ...]) -> SweepSpec:
    return SweepSpec(name=name, title=title, base=EARLY, sizes=sizes, arms=(NO_QK,), lrs=PAPER_LRS, seeds=SEEDS)


FORECAST_TRIALS: dict[str, Trial] = {
    "P4": Trial(
        sweep=_early_sweep("P4", "Early attention logits of runs that fail later", FITTED),
        criterion=early_logit_separates,
        signals=(LOGIT,),
    ),
    "P5": Trial(
        sweep=_early_sweep("P5", "A failing rate foretold", (*FITTED, *HELD_OUT)),
        criterion=failing_rate_is_foretold,
        signals=(LOGIT,),
        forecast=Forecast(sweep=_early_sweep("P5", "What the forecast rests on", FITTED), foretell=to_commit),
    ),
    "P11": Trial(
        sweep=SweepSpec(
            name="P11",
            title="AdamW's eps against the gradient",
            base=TINY,
            sizes=("16x2", "32x2", "64x2"),
            arms=tuple(stress.EPS_ARMS),
            lrs=PAPER_LRS[2:6],
            seeds=STRESS_SEEDS,
        ),
        criterion=stress.eps_meets_the_gradient,
        signals=(stress.GRADIENT, stress.UPDATE),
    ),
    "P12": Trial(
        sweep=SweepSpec(
            name="P12",
            title="Attention logits forced to a scale",
            base=TINY,
            sizes=("32x2",),
            arms=(NO_QK, *stress.KAPPAS, stress.BIGRAM),
            lrs=PAPER_LRS[1:6],
            seeds=STRESS_SEEDS,
        ),
        criterion=stress.forced_logits_destroy,
    ),
}
"""Claim id -> study. P4's runs are among P5's; P11's baseline among P1's."""
