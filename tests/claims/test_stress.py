"""The criteria of eps against the gradient and of forced logits, each verdict on a planted study."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from aftershock.claims.claim import RunResult
from aftershock.claims.criteria import BASELINE, NO_QK
from aftershock.claims.forecast_criteria import FORECAST_TRIALS
from aftershock.claims.stress import (
    BIGRAM,
    EPS_ARMS,
    GRADIENT,
    KAPPAS,
    UPDATE,
    eps_meets_the_gradient,
    forced_logits_destroy,
)
from aftershock.lab.sizes import parse_size
from aftershock.lab.sweep import expand

Value = Callable[[str, str, float, int], float]
Plant = Callable[..., list[RunResult]]
Study = Callable[[str, Value, Value, Value], list[RunResult]]


@pytest.fixture
def study(plant: Plant) -> Study:
    """`study(claim_id, loss, gradient, update)`: a claim's runs, by size, arm, rate and seed; the last two as ends."""

    def build(claim_id: str, loss: Value, slope: Value, update: Value) -> list[RunResult]:
        def signals(*cell: Any) -> dict[str, list[float]]:
            ends = {GRADIENT: slope(*cell), UPDATE: update(*cell)}
            return {name: [9.0, 9.0, *[end] * 5, math.nan] for name, end in ends.items()}

        return plant(claim_id, loss, signals)

    return build


def result_of(size: str, arm: str, lr: float, seed: int) -> float:
    """log10 of the gradient: falls by 0.4 a decade of N and 0.8 of the rate."""
    return -3.0 - 0.4 * (math.log10(parse_size(size).num_block_params) - 4.3) - 0.8 * (math.log10(lr) + 2)


def gradient(size: str, arm: str, lr: float, seed: int) -> float:
    return 10 ** result_of(size, arm, lr, seed) * (1 + 0.01 * seed)


def shrunk(size: str, arm: str, lr: float, seed: int) -> float:
    """Adam's update under an eps: half of it is left where eps equals the gradient."""
    g = gradient(size, arm, lr, seed)
    return 0.3 * g / (g + EPS_ARMS[arm])


def harmed(size: str, arm: str, lr: float, seed: int) -> float:
    return 2.5 + 0.1 * (math.log10(EPS_ARMS[arm]) + 8) + 0.01 * seed


def unharmed(size: str, arm: str, lr: float, seed: int) -> float:
    return 2.5 - 0.1 * (math.log10(EPS_ARMS[arm]) + 8) + 0.01 * seed


def steady(size: str, arm: str, lr: float, seed: int) -> float:
    return 0.3


def rising(size: str, arm: str, lr: float, seed: int) -> float:
    return 1e-6 / gradient(size, arm, lr, seed)


def mixed(size: str, arm: str, lr: float, seed: int) -> float:
    """Harmed by eps in one seed, helped in another."""
    return 2.5 + 0.1 * (seed - 1) * (math.log10(EPS_ARMS[arm]) + 8)


@pytest.mark.parametrize(
    ("loss", "slope", "update", "verdict"),
    [
        (harmed, gradient, shrunk, "supported"),
        (harmed, gradient, steady, "contradicted"),
        (unharmed, gradient, shrunk, "contradicted"),
        (harmed, rising, shrunk, "contradicted"),
        (mixed, gradient, shrunk, "inconclusive"),
    ],
)
def test_planted_verdicts_of_eps(study: Study, loss: Value, slope: Value, update: Value, verdict: str) -> None:
    """planted."""
    result = eps_meets_the_gradient(study("P11", loss, slope, update))
    assert result.verdict == verdict, result
    json.dumps(result.detail)


def test_planted_fall_and_slopes_are_found(study: Study) -> None:
    """planted: half of the update is lost at eps = g, but for reading it between arms a decade apart."""
    result = eps_meets_the_gradient(study("P11", harmed, gradient, shrunk))
    assert result.effect == pytest.approx(0.5, abs=0.1)
    assert result.detail["gradient against N"]["value"] == pytest.approx(-0.4, abs=1e-6)
    assert result.detail["gradient against the rate"]["value"] == pytest.approx(-0.8, abs=1e-6)
    assert result.detail["loss against eps"]["value"] == pytest.approx(0.1, abs=1e-6)


def destroyed(size: str, arm: str, lr: float, seed: int) -> float:
    """No harm up to 100, half a nat at 1e3, worse than the bigram network's 3 nats at 1e4."""
    level = {NO_QK: 2.4, BIGRAM: 3.0}.get(arm)
    if level is None:
        level = 2.4 + {1000.0: 0.5, 10000.0: 0.9}.get(KAPPAS[arm], 0.02)
    return level + 0.05 * (math.log10(lr) + 2) ** 2 + 0.01 * seed


def milder(size: str, arm: str, lr: float, seed: int) -> float:
    """At 1e4 still better than the bigram network."""
    return destroyed(size, arm, lr, seed) - (0.5 if arm.endswith("10000") else 0.0)


def earlier(size: str, arm: str, lr: float, seed: int) -> float:
    """Harm starts at 1e2 already."""
    return destroyed(size, arm, lr, seed) + (0.4 if arm.endswith(":100") else 0.0)


@pytest.mark.parametrize(
    ("loss", "verdict"), [(destroyed, "supported"), (milder, "contradicted"), (earlier, "inconclusive")]
)
def test_planted_verdicts_of_forced_logits(study: Study, loss: Value, verdict: str) -> None:
    """planted."""
    result = forced_logits_destroy(study("P12", loss, steady, steady))
    assert result.verdict == verdict, result
    json.dumps(result.detail)


def test_harm_is_measured_at_the_best_rate(study: Study) -> None:
    """planted: 0.5 nats at 1e3 and 0.3 above the bigram network at 1e4."""
    result = forced_logits_destroy(study("P12", destroyed, steady, steady))
    assert result.effect == pytest.approx(0.3, abs=1e-9)
    assert result.detail["harm of forcing"]["1000"] == pytest.approx(0.5, abs=1e-9)


def test_a_missing_signal_is_an_error(study: Study) -> None:
    """contract."""
    runs = study("P11", harmed, gradient, shrunk)
    bare = [dataclasses.replace(run, signals={}) for run in runs]
    with pytest.raises(ValueError, match="no finite measurement of update"):
        eps_meets_the_gradient(bare)


@pytest.mark.parametrize("claim_id", ["P11", "P12"])
def test_every_arm_can_be_trained(claim_id: str) -> None:
    """contract: the grid expands, each arm changes something, and the bigram network has no block."""
    planned = expand(FORECAST_TRIALS[claim_id].sweep)
    assert len({item.ref.run_id for item in planned}) == len(planned)
    arms = {item.ref.arm: item.config for item in planned}
    assert arms.get(BASELINE, arms.get(NO_QK)) is not None
    if claim_id == "P12":
        assert arms[BIGRAM].model.depth == 0  # pyright: ignore[reportAttributeAccessIssue]
