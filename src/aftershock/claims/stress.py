"""Criteria of two strains: AdamW's eps as large as the gradient, and attention logits forced to a scale.

Wortsman et al. 2023, arXiv 2309.14322, figures 10 to 13. Legend: D seeds of one draw, R rates. Fixed before any run of
their studies; rules of the verdicts: see `claims.criteria`. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from aftershock.claims.claim import Judgement, RunResult, Verdict
from aftershock.claims.criteria import BASELINE, NO_QK, above_zero, at_least, below_zero
from aftershock.claims.grid import Grid, Interval, slope
from aftershock.claims.growth import LAST

GRADIENT, UPDATE = (f"{kind}/blocks.0.mlp.in/rms" for kind in ("grad_clipped", "update"))
EPS_ARMS = {BASELINE: 1e-8, "eps:1e-6": 1e-6, "eps:1e-5": 1e-5, "eps:1e-4": 1e-4, "eps:1e-3": 1e-3, "eps:1e-2": 1e-2}
MIN_FALL = 0.3
"""The published limit of P11."""
BIGRAM = "depth:0"
KAPPAS = {f"no_qk_norm+kappa:{kappa}": float(kappa) for kappa in (1, 10, 100, 1000, 10000)}
MILD, HARMFUL, DESTROYS = (f"no_qk_norm+kappa:{kappa}" for kappa in (100, 1000, 10000))
MILD_SHARE = 0.5


def eps_meets_the_gradient(runs: Sequence[RunResult]) -> Judgement:
    """P11: fall of the final update RMS when eps is raised to the gradient RMS, with three slopes; at least 0.3.

    Gradient (after clipping) and unscaled update of the first MLP matrix of block 0, mean of the last 5 measurements.
    With g the gradient at eps 1e-8 of the same size, rate and seed, the update at eps = g is read off the eps arms,
    linear in log update against log eps; the fall is 1 - update(g) / update(1e-8), mean over rates at the largest
    size. Slopes: log10 g against log10 N (mean over rates) and against log10 LR (mean over sizes), both below 0; final
    loss, capped at l0, against log10 eps over the arms with eps of 1e-6 and above (mean over sizes and rates), above 0:
    higher harms and lower cures. Supported: all three slopes' intervals lie on their side and the fall keeps its
    limit. Contradicted: one of the three lies on the other side, or the fall's whole interval breaks the limit.
    """
    grid = Grid(runs)
    largest, rates = grid.sizes[-1], grid.lrs.tolist()

    def log_end(size: str, arm: str, lr: float, s: int, name: str) -> float:
        return math.log10(_end(grid.run(size, arm, lr, s), name))

    def fall(draw_D: np.ndarray) -> float:
        log_eps = np.log10([EPS_ARMS[arm] for arm in EPS_ARMS])
        falls = []
        for lr in rates:
            for s in draw_D.tolist():
                updates = [log_end(largest, arm, lr, s, UPDATE) for arm in EPS_ARMS]
                at_g = float(np.interp(log_end(largest, BASELINE, lr, s, GRADIENT), log_eps, updates))
                falls.append(1 - 10 ** (at_g - updates[0]))
        return float(np.mean(falls))

    def log_g(size: str, lr: float, draw_D: np.ndarray) -> float:
        return float(np.mean([log_end(size, BASELINE, lr, s, GRADIENT) for s in draw_D.tolist()]))

    def against_n(draw_D: np.ndarray) -> float:
        return float(np.mean([slope(grid.log_n, [log_g(z, lr, draw_D) for z in grid.sizes]) for lr in rates]))

    def against_lr(draw_D: np.ndarray) -> float:
        return float(np.mean([slope(np.log10(rates), [log_g(z, lr, draw_D) for lr in rates]) for z in grid.sizes]))

    def against_eps(draw_D: np.ndarray) -> float:
        raised = [arm for arm in EPS_ARMS if arm != BASELINE]
        return slope(np.log10([EPS_ARMS[arm] for arm in raised]), [_mean_loss(grid, arm, draw_D) for arm in raised])

    measured, by_n, by_lr, by_eps = map(grid.interval, (fall, against_n, against_lr, against_eps))
    verdicts = (below_zero(by_n), below_zero(by_lr), above_zero(by_eps), at_least(measured, MIN_FALL))
    verdict: Verdict = "contradicted" if "contradicted" in verdicts else "inconclusive"
    return Judgement(
        verdict="supported" if set(verdicts) == {"supported"} else verdict,
        effect=measured.value,
        interval=measured.bounds,
        meaning="share of the update RMS lost when eps is raised to the gradient RMS, largest size",
        detail={
            "gradient against N": by_n._asdict(),
            "gradient against the rate": by_lr._asdict(),
            "loss against eps": by_eps._asdict(),
            "gradient RMS": {f"{z} lr {lr:g}": 10 ** log_g(z, lr, grid.everyone) for z in grid.sizes for lr in rates},
            "mean loss": {arm: _mean_loss(grid, arm, grid.everyone) for arm in grid.arms},
        },
    )


def forced_logits_destroy(runs: Sequence[RunResult]) -> Judgement:
    """P12: loss with logits forced to 1e4, minus that of the network without attention and MLP; above 0.

    Every arm at the best rate of its own mean curve over the ladder. Harm is the loss minus that of the same network
    unforced, without qk-layernorm. Supported: the effect's interval lies above 0, so does that of the harm at 1e3, and
    the harm at 1e2 is at most half of that (`from about 1e3`). Contradicted: the interval of the effect, or of the harm
    at 1e3, lies below 0. The scale is that of q and k of unaligned directions: the logits' upper bound is kappa times
    the root of the head dimension, 4 here and 8 in the paper.
    """
    grid = Grid(runs)

    def loss(arm: str, draw_D: np.ndarray) -> float:
        return float(np.mean([grid.curve_R(size, arm, draw_D).min() for size in grid.sizes]))

    def harm(arm: str) -> Interval:
        return grid.interval(lambda draw_D: loss(arm, draw_D) - loss(NO_QK, draw_D))

    effect = grid.interval(lambda draw_D: loss(DESTROYS, draw_D) - loss(BIGRAM, draw_D))
    harms = {arm: harm(arm) for arm in KAPPAS}
    verdicts = (above_zero(effect), above_zero(harms[HARMFUL]))
    starts = harms[MILD].value <= MILD_SHARE * harms[HARMFUL].value
    verdict: Verdict = "contradicted" if "contradicted" in verdicts else "inconclusive"
    return Judgement(
        verdict="supported" if set(verdicts) == {"supported"} and starts else verdict,
        effect=effect.value,
        interval=effect.bounds,
        meaning="nats of final loss, logits forced to 1e4 minus no attention and MLP, each at its best rate",
        detail={
            "loss at the best rate": {arm: loss(arm, grid.everyone) for arm in grid.arms},
            "harm of forcing": {f"{KAPPAS[arm]:g}": measured.value for arm, measured in harms.items()},
            "harm at 1e3": harms[HARMFUL]._asdict(),
        },
    )


def _mean_loss(grid: Grid, arm: str, draw_D: np.ndarray) -> float:
    """Capped final loss, mean over sizes and rates."""
    return float(np.mean([grid.curve_R(size, arm, draw_D) for size in grid.sizes]))


def _end(run: RunResult, name: str) -> float:
    signal = run.signals.get(name)
    values = [] if signal is None else [value for value in signal.values if math.isfinite(value) and value > 0]
    if not values:
        raise ValueError(f"run {run.size} {run.arm} lr {run.lr:g} seed {run.seed}: no finite measurement of {name}")
    return float(np.mean(values[-LAST:]))
