"""Criteria that read signals: log Z, attention logits with the norms of q and k, block outputs.

Legend: D seeds of one draw. Fixed before any run of their studies; rules of the verdicts: see `claims.criteria`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aftershock.claims.claim import Judgement, RunResult, Verdict
from aftershock.claims.criteria import BASELINE, NO_QK, above_zero, at_least
from aftershock.claims.grid import Grid, slope
from aftershock.forecast.sensitivity import run_fails

NEITHER, Z_ONLY, DECAY_ONLY = "no_decay+no_z_loss", "no_decay", "no_z_loss"
RELU2 = "relu2_attention+no_qk_norm"
ABS_LOG_Z = "output/head/abs_log_z"
LOGIT, Q_NORM, K_NORM = (f"attn/blocks.0/{stat}" for stat in ("max_abs_logit", "q_norm", "k_norm"))

LAST = 5
"""A final value is the mean of this many last finite measurements."""
MIN_RATIO, MIN_SHARE, MIN_GROWTH = 10.0, 0.8, 2.0
"""The published limits of P6 and P15, and of P14; a run whose logits did not even double has no growth to explain."""


class Growth(NamedTuple):
    """Growth from the first measurement to the peak of the max |attention logit| of block 0, as natural logs."""

    logit: float
    norms: float


def log_z_drifts(runs: Sequence[RunResult]) -> Judgement:
    """P6: final |log Z| without decay and z-loss, over that with one of them; at least 10.

    A ratio is a geometric mean over the study's (high) rates and over seeds. The effect is the smallest of: the ratio
    to z-loss alone at each size, and the ratio to weight decay alone at the largest size; all must reach 10. A
    diverged run counts with its last finite measurements.
    """
    grid = Grid(runs)

    def log_ratio(size: str, arm: str, draw_D: np.ndarray) -> float:
        cells = [(lr, int(s)) for lr in grid.lrs.tolist() for s in draw_D]
        pairs = [(grid.run(size, NEITHER, *cell), grid.run(size, arm, *cell)) for cell in cells]
        return float(np.mean([math.log(_final(a, ABS_LOG_Z) / _final(b, ABS_LOG_Z)) for a, b in pairs]))

    def smallest(draw_D: np.ndarray) -> float:
        ratios = [log_ratio(size, Z_ONLY, draw_D) for size in grid.sizes]
        return math.exp(min(*ratios, log_ratio(grid.sizes[-1], DECAY_ONLY, draw_D)))

    measured = grid.interval(smallest)
    finals = {
        f"{size} {arm} lr {lr:g}": float(
            np.exp(np.mean([math.log(_final(grid.run(size, arm, lr, int(s)), ABS_LOG_Z)) for s in grid.everyone]))
        )
        for size in grid.sizes
        for arm in grid.arms
        for lr in grid.lrs.tolist()
    }
    return Judgement(
        verdict=at_least(measured, MIN_RATIO),
        effect=measured.value,
        interval=measured.bounds,
        meaning="final |log Z| with neither remedy over that with one, smallest ratio that the claim needs",
        detail={
            "ratio to z-loss alone": {s: math.exp(log_ratio(s, Z_ONLY, grid.everyone)) for s in grid.sizes},
            "ratio to weight decay alone": {s: math.exp(log_ratio(s, DECAY_ONLY, grid.everyone)) for s in grid.sizes},
            "final |log Z|": finals,
        },
    )


def norms_explain_growth(runs: Sequence[RunResult]) -> Judgement:
    """P14: sum of the log-growth of |q| |k| over the sum of that of max |logit|, in failed runs; at least 0.8.

    Runs without qk-layernorm, at the failing rate of their own size and seed or above, that failed. Growth goes from
    the first measurement to the one where max |logit| of block 0 peaks; |q| and |k| are means over tokens. Runs whose
    logits did not double are left out. Without any run left: inconclusive. More than 1 means that alignment fell.
    """
    grid = Grid(runs)
    by_seed: list[list[Growth]] = []
    alignment: dict[str, list[float]] = {}
    for s in grid.everyone.tolist():
        found: list[Growth] = []
        for size in grid.sizes:
            for run in _failed(grid, size, NO_QK, s):
                growth = _growth(run)
                if growth.logit >= math.log(MIN_GROWTH):
                    found.append(growth)
                    alignment.setdefault(f"{size} lr {run.lr:g}", []).append(growth.norms / growth.logit)
        by_seed.append(found)

    def share(draw_D: np.ndarray) -> float:
        chosen = [growth for s in draw_D for growth in by_seed[s]]
        return sum(g.norms for g in chosen) / sum(g.logit for g in chosen) if chosen else math.nan

    measured = grid.interval(share)
    return Judgement(
        verdict=at_least(measured, MIN_SHARE),
        effect=measured.value,
        interval=measured.bounds,
        meaning="share of the log-growth of the max attention logit that |q| |k| explains, failed runs",
        detail={
            "share, mean over seeds": {key: float(np.mean(values)) for key, values in alignment.items()},
            "runs": {"failed, with growth": float(sum(map(len, by_seed)))},
        },
    )


def relu2_logits_grow(runs: Sequence[RunResult]) -> Judgement:
    """P15: peak over first max |attention logit| of block 0 at the failing rate, without softmax; at least 10.

    Geometric mean over sizes and seeds, each at its own failing rate; a size and seed that fails at no rate is left
    out. Without any left: inconclusive. The detail has the ratio at the highest rate for all.
    """
    grid = Grid(runs)
    logs: dict[tuple[str, int], float] = {}
    for size in grid.sizes:
        for s in grid.everyone.tolist():
            lr = grid.failing_lr(size, RELU2, s)
            if lr is not None:
                logs[size, s] = _growth(grid.run(size, RELU2, lr, s)).logit

    def ratio(draw_D: np.ndarray) -> float:
        chosen = [logs[size, int(s)] for s in draw_D for size in grid.sizes if (size, int(s)) in logs]
        return math.exp(float(np.mean(chosen))) if chosen else math.nan

    def at_top(size: str) -> float:
        top = [_growth(grid.run(size, RELU2, float(grid.lrs[-1]), s)).logit for s in grid.everyone.tolist()]
        return math.exp(float(np.mean(top)))

    measured = grid.interval(ratio)
    return Judgement(
        verdict=at_least(measured, MIN_RATIO),
        effect=measured.value,
        interval=measured.bounds,
        meaning="growth of the max attention logit at the failing rate, squared ReLU in place of softmax",
        detail={
            "seeds that fail": {size: float(sum(key[0] == size for key in logs)) for size in grid.sizes},
            "growth at the highest rate": {size: at_top(size) for size in grid.sizes},
        },
    )


def outputs_grow(runs: Sequence[RunResult]) -> Judgement:
    """P16: slopes of log10 of the final block-output RMS against log10 LR, and against log10 depth; both above 0.

    Against the rate: after the last block, over the whole ladder, mean over sizes. Against depth: over the blocks 1..L
    of the deepest model, at the two highest rates. The effect is the smaller slope. Supported: its interval lies above
    0. Contradicted: the interval of one of the two lies below.
    """
    grid = Grid(runs)
    places = {s: sorted(_blocks(grid.ladder(s, BASELINE, 0)[0]), key=_block_number) for s in grid.sizes}
    deepest = max(grid.sizes, key=lambda size: len(places[size]))

    def log_rms(size: str, name: str, lr: float, draw_D: np.ndarray) -> float:
        return float(np.mean([math.log10(_final(grid.run(size, BASELINE, lr, int(s)), name)) for s in draw_D]))

    def against_lr(size: str, draw_D: np.ndarray) -> float:
        return slope(np.log10(grid.lrs), [log_rms(size, places[size][-1], lr, draw_D) for lr in grid.lrs.tolist()])

    def against_depth(lr: float, draw_D: np.ndarray) -> float:
        names = places[deepest]
        return slope(np.log10(np.arange(1, len(names) + 1)), [log_rms(deepest, name, lr, draw_D) for name in names])

    top = grid.lrs[-2:].tolist()
    by_lr = grid.interval(lambda draw_D: float(np.mean([against_lr(size, draw_D) for size in grid.sizes])))
    by_depth = grid.interval(lambda draw_D: float(np.mean([against_depth(lr, draw_D) for lr in top])))
    smaller = by_lr if by_lr.value <= by_depth.value else by_depth
    verdicts = (above_zero(by_lr), above_zero(by_depth))
    verdict: Verdict = "contradicted" if "contradicted" in verdicts else "inconclusive"
    return Judgement(
        verdict="supported" if verdicts == ("supported", "supported") else verdict,
        effect=smaller.value,
        interval=smaller.bounds,
        meaning="decades of block-output RMS per decade of learning rate or of depth, the smaller of the two",
        detail={
            "against the rate": by_lr._asdict(),
            "against depth": by_depth._asdict(),
            "against the rate, by size": {size: against_lr(size, grid.everyone) for size in grid.sizes},
            f"against depth in {deepest}, by rate": {f"{lr:g}": against_depth(lr, grid.everyone) for lr in top},
        },
    )


def _failed(grid: Grid, size: str, arm: str, s: int) -> list[RunResult]:
    """Runs of one seed that failed above its best rate."""
    start = grid.failing_lr(size, arm, s)
    if start is None:
        return []
    ladder = grid.ladder(size, arm, s)
    best = min(run.final_loss for run in ladder if run.final_loss is not None and math.isfinite(run.final_loss))
    return [r for r in ladder if r.lr >= start and run_fails(r.final_loss, best=best, l0=r.initial_loss)]


def _growth(run: RunResult) -> Growth:
    logit, q, k = (_values(run, name) for name in (LOGIT, Q_NORM, K_NORM))
    finite = np.isfinite(logit) & np.isfinite(q) & np.isfinite(k)
    if not finite.any():
        raise ValueError(f"run {run.size} {run.arm} lr {run.lr:g} seed {run.seed}: no finite measurement of {LOGIT}")
    logit, norms = logit[finite], (q * k)[finite]
    peak = int(logit.argmax())
    return Growth(math.log(logit[peak] / logit[0]), math.log(norms[peak] / norms[0]))


def _final(run: RunResult, name: str) -> float:
    values = _values(run, name)
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError(f"run {run.size} {run.arm} lr {run.lr:g} seed {run.seed}: no finite measurement of {name}")
    return float(values[-LAST:].mean())


def _values(run: RunResult, name: str) -> np.ndarray:
    signal = run.signals.get(name)
    if signal is None:
        raise ValueError(f"run {run.size} {run.arm} lr {run.lr:g} seed {run.seed} has not recorded {name}")
    return np.asarray(signal.values, dtype=float)


def _blocks(run: RunResult) -> list[str]:
    return [name for name in run.signals if name.startswith("output/blocks.") and name.endswith("/rms")]


def _block_number(name: str) -> int:
    return int(name.split("/")[1].removeprefix("blocks."))
