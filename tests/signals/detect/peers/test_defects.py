"""planted: each adapter has the defects of its source. A test here fails when somebody "fixes" an adapter."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from aftershock.signals.detect.registry import DETECTORS, OURS, detector
from aftershock.signals.detect.robust import Robust
from aftershock.signals.detect.rule import Rule, verdicts

Firings = list[int]


def _noise(n: int, *, level: float = 2.2, sigma: float = 0.02, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(level, sigma) for _ in range(n)]


def _fires(rule: Rule[Any], values: list[float]) -> Firings:
    return [i for i, verdict in enumerate(verdicts(rule, values)) if verdict != "ok"]


BLIND_AFTER_NAN = {
    "kill-loss-spike": 100,
    "stability-monitor": 128,
    "spike-score": 1000,
    "levanter-update": 128,
    "trainscope": 200,
    "trainscope-z": 200,
    "marin-update": 128,
}
"""Steps for which one NaN blinds a rule: the length of the window it stays in."""


@pytest.mark.parametrize(("name", "blind"), BLIND_AFTER_NAN.items())
def test_pitfall_1_one_nan_blinds_the_window(name: str, blind: int) -> None:
    rule, values = detector(name), _noise(1100)
    spikes = [50.0] * 6  # six in a row: enough for those that wait
    assert 1100 not in _fires(rule, [*values, math.nan]), "the NaN itself goes unnoticed"
    assert set(_fires(rule, [*values, *spikes])) & set(range(1100, 1106)), "armed without a NaN"
    early = _fires(rule, [*values, math.nan, *_noise(blind - 8, seed=1), *spikes])
    assert [i for i in early if i >= 1100] == []
    late = _fires(rule, [*values, math.nan, *_noise(blind + 40, seed=1), *spikes])
    assert late, "armed again once the NaN has left the window"
    assert late[-1] > 1100 + blind


@pytest.mark.parametrize("name", ["zclip", "gradient-spike-score"])
def test_pitfall_1_one_nan_blinds_for_ever(name: str) -> None:
    """ZClip: one NaN norm, 1,000 good ones, then 1000.0: no clip."""
    rule, values = detector(name), _noise(200, level=0.25, sigma=0.01)
    assert 200 in _fires(rule, [*values, 1000.0])
    assert [i for i in _fires(rule, [*values, math.nan, *_noise(1000, level=0.25, seed=1), 1000.0]) if i >= 200] == []


def test_pitfall_1_metaseq_with_a_threshold_is_silent_for_ever() -> None:
    values = [*_noise(50), math.nan, *_noise(1000, seed=1), 100.0]
    assert _fires(detector("metaseq", threshold=1.25), values) == []


def test_olmo_skips_128_good_steps_after_one_nan() -> None:
    fires = _fires(detector("olmo-skip"), [*_noise(150), math.nan, *_noise(249, seed=1)])
    assert fires == list(range(150, 150 + 1 + 128))


def test_delayed_mean_is_blind_500_steps_after_a_nan_for_500_steps() -> None:
    values = [*_noise(600), math.nan, *_noise(2000, seed=1)]
    for at, seen in ((1000, True), (1300, False), (1500, False), (2200, True)):
        spiked = list(values)
        spiked[at] = 100.0
        assert (at in _fires(detector("delayed-mean"), spiked)) == seen


def test_spam_is_off_for_20_of_500_steps_and_blind_after_a_nan() -> None:
    values = _noise(1100, level=0.25, sigma=0.01)
    for at, seen in ((10, False), (30, True), (499, True), (505, False), (530, True)):
        assert (at in _fires(detector("spam"), [*values[:at], 1e4, *values[at + 1 :]])) == seen
    assert _fires(detector("spam"), [*values[:100], math.nan, *values[101:400], 1e4]) == []


@pytest.mark.parametrize("name", ["megatron", "mindformers", "axolotl", "rms-ratio", "curvature", "logit-cap"])
def test_a_nan_passes_unnoticed(name: str) -> None:
    rule = detector(name)
    assert _fires(rule, [0.5] * 150 + [math.nan] * 5) == []
    assert _fires(rule, [0.5] * 150 + [1e6] * 5)[-1] == 154


@pytest.mark.parametrize("name", ["flagscale", "internevo"])
def test_a_nan_hides_the_spike_behind_it(name: str) -> None:
    rule = detector(name)
    assert _fires(rule, [2.2, 2.2, 9.0]) == [2]
    assert _fires(rule, [2.2, 2.2, math.nan, 9.0]) == []


def test_dlib_knows_of_a_nan_up_to_29_steps_late_and_grows_patient() -> None:
    rule = detector("dlib")
    assert _fires(rule, [math.nan if t == 1 else 2 - 0.01 * t for t in range(60)]) == [29]
    state = rule.init()
    for t in range(30):
        state, _ = rule.update(state, 2 + 0.1 * t)
    assert state[:2] == ((), 0)
    assert state.threshold == pytest.approx(0.999)
    assert _fires(rule, [2 - 0.001 * t + (9 if t == 70 else 0) for t in range(90)]) == [], "one spike is no slope"


@pytest.mark.parametrize("name", ["olmo-skip", "levanter-skip", "stability-monitor", "levanter-update", "trainscope-z"])
def test_pitfall_2_a_spike_masks_those_after_it(name: str) -> None:
    """Norms 0.25, then 100, 20, 20, 20: the first is seen, the three are not."""
    values = [*_noise(250, level=0.25, sigma=0.01), 100.0, 20.0, 20.0, 20.0]
    assert [i for i in _fires(detector(name), values) if i >= 250] == [250]


BLIND_AT_START = {
    "kill-loss-spike": 100,
    "delayed-mean": 500,
    "megatron": 100,
    "olmo-skip": 63,
    "levanter-skip": 64,
    "stability-monitor": 128,
    "spike-score": 1000,
    "zclip": 25,
    "levanter-update": 128,
    "trainscope": 30,
    "trainscope-z": 30,
    "trainscope-percentile": 30,
    "spam": 20,
    "marin-update": 128,
    "median-mad": 16,
}
"""The first step at which a rule can fire."""


@pytest.mark.parametrize(("name", "armed"), BLIND_AT_START.items())
def test_pitfall_3_blind_at_the_start(name: str, armed: int) -> None:
    rule = detector(name)
    assert _fires(rule, [*_noise(armed - 1), 1e4]) == []
    patience = 4 if name == "kill-loss-spike" else 0
    assert _fires(rule, [*_noise(armed), *[1e4, 1e5, 1e6, 1e7, 1e8][: patience + 1]])[-1:] == [armed + patience]


@pytest.mark.parametrize("name", ["zclip", "levanter-skip", "levanter-update", "median-mad", "trainscope"])
def test_pitfall_4_any_move_of_a_constant_signal_is_a_spike(name: str) -> None:
    assert _fires(detector(name), [2.2] * 300 + [2.2 + 1e-4]) == [300]


def test_pitfall_4_stability_monitor_sees_nothing_on_a_constant_signal() -> None:
    assert _fires(detector("stability-monitor"), [2.2] * 300 + [1e6]) == []


@pytest.mark.parametrize("name", ["lightning", "flagscale", "median-mad"])
def test_pitfall_7_a_step_of_the_level_alarms_for_ever(name: str) -> None:
    fires = _fires(detector(name), _noise(200) + _noise(3000, level=8, seed=1))
    assert fires == list(range(200, 3200))


def test_pitfall_7_metaseq_alarms_for_ever_and_by_default_from_the_start() -> None:
    values = _noise(200) + _noise(3000, level=8, seed=1)
    assert _fires(detector("metaseq", threshold=1.25), values) == list(range(200, 3200))
    assert _fires(detector("metaseq"), values) == list(range(1, 3200))


@pytest.mark.parametrize(
    ("name", "level"), [("axolotl", 8.0), ("mindformers", 8.0), ("rms-ratio", 8.0), ("logit-cap", 120.0)]
)
def test_pitfall_7_an_absolute_limit_alarms_for_ever(name: str, level: float) -> None:
    assert len(_fires(detector(name), _noise(3000, level=level))) >= 2998
    assert _fires(detector(name), _noise(300, level=0.1, sigma=0.001) + [0.9]) == []


@pytest.mark.parametrize("name", ["trainscope", "trainscope-percentile", "spike-score"])
def test_pitfall_8_fast_improvement_fires(name: str) -> None:
    assert 1200 in _fires(detector(name), _noise(1200) + [1.0])


def test_lightning_is_blind_below_three_times_the_mean() -> None:
    assert _fires(detector("lightning"), [2.0] * 50 + [5.99]) == []
    assert _fires(detector("lightning"), [2.0] * 50 + [6.0]) == [50]


def test_kill_loss_spike_does_not_see_four_steps() -> None:
    assert _fires(detector("kill-loss-spike"), [2.0] * 100 + [9.0] * 4 + [2.0] * 20) == []
    assert _fires(detector("kill-loss-spike"), [2.0] * 100 + [9.0] * 5 + [2.0] * 20) == [104]


def test_kill_loss_spike_high_losses() -> None:
    """Half of the last 100 above the largest of the first 100, from step 200 on."""
    fires = _fires(detector("kill-loss-spike"), [2.0] * 199 + [3.0] * 100)
    assert fires[0] == 249


def test_megatron_measures_against_the_start() -> None:
    falling = [11.0] * 100 + [2.0] * 1000
    assert _fires(detector("megatron"), [*falling, 109.0]) == []
    assert _fires(detector("megatron"), [*falling, 110.0]) == [1100]


def test_axolotl_counts_to_three() -> None:
    assert _fires(detector("axolotl"), [2.0, 6.0, 6.0, 2.0, 6.0, 6.0, math.nan, 6.0, 6.0, 6.0]) == [9]


def test_trainscope_percentile_fires_on_two_percent_by_construction() -> None:
    share = len(_fires(detector("trainscope-percentile"), _noise(4000))) / 4000
    assert 0.015 < share < 0.045


def test_gradient_spike_score_and_marin_ratios() -> None:
    assert _fires(detector("gradient-spike-score"), [1.0] * 100 + [50.0]) == []
    assert _fires(detector("gradient-spike-score"), [1.0] * 100 + [50.1]) == [100]
    assert _fires(detector("marin-update"), [1.0] * 128 + [2.0, 2.1]) == [129]


def test_curvature_can_ask_for_a_sustained_crossing() -> None:
    assert _fires(detector("curvature"), [0.9, 1.1, 0.9]) == [1]
    assert _fires(detector("curvature", sustained=2), [0.9, 1.1, 0.9, 1.1, 1.1]) == [4]


def test_every_adapter_has_a_defect_here() -> None:
    """The names of all adapters stand in this file."""
    from pathlib import Path

    text = Path(__file__).read_text("utf-8")
    assert [name for name in DETECTORS if name != OURS and f'"{name}"' not in text] == []


def test_ours_has_none_of_them() -> None:
    values = _noise(250, level=0.25, sigma=0.01)
    assert _fires(Robust(), [*values, 100.0, 20.0, 20.0, 20.0]) == [250, 251, 252, 253]
    assert _fires(Robust(), [*_noise(150), math.nan, *_noise(249, seed=1)]) == [150]
    assert _fires(Robust(), [*values, math.nan, *_noise(1000, level=0.25, sigma=0.01, seed=1), 1000.0]) == [250, 1251]
