from __future__ import annotations

import random

import pytest

from aftershock.bench.alarms import Key, alarm_steps, grid_alarms, run_alarms
from aftershock.bench.corpus import Signal, Trace
from aftershock.bench.probes import role_read
from aftershock.bench.sweeps import SWEEPS, default_of, make_rule
from aftershock.signals.detect.registry import DETECTORS, OURS
from aftershock.signals.detect.robust import robust_for

CASES = [(name, variant) for name, sweep in SWEEPS.items() for variant in range(len(sweep.variants))]


def _rough() -> Signal:
    """Noise with heavy tails, a spike, a NaN, an infinity, a step of the level, and a few steps that are missing."""
    rng = random.Random(5)
    values = [2 + 0.1 * rng.gauss(0, 1) ** 3 for _ in range(1250)]
    values[180], values[181], values[500], values[600] = 40.0, 9.0, float("nan"), float("inf")
    values[900:] = [1.6 * value for value in values[900:]]
    return Signal([step for step in range(1250) if step % 97], [v for step, v in enumerate(values) if step % 97])


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_one_pass_over_a_grid_is_a_pass_for_each_threshold(name: str, variant: int) -> None:
    """equivalence: also that what the table calls steady is, and that a grid goes from loose to strict."""
    series, role, settings = _rough(), role_read(name), SWEEPS[name].variants[variant]
    found = grid_alarms(name, role, settings, series)
    field = SWEEPS[name].field
    each = [alarm_steps(make_rule(name, role, {**settings, field: v}), series) for v in SWEEPS[name].grid]
    assert found == each
    assert len(each[0]) >= len(each[-1])


def test_every_detector_is_swept_around_its_published_default() -> None:
    """contract: none is left out, and each grid holds the default."""
    assert list(SWEEPS) == list(DETECTORS)
    assert [name for name, sweep in SWEEPS.items() if default_of(name) not in sweep.grid] == []
    assert [name for name, sweep in SWEEPS.items() if sweep.variants[0] != {}] == []


def test_ours_is_made_for_the_role() -> None:
    """contract: norms have no better side."""
    assert make_rule(OURS, "gradient", {}) == robust_for("gradient")
    assert make_rule(OURS, "gradient", {}) != make_rule(OURS, "loss", {})


def test_a_rule_runs_on_the_signals_that_it_reads(traces: list[Trace]) -> None:
    found = run_alarms(traces[0], (OURS, "lightning", "zclip", "curvature"))
    loss, grad = "loss/train/mean", "grad/all/norm"
    ours = [Key(OURS, variant, signal) for signal in (loss, grad) for variant in (0, 1)]
    assert list(found) == [*ours, Key("lightning", 0, loss), Key("zclip", 0, grad)]
    default = SWEEPS[OURS].grid.index(default_of(OURS))
    assert found[Key(OURS, 0, grad)][default][0] == traces[0].targets[0].onset - 3
