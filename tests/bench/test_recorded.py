from __future__ import annotations

from typing import Any

import pytest

from aftershock.bench import recorded
from aftershock.bench.recorded import on_record
from aftershock.signals.detect.registry import OURS


@pytest.fixture(autouse=True)
def _few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "SEEDS", range(25))


@pytest.mark.parametrize(
    ("name", "settings", "signal", "lead", "per_1000"),
    [
        ("lightning", {}, "loss", None, 0.0),
        ("kill-loss-spike", {}, "loss", None, 0.0),
        ("megatron", {}, "loss", None, 0.0),
        ("metaseq", {"threshold": 1.25}, "loss", 0, 0.0),
        ("flagscale", {}, "loss", 0, 0.0),
        ("stability-monitor", {}, "loss", 3, 0.0),
        ("stability-monitor", {}, "gradient", 4, 0.02),
        ("trainscope", {}, "loss", 3, 0.03),
        ("zclip", {}, "gradient", 4, 33.0),
        ("median-mad", {}, "gradient", 4, 0.0),
        ("median-mad", {}, "loss", 3, 0.0),
    ],
)
def test_bloom_as_the_survey_measured_it(
    name: str, settings: dict[str, Any], signal: str, lead: float | None, per_1000: float
) -> None:
    """equivalence: first firing, and false alarms within the noise of 7,500 quiet steps."""
    (found,) = [seen for seen in on_record("bloom", name, settings) if seen.signal == signal]
    assert found.lead == lead
    assert found.fired == float(lead is not None)
    # four standard errors of a count of alarms in 7,500 steps, at least 3 of them
    assert abs(found.false_per_1000 - per_1000) <= max(4 * (per_1000 * 7.5) ** 0.5, 3) / 7.5


def test_ours_on_both_records() -> None:
    """planted: four steps before BLOOM's peak on the gradient, one before that of 104B."""
    loss, gradient = on_record("bloom", OURS)
    assert (loss.lead, gradient.lead) == (3, 4)
    assert loss.false_per_1000 == 0
    assert [seen.lead for seen in on_record("bigscience", OURS)] == [0, 1]
