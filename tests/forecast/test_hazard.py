"""hazard: features as a slow way has them, lines that keep their log-odds, and models that survive the disk."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from aftershock.forecast import hazard
from aftershock.forecast.hazard import (
    FLOOR,
    MOST,
    SETS,
    SHAPES,
    SHIPPED,
    SLOTS,
    WINDOW,
    WITHIN,
    Hazard,
    Line,
    Slot,
    Track,
    calibrated,
    feature_names,
    features_of,
    fit_line,
    model_for,
    probability,
    read_hazards,
    write_hazards,
)
from aftershock.forecast.logistic import fit_logistic


def _noise(count: int, *, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [math.exp(rng.gauss(0, 0.3)) for _ in range(count)]


def _hazard(signals: tuple[Slot, ...], coef: float = 0.5) -> Hazard:
    count = len(feature_names(signals))
    lines = tuple(Line(-3.0 + place, (coef,) * count) for place in range(len(WITHIN)))
    return Hazard(signals, (0.0,) * count, (0.01,) * len(WITHIN), lines)


def test_sigmas_are_those_of_the_window() -> None:
    """oracle: median and interquartile range of the last 128 logarithms, sorted anew at each step."""
    values = _noise(400)
    track, logs = Track("gradient"), np.log(values)
    for step, value in enumerate(values):
        track.add(value)
        past = np.sort(logs[max(0, step - WINDOW) : step])
        if len(past) < 20:
            assert track.z == 0
            continue
        n = len(past)
        spread = max((past[3 * n // 4] - past[n // 4]) / 1.3489795, FLOOR["log"])
        assert track.z == pytest.approx((logs[step] - past[n // 2]) / spread, rel=1e-6)  # the constant has 10 digits


def test_the_largest_surprise_fades_as_written() -> None:
    """oracle: it halves in five steps."""
    track, seen = Track("gradient"), []
    for value in [*_noise(60), 50.0, *_noise(12, seed=1)]:
        track.add(value)
        seen.append(track.z)
    fast = 0.0
    for z in seen:
        fast = max(z, 0.87 * fast)
    assert track.fast == pytest.approx(fast)
    assert 0.87**5 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("slot", SLOTS)
def test_features_are_finite_whatever_comes(slot: Slot) -> None:
    """contract: zeros, huge, negative and non-finite values; and a value that is not finite is in no window."""
    track = Track(slot)
    for value in [0.0, 1e300, -5.0, math.nan, math.inf, *[1.0] * 30, math.nan]:
        track.add(value)
        row = features_of({slot: track}, (slot,))
        assert len(row) == len(feature_names((slot,))) == len(SHAPES)
        assert all(map(math.isfinite, row))
    assert track.z == MOST
    track.add(1.0)
    assert track.z < 1


def test_memory_does_not_grow() -> None:
    """property."""
    track = Track("loss")
    for value in _noise(3000):
        track.add(value)
    assert len(track.to_dict()["window"]) == WINDOW


def test_a_track_survives_json() -> None:
    """round trip: in the middle, the same features ever after."""
    values = _noise(300)
    track = Track("update")
    for value in values[:150]:
        track.add(value)
    copy = Track.from_dict("update", json.loads(json.dumps(track.to_dict())))
    for value in values[150:]:
        track.add(value)
        copy.add(value)
        assert copy.features() == track.features()


def test_a_line_is_the_logistic_fit() -> None:
    """equivalence: over features as they are, and over standardized ones."""
    rng = np.random.default_rng(0)
    x_NC = rng.normal(size=(400, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 1.0]
    y_N = rng.random(400) < 1 / (1 + np.exp(1 - x_NC[:, 0]))
    line, fit = fit_line(x_NC, y_N, penalty=1.0), fit_logistic(x_NC, y_N, penalty=1.0)
    assert line.log_odds(x_NC) == pytest.approx(fit.log_odds(x_NC))
    shipped = Line(line.intercept, tuple(line.coef_C.tolist()))
    assert shipped.log_odds(x_NC[7].tolist()) == pytest.approx(fit.log_odds(x_NC)[7])


def test_calibration_takes_overconfidence_away() -> None:
    """planted: log-odds twice as large as they should be are halved, and those that mislead count no more."""
    rng = np.random.default_rng(1)
    x_N = rng.normal(size=4000)
    y_N = rng.random(4000) < 1 / (1 + np.exp(2 - x_N))
    loud = hazard.Fitted(-4.0, np.array([2.0]))
    calm = calibrated(loud, loud.log_odds(x_N[:, None]), y_N)
    # the slope of 4,000 outcomes has a standard error of about 0.06
    assert (calm.intercept, calm.coef_C[0]) == pytest.approx((-2.0, 1.0), abs=0.2)
    flat = calibrated(loud, -loud.log_odds(x_N[:, None]), y_N)
    assert flat.coef_C.tolist() == [0.0]
    assert probability(flat.intercept) == pytest.approx(y_N.mean())


def test_the_model_for_the_signals_at_hand() -> None:
    """contract: the largest of which all signals are there; none without a loss."""
    models = [_hazard(signals) for signals in SETS]
    assert model_for(models, frozenset({"gradient"})) is None
    cases: list[tuple[set[Slot], tuple[Slot, ...]]] = [
        ({"loss"}, ("loss",)),
        ({"loss", "logit"}, ("loss",)),
        ({"loss", "gradient", "log_z"}, ("loss", "gradient")),
        (set(SLOTS), SLOTS),
    ]
    for there, expected in cases:
        found = model_for(models, frozenset(there))
        assert found is not None
        assert found.signals == expected


def test_models_survive_the_disk(tmp_path: Path) -> None:
    """round trip; and a damaged file is refused with its name."""
    models = tuple(_hazard(signals) for signals in SETS)
    path = write_hazards(tmp_path / "a", models, made={"date": "today"})
    assert read_hazards(tmp_path / "a") == models
    data = json.loads(path.read_text())
    data["models"][0]["lines"][0]["coef"].pop()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / path.name).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="another number of coefficients"):
        read_hazards(tmp_path / "b")
    with pytest.raises(ValueError, match="no live forecast is on record"):
        read_hazards(tmp_path)


def test_the_package_has_a_model_for_every_set() -> None:
    """contract: and each starts from a probability that the corpus has."""
    models = read_hazards()
    assert tuple(model.signals for model in models) == SHIPPED
    assert all(0 < base < 0.5 for model in models for base in model.base)
    assert all(list(model.base) == sorted(model.base) for model in models)
