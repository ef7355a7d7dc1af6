"""indicators: scores as a slow loop has them, that know nothing of the future, of signals that the zoo records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aftershock.bench.indicators import (
    BASELINE,
    BEFORE,
    FLOOR,
    INDICATORS,
    LEAST,
    MISSING,
    RECENT,
    WINDOW,
    Indicator,
    Way,
    scores,
)
from aftershock.numerics import median_mad

GRADIENT = Indicator("gradient norm", 2, "grad/all/norm", 1, "log", ("surprise", "trend"))
PAIRS = [(one, way) for one in INDICATORS for way in one.ways]


def _values(count: int = 600) -> np.ndarray:
    return np.exp(np.random.default_rng(0).normal(0, 0.3, count))


def _by_hand(value: float, past: np.ndarray) -> float:
    middle, mad = median_mad(past)
    return (value - middle) / max(mad, FLOOR["log"])


def test_a_surprise_is_the_robust_z_of_the_log() -> None:
    """oracle: median and MAD of the last 128 anew at each step, some of the values not finite."""
    values = _values()
    values[[50, 300]] = np.nan, np.inf
    found = scores(GRADIENT, "surprise", values)
    for t in range(600):
        past = np.log([v for v in values[:t] if np.isfinite(v)])[-WINDOW:]
        if not np.isfinite(values[t]):
            assert found[t] == np.inf
        elif len(past) < LEAST:
            assert found[t] == -np.inf
        else:
            assert found[t] == pytest.approx(_by_hand(np.log(values[t]), past), rel=1e-5)  # kept in float32


def test_a_trend_is_that_of_the_last_steps_median() -> None:
    """oracle: the median of 16 against the 256 steps before them."""
    x = np.log(_values())
    found = scores(GRADIENT, "trend", np.exp(x))
    for t in (30, 34, 35, 100, 271, 272, 500, 599):
        past = x[max(0, t - RECENT + 1 - BEFORE) : t - RECENT + 1]
        expected = -np.inf if len(past) < LEAST else _by_hand(float(np.median(x[t - RECENT + 1 : t + 1])), past)
        assert found[t] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("indicator", "way"), PAIRS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_every_score(indicator: Indicator, way: Way) -> None:
    """contract: causal; higher after a lasting move in the bad direction; inf for nan; the level is the value."""
    values = 0.5 * _values(400)
    moved = values.copy()
    moved[380:] *= 30.0 if indicator.sign > 0 else 1 / 30
    plain, after = scores(indicator, way, values), scores(indicator, way, moved)
    assert plain.shape == (400,)
    assert (plain[:380] == after[:380]).all()
    assert after[395:].min() > plain[50:380].max()
    assert scores(indicator, way, np.full(30, np.nan)).tolist() == [np.inf] * 30
    assert not np.isnan(plain).any()
    if way == "level":
        assert plain == pytest.approx(indicator.sign * values)
    else:
        assert (plain[:LEAST] == -np.inf).all()


def test_a_constant_signal_surprises_nobody() -> None:
    """planted: the floor keeps the least rounding from being many sigmas."""
    values = np.full(300, 2.0)
    values[250:] += 1e-6
    assert np.abs(scores(GRADIENT, "surprise", values)[LEAST:]).max() < 0.01


def test_the_table() -> None:
    """contract: names differ, the baseline is in it, and every number of the survey is there or said to be missing."""
    names = [one.name for one in INDICATORS]
    assert len(set(names)) == len(names)
    assert BASELINE in names
    numbers = {one.number for one in INDICATORS} | {int(name.split(",")[0]) for name in MISSING}
    assert numbers == set(range(1, 21))


def test_the_zoo_records_every_signal(tmp_path: Path) -> None:
    """contract: of a language model, after the 21st step."""
    from aftershock.lab.zoo.record import record
    from aftershock.lab.zoo.registry import specimen
    from aftershock.store.reader import RunReader

    run = RunReader(record(specimen("uneven_batches"), seed=0, folder=tmp_path / "a", steps=22))
    assert {one.signal for one in INDICATORS} - set(run.scalar_names()) == set()
