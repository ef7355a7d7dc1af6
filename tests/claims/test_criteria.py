"""Each criterion on losses gives each verdict on a planted study, over the very grid that it will meet."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Judgement, RunResult, Trial
from aftershock.claims.criteria import DEPTH_FAMILY, MUP
from aftershock.lab.sizes import parse_size

Loss = Callable[[str, str, float, int], float | None]
Plant = Callable[[str, Loss], list[RunResult]]

JITTER = (-0.01, 0.0, 0.01)
BREAKS = 4.0
"""A loss that fails: 1.7 of a gain of 4.1 is lost."""


def bowl(lr: float, seed: int, *, best: float = 1e-2, curve: float = 0.05) -> float:
    """A stable curve: at most 0.2 of the gain of 4.1 is lost at the ladder's ends."""
    return 2.3 + curve * math.log10(lr / best) ** 2 + JITTER[seed]


def edge_study(**edges: float | None) -> Loss:
    """Without qk-layernorm, width w breaks from the rate `w<w>` on (None: at none), and diverges at 0.3."""

    def loss(size: str, arm: str, lr: float, seed: int) -> float | None:
        edge = edges[f"w{parse_size(size).width}"]
        broken = arm == "no_qk_norm" and edge is not None and lr >= edge
        return (None if lr > 0.2 else BREAKS) if broken else bowl(lr, seed)

    return loss


def penalty(by_seed: Callable[[str, str, int], float]) -> Loss:
    """The bowl plus a penalty (by size, arm, seed) at the two highest rates of the ladder."""
    return lambda size, arm, lr, seed: bowl(lr, seed) + (by_seed(size, arm, seed) if lr > 0.05 else 0.0)


def on(arm: str, amounts: tuple[float, float, float]) -> Loss:
    return penalty(lambda size, which, seed: amounts[seed] if which == arm else 0.0)


def shifted(arm: str, *, own: tuple[float, ...], other: tuple[float, ...], only_lr: float | None = None) -> Loss:
    """Losses or, with `only_lr`, one rate's losses of the arm and of all others, by seed."""

    def loss(size: str, which: str, lr: float, seed: int) -> float:
        shift = own[seed] if which == arm else other[seed]
        return bowl(lr, 1) + (shift if only_lr is None or lr == only_lr else 0.0)

    return loss


def warmups(*amounts: float) -> Loss:
    arms = ("warmup:0", "warmup:2", "baseline", "warmup:40")
    return penalty(lambda size, arm, seed: amounts[arms.index(arm)])


def family_slopes(deep: tuple[float, float, float], wide: float) -> Loss:
    """Penalty a doubling of N in depth (by seed) and in width."""

    def amount(size: str, arm: str, seed: int) -> float:
        doublings = math.log2(parse_size(size).num_block_params / parse_size("32x2").num_block_params)
        return 0.5 + doublings * (deep[seed] if size in DEPTH_FAMILY else wide)

    return penalty(amount)


def drifting(*, baseline: float, mup: float, gain: float = 0.0, calm: float = 0.0) -> Loss:
    """The best rate falls as width^-power; muParam gains `gain` at every rate and `calm` off the best ones."""

    def loss(size: str, arm: str, lr: float, seed: int) -> float:
        is_mup = arm == MUP and size != "16x2"
        best = 1e-2 * (16 / parse_size(size).width) ** (mup if arm == MUP else baseline)
        level = bowl(lr, seed, best=best, curve=0.1)
        return level - (gain + JITTER[seed] + (calm if lr > 0.2 else 0.0) if is_mup else 0.0)

    return loss


FALLING = edge_study(w16=0.3, w32=0.1, w64=0.03, w96=0.03)
SAME_EDGE = edge_study(w16=0.1, w32=0.1, w64=0.1, w96=0.1)

PLANTED: list[tuple[str, str, Loss]] = [
    ("P1", "supported", FALLING),
    ("P1", "supported", edge_study(w16=None, w32=0.3, w64=0.1, w96=0.03)),
    ("P1", "contradicted", edge_study(w16=0.03, w32=0.1, w64=0.3, w96=0.3)),
    ("P1", "inconclusive", SAME_EDGE),
    ("P1", "inconclusive", edge_study(w16=None, w32=None, w64=None, w96=None)),
    ("P2", "supported", SAME_EDGE),
    ("P2", "supported", on("no_qk_norm", (0.3, 0.4, 0.5))),
    ("P2", "contradicted", on("baseline", (0.3, 0.4, 0.5))),
    ("P2", "contradicted", penalty(lambda size, arm, seed: 1.0 * ((arm == "baseline") == (size == "16x2")))),
    ("P2", "inconclusive", on("no_qk_norm", (-0.1, 0.1, 0.2))),
    ("P3", "supported", FALLING),
    ("P3", "contradicted", shifted("no_qk_norm", own=(0.29, 0.3, 0.31), other=JITTER)),
    ("P3", "inconclusive", shifted("no_qk_norm", own=(0.02, 0.02, 0.02), other=(0.01, 0.0, -0.01), only_lr=3e-2)),
    ("P7", "supported", warmups(0.6, 0.4, 0.2, 0.1)),
    ("P7", "contradicted", warmups(0.1, 0.2, 0.4, 0.6)),
    ("P7", "inconclusive", warmups(0.2, 0.2, 0.2, 0.2)),
    ("P7", "inconclusive", warmups(0.4, 0.6, 0.2, 0.1)),  # not monotone
    ("P8", "supported", on("coupled_decay:0.1", (0.3, 0.4, 0.5))),
    ("P8", "contradicted", on("baseline", (0.3, 0.4, 0.5))),
    ("P8", "inconclusive", on("baseline", (-0.1, 0.1, 0.2))),
    ("P9", "supported", family_slopes((0.3, 0.4, 0.5), 0.1)),
    ("P9", "contradicted", family_slopes((0.0, 0.0, 0.1), 0.4)),
    ("P9", "inconclusive", family_slopes((0.1, 0.3, 0.5), 0.3)),
    ("P10", "supported", drifting(baseline=0.3, mup=0.0, calm=-1.0)),
    ("P10", "contradicted", drifting(baseline=0.0, mup=0.3, calm=-1.0)),
    ("P10", "contradicted", drifting(baseline=0.3, mup=0.0, calm=-1.0, gain=0.2)),  # a better loss
    ("P10", "contradicted", drifting(baseline=0.3, mup=0.0, calm=0.1)),  # a lower sensitivity
    ("P10", "inconclusive", drifting(baseline=0.0, mup=0.0)),
    ("P13", "supported", penalty(lambda size, arm, seed: 0.5 + JITTER[seed])),
    ("P13", "contradicted", penalty(lambda s, arm, seed: (1.0 if arm.startswith("batch:32") else 0.5) + JITTER[seed])),
    # the others equal, the baseline's seeds spread: 2.8 deviations on average, 1.4 by its nearest seed
    ("P13", "inconclusive", penalty(lambda s, arm, seed: (0.51, 0.50, 0.49)[seed] if arm == "baseline" else 0.52)),
    ("P17", "supported", on("qk_norm_width", (0.3, 0.4, 0.5))),
    ("P17", "supported", on("qk_norm_width", (0.0, 0.0, 0.0))),
    ("P17", "contradicted", on("baseline", (0.3, 0.4, 0.5))),
    ("P17", "inconclusive", on("baseline", (0.3, 0.1, -0.1))),
]


def judged(claim_id: str, runs: list[RunResult]) -> Judgement:
    trial = find_claim(claim_id).trial
    assert isinstance(trial, Trial)
    return trial.criterion(runs)


@pytest.mark.parametrize(("claim_id", "verdict", "loss"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED])
def test_planted_verdicts(plant: Plant, claim_id: str, verdict: str, loss: Loss) -> None:
    result = judged(claim_id, plant(claim_id, loss))
    assert result.verdict == verdict, result
    low, high = result.interval
    assert low <= high
    assert result.meaning
    json.dumps(result.detail)


def test_every_criterion_on_losses_has_all_three() -> None:
    """contract."""
    found = {(claim_id, verdict) for claim_id, verdict, _ in PLANTED}
    ids = ("P1", "P2", "P3", "P7", "P8", "P9", "P10", "P13", "P17")
    assert found == set(itertools.product(ids, ("supported", "contradicted", "inconclusive")))


def test_planted_p1_slope(plant: Plant) -> None:
    """Failing rates 0.3, 0.1, 0.03, 0.03 over widths 16 to 96; by numpy's own fit of log against log."""
    log_n = np.log10([12 * 2 * width**2 for width in (16, 32, 64, 96)])
    expected = np.polyfit(log_n, np.log10([0.3, 0.1, 0.03, 0.03]), 1)[0]
    result = judged("P1", plant("P1", FALLING))
    assert result.effect == pytest.approx(expected, rel=1e-9)  # the same least squares
    assert result.interval == pytest.approx((expected, expected), rel=1e-9)  # the seeds agree
    assert result.detail["slope"]["baseline"] == 0.0
    assert result.detail["seeds that fail at no rate"]["16x2 baseline"] == 3


def test_planted_p8_takes_the_better_range(plant: Plant) -> None:
    """A curve that is bad only at 0.3 is not sensitive over 1e-4..1e-1."""
    at_end = judged("P8", plant("P8", lambda size, arm, lr, seed: 2.3 + (1.0 if lr > 0.2 else 0.0)))
    assert set(at_end.detail["LR sensitivity"].values()) == {0.0}


def test_a_diverged_run_counts_as_l0(plant: Plant) -> None:
    """planted: one of seven rates diverged adds (l0 - best) / 7 = 4.1 / 7 to an otherwise flat curve."""
    result = judged("P2", plant("P2", lambda s, arm, lr, seed: None if arm == "no_qk_norm" and lr > 0.2 else 2.3))
    assert result.effect == pytest.approx(-4.1 / 7, rel=1e-12)
