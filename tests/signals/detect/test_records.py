"""planted: the published spikes on record as numbers. The quiet part in front of BLOOM's nine points is synthetic."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aftershock.signals.detect.registry import DETECTORS, detector
from aftershock.signals.detect.robust import robust_for
from aftershock.signals.detect.rule import Rule, verdicts

BLOOM_FIRST, BLOOM_PEAK = 31214, 31219
BLOOM_LOSS = (2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805)
BLOOM_GRAD = (0.242, 0.947, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0)
"""BLOOM-176B, iterations 31214 to 31222, BigScience chronicles; the loss peaks at 31219."""

SEEDS = range(12)


def _bloom(rule: Rule[Any], signal: str) -> tuple[set[int | None], float]:
    """First firing steps over the seeds, and false alarms per 1,000 quiet steps.

    300 quiet points in front: loss N(2.21, 0.02), gradient norm 0.235 + |N(0, 0.03)|, all losses drawn first.
    """
    first: set[int | None] = set()
    false = 0
    for seed in SEEDS:
        rng = random.Random(seed)
        loss = [rng.gauss(2.21, 0.02) for _ in range(300)]
        grad = [0.235 + abs(rng.gauss(0, 0.03)) for _ in range(300)]
        found = verdicts(rule, [*loss, *BLOOM_LOSS] if signal == "loss" else [*grad, *BLOOM_GRAD])
        false += sum(verdict != "ok" for verdict in found[:300])
        first.add(next((BLOOM_FIRST + i for i, verdict in enumerate(found[300:]) if verdict != "ok"), None))
    return first, 1000 * false / (300 * len(SEEDS))


def test_ours_fires_four_steps_before_the_bloom_peak_and_never_on_its_quiet_part() -> None:
    """On the gradient norm. On the loss alone nobody can: it first moves three steps before its peak."""
    assert _bloom(robust_for("gradient"), "gradient") == ({BLOOM_PEAK - 4}, 0.0)
    assert _bloom(robust_for("loss"), "loss") == ({BLOOM_PEAK - 3}, 0.0)


@pytest.mark.parametrize(
    ("name", "signal", "settings", "first", "most_false"),
    [
        ("lightning", "loss", {}, None, 0),
        ("kill-loss-spike", "loss", {}, None, 0),
        ("megatron", "loss", {}, None, 0),
        ("metaseq", "loss", {"threshold": 1.25}, 31219, 0),
        ("flagscale", "loss", {}, 31219, 0),
        ("olmo-skip", "loss", {}, 31216, 0.3),
        ("stability-monitor", "loss", {}, 31216, 0.3),
        ("trainscope", "loss", {}, 31216, 0.3),
        ("stability-monitor", "gradient", {}, 31215, 0.6),
        ("median-mad", "gradient", {}, 31215, 0.3),
        ("median-mad", "loss", {}, 31216, 0.3),
    ],
)
def test_peers_fire_where_the_survey_measured_them(
    name: str, signal: str, settings: dict[str, Any], first: int | None, most_false: float
) -> None:
    """equivalence: first firing as in the survey's table; false alarms, there over 200 seeds, within one of 3,600."""
    found, false = _bloom(detector(name, **settings), signal)
    assert found == {first}
    assert false <= most_false


def test_zclip_alarms_on_three_percent_of_quiet_steps() -> None:
    """equivalence: 33 in 1,000 in the survey. 12 seeds give about 110 alarms: within 20 %."""
    found, false = _bloom(detector("zclip"), "gradient")
    assert found == {31215}
    assert 26 < false < 40


def test_no_peer_is_earlier_than_ours_without_false_alarms() -> None:
    for name, make in DETECTORS.items():
        for signal in ("loss", "gradient"):
            if signal in make.reads and name != "metaseq":
                found, false = _bloom(make(), signal)
                earliest = min((step for step in found if step is not None), default=BLOOM_PEAK)
                assert earliest >= BLOOM_PEAK - 4 or false > 0, name


def test_bigscience_104b() -> None:
    """B3: gradient norm 12,952 to 262,623, then the loss from 3.11 to 7.71. Only these numbers are on record.

    The levels before are synthetic: the record gives the last one of each, the spread of 10 % and 1 % is ours.
    """
    rng = random.Random(0)
    grad = [12_952 * (1 + 0.1 * rng.gauss(0, 1)) for _ in range(200)] + [262_623.0]
    loss = [3.11 * (1 + 0.01 * rng.gauss(0, 1)) for _ in range(201)] + [7.71]
    assert verdicts(robust_for("gradient"), grad) == ["ok"] * 200 + ["spike"]
    assert verdicts(robust_for("loss"), loss) == ["ok"] * 201 + ["spike"]
