"""contract: every detector of the registry, through the one interface."""

from __future__ import annotations

import json
import math
import random

import pytest

from aftershock.signals.detect.registry import DETECTORS, detector
from aftershock.signals.detect.robust import Robust
from aftershock.signals.detect.rule import VERDICTS, verdicts

EVERY = pytest.mark.parametrize("name", DETECTORS)


def _rough(n: int = 700) -> list[float]:
    """Noise, spikes, a NaN, an infinity, a zero, a negative value, a step of the level."""
    rng = random.Random(3)
    values = [2 + rng.gauss(0, 0.05) for _ in range(n)]
    values[150], values[151], values[300] = 400.0, 80.0, math.nan
    values[320], values[330], values[340] = math.inf, 0.0, -1.0
    return values[:400] + [3 * v for v in values[400:]]


@EVERY
def test_a_verdict_for_whatever_comes(name: str) -> None:
    found = verdicts(detector(name), _rough())
    assert len(found) == 700
    assert set(found) <= set(VERDICTS)


@EVERY
def test_huge_and_tiny_values_do_not_break_it(name: str) -> None:
    values = [1e308, -1e308, 1e-320, 0.0, 1.0, -0.0] * 60
    assert len(verdicts(detector(name), values)) == 360


@EVERY
def test_state_round_trips_at_any_step(name: str) -> None:
    """round trip: through JSON text after every 23rd value; the same verdicts as in one go."""
    rule, values = detector(name), _rough()
    state, found = rule.init(), []
    for i, value in enumerate(values):
        if i % 23 == 0:
            again = rule.from_dict(json.loads(json.dumps(rule.to_dict(state), allow_nan=False)))
            assert repr(again) == repr(state)
            state = again
        state, verdict = rule.update(state, value)
        found.append(verdict)
    assert found == verdicts(rule, values)


@EVERY
def test_an_old_state_stays_as_it_was(name: str) -> None:
    rule = detector(name)
    state = rule.init()
    for value in _rough()[:200]:
        state, _ = rule.update(state, value)
    before = repr(state)
    first = rule.update(state, 2.5)
    rule.update(first.state, 900.0)
    assert repr(state) == before
    assert repr(rule.update(state, 2.5)) == repr(first)
    rule.rewind(state)
    assert repr(state) == before


@EVERY
def test_it_names_its_source_and_its_signals(name: str) -> None:
    assert DETECTORS[name].source
    assert DETECTORS[name].reads
    assert (DETECTORS[name].__doc__ or "").strip()


def test_a_state_of_another_rule_is_refused() -> None:
    rule = Robust()
    data = rule.to_dict(rule.init())
    with pytest.raises(ValueError, match="of rule 'Robust', not of ZClip"):
        detector("zclip").from_dict(data)
    with pytest.raises(ValueError, match="lacks level"):
        rule.from_dict(data | {"state": {k: v for k, v in data["state"].items() if k != "level"}})
    with pytest.raises(ValueError, match="'levle' unknown; did you mean 'level'"):
        rule.from_dict(data | {"state": data["state"] | {"levle": 1.0}})


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'lightning'"):
        detector("lightening")
