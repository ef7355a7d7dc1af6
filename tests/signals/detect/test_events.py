"""planted: which steps an event has."""

from __future__ import annotations

import math

from aftershock.signals.detect.events import EventTracker, SignalEvent
from aftershock.signals.detect.robust import Robust, robust_for
from aftershock.signals.detect.rule import Rule


def _events(values: list[float], rule: Rule | None = None, *, sign: float = 1.0, spacing: int = 1) -> list[SignalEvent]:
    rule = rule or Robust()
    tracker, state, found = EventTracker("x", sign=sign), rule.init(), []
    for i, value in enumerate(values):
        state, verdict = rule.update(state, value)
        found += tracker.add(i * spacing, value, verdict, lag=rule.lag(state))
    return found + tracker.close()


def _flat(n: int, level: float = 2.0) -> list[float]:
    return [level + 0.01 * ((i * 7919) % 13 - 6) / 6 for i in range(n)]


def test_a_spike_has_onset_peak_and_end() -> None:
    values = [*_flat(100), 3.0, 6.0, 4.0, *_flat(50)]
    assert _events(values) == [SignalEvent("spike", "x", 100, 101, 102)]
    assert _events(values, spacing=10) == [SignalEvent("spike", "x", 1000, 1010, 1020)]


def test_a_cluster_is_one_event_and_distant_spikes_are_two() -> None:
    near = [*_flat(100), 6.0, *_flat(5), 7.0, *_flat(50)]
    assert _events(near) == [SignalEvent("spike", "x", 100, 106, 106)]
    far = [*_flat(100), 6.0, *_flat(20), 7.0, *_flat(50)]
    assert [e.onset for e in _events(far)] == [100, 121]


def test_a_spike_at_the_end_is_closed_there() -> None:
    assert _events([*_flat(100), 6.0]) == [SignalEvent("spike", "x", 100, 100, 100)]


def test_a_shift_begins_with_its_first_value() -> None:
    assert _events(_flat(100) + _flat(100, 4.0))[0]._replace(peak=0) == SignalEvent("shift", "x", 100, 0, 115)


def test_nonfinite_and_spike_side_by_side() -> None:
    values = [*_flat(100), 9.0, math.nan, math.nan, 5.0, *_flat(50)]
    assert sorted(_events(values)) == [
        SignalEvent("nonfinite", "x", 101, 101, 102),
        SignalEvent("spike", "x", 100, 100, 103),
    ]


def test_a_jump_is_one_event() -> None:
    found = _events(_flat(100) + _flat(100, 1.0))
    assert [(e.kind, e.onset, e.end) for e in found] == [("jump", 100, 107)]


def test_a_drift_that_goes_on_is_one_event() -> None:
    values = _flat(400) + [v * (1 + 0.0003 * i) for i, v in enumerate(_flat(2500))]
    found = _events(values)
    assert [e.kind for e in found] == ["drift"]
    assert 200 <= found[0].onset <= 600
    assert found[0].end > 2500


def test_the_peak_of_a_falling_accuracy_is_its_lowest_value() -> None:
    values = [*_flat(100, 0.9), 0.5, 0.2, 0.4, *_flat(50, 0.9)]
    assert _events(values, robust_for("accuracy"), sign=-1.0) == [SignalEvent("spike", "x", 100, 101, 102)]
