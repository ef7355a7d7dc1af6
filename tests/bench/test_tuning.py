from __future__ import annotations

import pytest

from aftershock.bench.alarms import run_alarms
from aftershock.bench.corpus import Trace
from aftershock.bench.scoring import Target
from aftershock.bench.sweeps import SWEEPS, default_of
from aftershock.bench.tuning import Half, choose, judge
from aftershock.signals.detect.registry import OURS

LOSS, GRAD = "loss/train/mean", "grad/all/norm"


@pytest.fixture(scope="module")
def half(traces: list[Trace]) -> Half:
    return Half(traces, [run_alarms(trace, (OURS, "zclip", "curvature", "lightning")) for trace in traces])


def test_the_threshold_keeps_to_the_budget_where_one_does(half: Half) -> None:
    """planted: 2.5 sigma alarms on quiet steps, a stricter one on none, and still on every spike."""
    default, tuned = choose(half, "zclip")
    assert (default.settings, default.setup) == ({}, "default")
    assert tuned.settings["threshold"] > default_of("zclip")
    judged = [run[tuned.index] for run in judge(half, "zclip", tuned.variant, tuned.signals)]
    assert sum(t.quiet_false for t in judged) == 0
    assert [t.caught[1] for t in judged] == [2] * 4 + [0] * 4


def test_a_detector_without_a_signal_to_read_has_no_row(half: Half) -> None:
    assert choose(half, "curvature") == []


def test_several_signals_alarm_when_one_of_them_does(half: Half) -> None:
    """oracle: the union of the alarm steps; here the earlier signal decides."""
    default = SWEEPS[OURS].grid.index(default_of(OURS))
    both, grad, loss = (judge(half, OURS, 0, signals) for signals in ((LOSS, GRAD), (GRAD,), (LOSS,)))
    assert both[0][default].first == grad[0][default].first
    assert grad[0][default].first != loss[0][default].first


def test_signals_that_see_different_spikes_are_combined(half: Half) -> None:
    """planted: the loss alarms on one half of the spikes and the gradient on the other."""
    targets = (Target(100, 130, 135, 140), Target(300, 330, 335, 340))
    traces = [trace._replace(targets=targets) for trace in half.traces[:4]]
    grid = len(SWEEPS[OURS].grid)
    alarms = [{key: [[]] * grid for key in of if key.detector == OURS} for of in half.alarms[:4]]
    for own in alarms:
        for key in own:
            own[key] = [[120 if key.signal == LOSS else 320]] * grid
    found = {choice.setup: choice for choice in choose(Half(traces, alarms), OURS)}
    assert set(found["tuned"].signals) == {LOSS, GRAD}
    assert set(found["all"].signals) == {LOSS, GRAD}
    assert "combined" not in found  # nothing beyond what `tuned` already has


def test_ours_is_also_shown_on_each_signal(half: Half) -> None:
    rows = [choice for choice in choose(half, OURS) if choice.setup in ("single", "all")]
    assert [row.signals for row in rows] == [(LOSS,), (GRAD,), (LOSS, GRAD)]
