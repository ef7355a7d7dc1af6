"""Each criterion on signals gives each verdict on a planted study."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from aftershock.claims.catalog import find_claim
from aftershock.claims.claim import Judgement, RunResult, Trial
from aftershock.claims.growth import ABS_LOG_Z, K_NORM, LOGIT, NEITHER, Q_NORM, Z_ONLY

Loss = Callable[[str, str, float, int], float | None]
Signals = Callable[[str, str, float, int], Mapping[str, Sequence[float]]]
Plant = Callable[[str, Loss, Signals], list[RunResult]]


def stable(size: str, arm: str, lr: float, seed: int) -> float | None:
    return 2.3


def fails_at_a_tenth(size: str, arm: str, lr: float, seed: int) -> float | None:
    return None if lr > 0.2 else 4.0 if lr > 0.05 else 2.3


def drift(neither: tuple[float, float, float], z_only: float = 5.0) -> Signals:
    """Final |log Z| without remedies by seed, with z-loss alone, and 5 elsewhere; it starts at 6 and ends in nans."""

    def signals(size: str, arm: str, lr: float, seed: int) -> Mapping[str, Sequence[float]]:
        final = neither[seed] if arm == NEITHER else z_only if arm == Z_ONLY else 5.0
        return {ABS_LOG_Z: [6.0, *[final] * 5, math.nan]}

    return signals


def logits(growth: tuple[float, float, float], share: tuple[float, float, float]) -> Signals:
    """Max |logit| grows to `growth` and falls again; `share` of its log is in the norms, q taking two thirds."""

    def signals(size: str, arm: str, lr: float, seed: int) -> Mapping[str, Sequence[float]]:
        norms = growth[seed] ** share[seed]
        return {
            LOGIT: [2.0, 2.0 * growth[seed], 3.0, math.inf],
            Q_NORM: [1.5, 1.5 * norms ** (2 / 3), 9.0, 9.0],
            K_NORM: [0.5, 0.5 * norms ** (1 / 3), 9.0, 9.0],
        }

    return signals


def outputs(by_lr: tuple[float, float, float], by_depth: tuple[float, float, float]) -> Signals:
    def signals(size: str, arm: str, lr: float, seed: int) -> Mapping[str, Sequence[float]]:
        depth = int(size.split("x")[1])
        return {
            f"output/blocks.{i}/rms": [1.0, *[lr ** by_lr[seed] * (i + 1) ** by_depth[seed]] * 5] for i in range(depth)
        }

    return signals


UP, DOWN, EITHER = (0.4, 0.5, 0.6), (-0.4, -0.5, -0.6), (-0.4, 0.1, 0.6)
MUCH, LITTLE = (100.0, 110.0, 120.0), (3.0, 3.0, 3.0)
FIFTY, SEVEN_TENTHS = (50.0, 50.0, 50.0), (0.7, 0.7, 0.7)

PLANTED: list[tuple[str, str, Loss, Signals]] = [
    ("P6", "supported", stable, drift((500.0, 600.0, 700.0))),
    ("P6", "contradicted", stable, drift((5.0, 6.0, 7.0))),
    ("P6", "contradicted", stable, drift((500.0, 600.0, 700.0), z_only=400.0)),
    ("P6", "inconclusive", stable, drift((25.0, 45.0, 60.0))),
    ("P14", "supported", fails_at_a_tenth, logits(MUCH, (0.9, 1.0, 1.1))),
    ("P14", "contradicted", fails_at_a_tenth, logits(MUCH, (0.2, 0.3, 0.4))),
    ("P14", "inconclusive", fails_at_a_tenth, logits(MUCH, (0.6, 0.7, 0.9))),
    ("P14", "inconclusive", stable, logits(MUCH, (1.0, 1.0, 1.0))),
    ("P14", "inconclusive", fails_at_a_tenth, logits((1.5, 1.5, 1.5), (1.0, 1.0, 1.0))),
    ("P15", "supported", fails_at_a_tenth, logits(MUCH, UP)),
    ("P15", "contradicted", fails_at_a_tenth, logits(LITTLE, UP)),
    ("P15", "inconclusive", fails_at_a_tenth, logits((3.0, 9.0, 20.0), UP)),
    ("P15", "inconclusive", stable, logits(MUCH, UP)),
    ("P16", "supported", stable, outputs(UP, UP)),
    ("P16", "contradicted", stable, outputs(DOWN, UP)),
    ("P16", "contradicted", stable, outputs(EITHER, DOWN)),
    ("P16", "inconclusive", stable, outputs(UP, EITHER)),
]


def judged(claim_id: str, runs: list[RunResult]) -> Judgement:
    trial = find_claim(claim_id).trial
    assert isinstance(trial, Trial)
    return trial.criterion(runs)


@pytest.mark.parametrize(
    ("claim_id", "verdict", "loss", "signals"), PLANTED, ids=[f"{row[0]}-{row[1]}" for row in PLANTED]
)
def test_planted_verdicts(plant: Plant, claim_id: str, verdict: str, loss: Loss, signals: Signals) -> None:
    result = judged(claim_id, plant(claim_id, loss, signals))
    assert result.verdict == verdict, result
    assert not result.interval[0] > result.interval[1]  # both nan where nothing was measured
    assert result.meaning
    json.dumps(result.detail)


def test_every_criterion_on_signals_has_all_three() -> None:
    """contract."""
    found = {(claim_id, verdict) for claim_id, verdict, *_ in PLANTED}
    ids = ("P6", "P14", "P15", "P16")
    assert found == set(itertools.product(ids, ("supported", "contradicted", "inconclusive")))


def test_planted_share_and_growth_are_found(plant: Plant) -> None:
    """The numbers planted: 0.7 of the log-growth, a growth of 50, a ratio of 120, slopes of 0.5."""
    share = judged("P14", plant("P14", fails_at_a_tenth, logits(FIFTY, SEVEN_TENTHS)))
    assert share.effect == pytest.approx(0.7, rel=1e-9)
    assert share.detail["runs"]["failed, with growth"] == 4 * 2 * 3  # sizes, failing rates, seeds
    grown = judged("P15", plant("P15", fails_at_a_tenth, logits(FIFTY, SEVEN_TENTHS)))
    assert grown.effect == pytest.approx(50.0, rel=1e-9)
    ratio = judged("P6", plant("P6", stable, drift((600.0, 600.0, 600.0))))
    assert ratio.effect == pytest.approx(120.0, rel=1e-9)
    slopes = judged("P16", plant("P16", stable, outputs((0.5, 0.5, 0.5), (0.8, 0.8, 0.8))))
    assert slopes.effect == pytest.approx(0.5, rel=1e-9)
    assert slopes.detail["against depth"]["value"] == pytest.approx(0.8, rel=1e-9)


@pytest.mark.parametrize("claim_id", ["P6", "P14", "P15"])
def test_a_signal_that_was_not_recorded_is_an_error(plant: Plant, claim_id: str) -> None:
    with pytest.raises(ValueError, match=r"lr 0.\d+ seed 0 has not recorded"):
        judged(claim_id, plant(claim_id, fails_at_a_tenth, lambda *_: {}))


def test_a_signal_that_is_never_finite_is_an_error(plant: Plant) -> None:
    with pytest.raises(ValueError, match="no finite measurement"):
        judged("P6", plant("P6", stable, lambda *_: {ABS_LOG_Z: [math.nan]}))
