"""planted: the eight pitfalls of detectors, and what else ours promises. Ours passes all of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from aftershock.signals.detect.robust import Robust, robust_for
from aftershock.signals.detect.rule import ALARMS, Verdict, verdicts


def _noise(n: int, *, level: float = 2.2, sigma: float = 0.02, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(level, sigma) for _ in range(n)]


def _alarms(found: list[Verdict]) -> list[int]:
    return [i for i, verdict in enumerate(found) if verdict in ALARMS]


def test_pitfall_1_armed_at_once_after_a_nan() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        found = verdicts(Robust(), [*_noise(100), bad, 3.0, *_noise(1000, seed=1), 3.0])
        assert _alarms(found) == [100, 101, 1102]
        assert found[100] == "nonfinite"
        assert found[101] == found[1102] == "spike"


def test_pitfall_1_a_nan_before_anything_else() -> None:
    found = verdicts(Robust(), [math.nan] * 50 + _noise(8) + [9.0])
    assert found[:50] == ["nonfinite"] * 50
    assert found[50:] == ["ok"] * 8 + ["spike"]


def test_pitfall_1_armed_at_once_after_a_rewind() -> None:
    rule = Robust()
    state = rule.init()
    for value in [*_noise(200), 9.0, 9.0]:
        state, _ = rule.update(state, value)
    state = rule.rewind(state)
    assert state.high == ()
    state, verdict = rule.update(state, 2.2)
    assert verdict == "ok"
    assert rule.update(state, 3.0).verdict == "spike"


def test_pitfall_2_no_masking() -> None:
    values = _noise(200, level=0.25, sigma=0.01) + [25.0] + _noise(5, level=0.25, sigma=0.01) + [5.0] * 3
    assert _alarms(verdicts(Robust(), values)) == [200, 206, 207, 208]


@pytest.mark.parametrize("at", [8, 12, 20, 40, 63])
def test_pitfall_3_spike_in_the_first_64_steps_of_a_warm_up(at: int) -> None:
    values = [10.8 - 0.06 * t + noise for t, noise in enumerate(_noise(64, level=0, sigma=0.05))]
    values[at] *= 2
    assert _alarms(verdicts(Robust(), values)) == [at]


def test_pitfall_4_a_constant_signal() -> None:
    assert _alarms(verdicts(Robust(), [2.2] * 300)) == []
    assert _alarms(verdicts(Robust(), [0.0] * 300)) == []
    assert _alarms(verdicts(Robust(), [2.2] * 150 + [2.201] * 150)) == []
    assert _alarms(verdicts(Robust(), [2.2] * 150 + [3.0] + [2.2] * 150)) == [150]


def test_pitfall_4_a_quantised_loss() -> None:
    """bf16 has steps of 1/64 between 2 and 4: one step up and down is no event."""
    rng = random.Random(0)
    steps = [round((2.2 + rng.gauss(0, 0.004)) * 64) / 64 for _ in range(4000)]
    assert len(set(steps)) == 3
    assert _alarms(verdicts(Robust(), steps)) == []


def test_pitfall_6_ranks_that_see_the_same_numbers_agree() -> None:
    """A decision is a pure function of state and value: ranks that reduce the value first cannot differ."""
    values = [*_noise(300), 4.0, *_noise(50, seed=1)]
    assert verdicts(Robust(), values) == verdicts(Robust(), list(values))


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 1.5, 3.0, 20.0])
def test_pitfall_7_a_step_of_the_level_does_not_alarm_for_ever(factor: float) -> None:
    values = _noise(400) + [factor * v for v in _noise(600, seed=1)]
    found = verdicts(Robust(), values)
    assert len(_alarms(found)) <= 16
    assert found.count("shift") == (factor > 1)
    assert _alarms(found[416:]) == []
    after = verdicts(Robust(), [*values, 2 * factor * 2.2])
    assert after[-1] == "spike", "the new level is the baseline"


def test_pitfall_8_fast_improvement_is_no_alarm() -> None:
    steep = [1 + 9 * math.exp(-t / 20) + noise for t, noise in enumerate(_noise(600, level=0, sigma=0.02))]
    assert _alarms(verdicts(Robust(), steep)) == []
    dropped = _noise(300) + _noise(300, level=1.5, seed=1)
    assert _alarms(verdicts(Robust(), dropped)) == []
    assert verdicts(Robust(), dropped).count("jump") == 1


@pytest.mark.parametrize("rule", [Robust(), robust_for("gradient")])
def test_no_alarm_in_healthy_noise(rule: Robust) -> None:
    """Gauss, log-normal, half-normal and decaying noise: 0 of 60,000 steps."""
    rng = random.Random(5)
    series = {
        "gauss": [rng.gauss(2.2, 0.02) for _ in range(15_000)],
        "log-normal": [math.exp(rng.gauss(-1, 0.4)) for _ in range(15_000)],
        "half-normal": [0.235 + abs(rng.gauss(0, 0.03)) for _ in range(15_000)],
        "decay": [2 + 8 * math.exp(-t / 300) + rng.gauss(0, 0.05) for t in range(15_000)],
    }
    for name, values in series.items():
        assert _alarms(verdicts(rule, values)) == [], name


def test_a_ramp_is_flagged_before_its_top() -> None:
    """The delay keeps the ramp out of the baseline: ten percent a step fires when it has grown threefold (step 12)."""
    ramp = [0.25 * 1.1**t for t in range(60)]
    found = verdicts(robust_for("gradient"), _noise(300, level=0.25, sigma=0.01) + ramp)
    first = _alarms(found)[0] - 300
    assert 1 <= first <= 13
    assert set(found[300 + first :]) <= {"spike", "shift"}


def test_slow_drift_is_named_and_not_a_spike() -> None:
    rising = [v * (1 + 0.0004 * t) for t, v in enumerate(_noise(2000))]
    found = verdicts(Robust(), _noise(500, seed=1) + rising)
    assert "drift" in found
    assert "spike" not in found
    assert 500 < found.index("drift") < 1200
    assert "drift" not in verdicts(Robust(), _noise(20_000))


def test_drift_onset_is_looked_back_for() -> None:
    rule = Robust()
    state = rule.init()
    for t, value in enumerate(_noise(500, seed=1) + [v * (1 + 0.0004 * t) for t, v in enumerate(_noise(2000))]):
        state, verdict = rule.update(state, value)
        if verdict == "drift":
            assert abs(t - rule.lag(state) - 500) <= 200
            return
    pytest.fail("no drift")


def test_grokking_is_a_jump_in_loss_and_in_accuracy() -> None:
    """phenomenon: held-out loss falls from 8 to 0.01 and accuracy rises from 0.02 to 1 within 100 steps."""
    rng = random.Random(1)
    share = [1 / (1 + math.exp(-(t - 1500) / 15)) for t in range(3000)]
    loss = [8 * (1 - s) * math.exp(rng.gauss(0, 0.02)) + 0.01 * math.exp(rng.gauss(0, 0.1)) for s in share]
    accuracy = [min(1.0, max(0.0, 0.02 + 0.98 * s + rng.gauss(0, 0.002))) for s in share]
    for rule, values in ((robust_for("loss"), loss), (robust_for("accuracy"), accuracy)):
        found = verdicts(rule, values)
        assert set(found) == {"ok", "jump"}
        assert 1400 <= found.index("jump") <= 1520


def test_accuracy_that_collapses_is_a_spike() -> None:
    values = [0.95 + v for v in _noise(300, level=0, sigma=0.005)] + [0.4]
    assert verdicts(robust_for("accuracy"), values)[-1] == "spike"


def test_coming_back_from_a_shift_is_no_jump() -> None:
    found = verdicts(Robust(), _noise(300) + _noise(40, level=5, seed=1) + _noise(300, seed=2))
    assert found.count("shift") == 1
    assert "jump" not in found


def test_spikes_on_a_memorised_loss_of_many_magnitudes() -> None:
    """Values near zero spread by factors, not by amounts: only a rise by a factor is a spike."""
    rng = random.Random(2)
    values = [math.exp(-t / 200 + rng.gauss(0, 0.2)) for t in range(2000)]
    assert _alarms(verdicts(Robust(), values)) == []
    values[1500] *= 10
    assert _alarms(verdicts(Robust(), values)) == [1500]


def test_a_negative_value_ends_the_log_domain_and_nothing_else() -> None:
    rng = random.Random(2)
    values = [0.5 + rng.gauss(0, 0.01) for _ in range(300)] + [0.5 - 0.01 * t for t in range(100)] + [-0.5] * 100
    found = verdicts(Robust(), values)
    assert _alarms(found) == []
    assert verdicts(Robust(), [*values, 1.0])[-1] == "spike"


def test_a_signal_around_zero() -> None:
    values = _noise(500, level=0, sigma=1)
    assert _alarms(verdicts(Robust(), values)) == []
    assert verdicts(Robust(), [*values, 30.0])[-1] == "spike"


def test_growing_noise_does_not_alarm_for_ever() -> None:
    """The spread triples: what is not flagged widens the baseline."""
    found = verdicts(Robust(), _noise(500) + _noise(3000, sigma=0.06, seed=1))
    assert len(_alarms(found[1500:])) == 0


def test_drop_marks_the_end_of_a_spike_not_a_jump() -> None:
    values = [*_noise(300), *[5 - 0.2 * t for t in range(14)], *_noise(200, seed=1)]
    found = verdicts(Robust(), values)
    assert "jump" not in found
    assert all(b - a == 1 for a, b in pairwise(_alarms(found)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"threshold": 0}, "threshold"), ({"window": 4}, "window"), ({"shift_after": 99}, "shift_after")],
)
def test_wrong_settings(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Robust(**settings)


def test_a_run_that_spikes_often_still_spikes() -> None:
    """planted: spikes of x1.8 every 8 steps widen sigma; three times the loss is named all the same, by its role."""
    rng = random.Random(3)
    values = [rng.gauss(1.0, 0.02) * (1.8 if t % 8 < 2 else 1.0) for t in range(400)] + [3.3]
    assert verdicts(Robust(threshold=24.0), values)[-1] == "ok"
    assert verdicts(replace(robust_for("loss"), threshold=24.0), values)[-1] == "spike"


def test_norms_do_not_drift_and_logits_do() -> None:
    """planted: a gradient norm that doubles over 2,000 steps is healthy; a logit that does is growth."""
    values = [value * (1 + t / 2000) for t, value in enumerate(_noise(2000, level=1.0, sigma=0.01))]
    assert "drift" not in verdicts(robust_for("gradient"), values)
    assert "drift" in verdicts(robust_for("logit"), values)
