"""precursors: leads, false alarms and choices on runs whose spikes and precursors were put there by hand."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest

from aftershock.bench.corpus import Signal, Trace, place_targets
from aftershock.bench.indicators import INDICATORS, Way
from aftershock.bench.precursors import (
    BUDGETS,
    HORIZONS,
    Judge,
    Run,
    read_run,
    reopened,
    score_signals,
    specimen_facts,
)
from aftershock.bench.precursors_record import PrecursorRow
from aftershock.bench.scoring import HORIZON, Target
from aftershock.lab.zoo.record import record
from aftershock.lab.zoo.registry import specimen

STEPS, ONSET = 500, 300
SURPRISE: tuple[Way, ...] = ("surprise",)
LOUD = 300.0


@functools.cache
def make_run(name: str, seed: int, *, lead: int | None = 5, kind: str = "spontaneous", leaps: bool = False) -> Run:
    """A loss that spikes at step 300, and a gradient norm that leaps `lead` steps before; None: neither does.

    With `leaps` the gradient norm is 25 times its usual every 60 steps for one step.
    """
    rng = random.Random(f"{name}-{seed}")
    signals = {
        "loss/train/mean": [2 + rng.gauss(0, 0.01) for _ in range(STEPS)],
        "grad/all/norm": [np.exp(rng.gauss(0, 0.1)) for _ in range(STEPS)],
        "update/all/norm": [np.exp(rng.gauss(0, 0.1)) for _ in range(STEPS)],
    }
    for step in range(40, STEPS, 60) if leaps else ():
        signals["grad/all/norm"][step] *= 25
    spikes = []
    if lead is not None:
        signals["loss/train/mean"][ONSET : ONSET + 6] = [3.0, 4.0, 5.0, 4.0, 3.0, 2.5]
        for step in range(ONSET - lead, ONSET + 3):
            signals["grad/all/norm"][step] *= LOUD
        spikes = [(ONSET, ONSET + 2, ONSET + 6)]
    targets, num_steps = place_targets(spikes, fault=ONSET if kind == "planted" else None, num_steps=STEPS)
    series = {key: Signal(list(range(num_steps)), values[:num_steps]) for key, values in signals.items()}
    trace = Trace(name, kind, seed, {}, targets, num_steps)
    return Run(trace, "C1" if spikes else "none", series, score_signals(series))


def make_runs(**changed: int) -> list[Run]:
    """Two specimens that spike and one that does not, with four seeds each."""
    leads = {"one": 5, "other": 5} | changed
    runs = [make_run(name, seed, lead=lead) for name, lead in leads.items() for seed in range(4)]
    return runs + [make_run("quiet", seed, lead=None, kind="healthy") for seed in range(4)]


def _row(judge: Judge, name: str = "gradient norm", ways: tuple[Way, ...] = SURPRISE) -> PrecursorRow:
    row = judge.row(name, ways)
    assert row is not None
    return row


def test_a_gradient_that_leads_is_found_to_lead() -> None:
    """planted: by 5 steps, every spike, at hardly a false alarm, also with settings chosen without the specimen."""
    row = _row(Judge(make_runs(), tuning_seeds=(0, 2)))
    assert (row.runs, row.targets) == (6, 4)
    assert row.area == 1.0
    for at, budget in zip(row.at, BUDGETS, strict=True):
        assert at.budget == budget
        assert (at.early.value, at.recall.value, at.out_early.value) == (1.0, 1.0, 1.0)
        assert at.lead == [5.0, 5.0, 5.0]
        assert at.false_rate.value is not None
        assert at.false_rate.value <= 10
        assert at.groups["C1"] == at.groups["spontaneous"] == (4, 4, 4, 4, 4, 4)
        assert at.gain_early == (0.0, 0.0, 0.0)


def test_a_signal_that_does_not_lead_is_found_not_to() -> None:
    """planted: the loss moves at the onset, the update norm never, and both fall behind the gradient norm."""
    judge = Judge(make_runs(), tuning_seeds=(0, 2))
    _row(judge)
    loss, update = _row(judge, "loss"), _row(judge, "update norm")
    assert (loss.at[-1].early.value, loss.at[-1].recall.value, loss.at[-1].lead[1]) == (0.0, 1.0, 0.0)
    assert loss.at[-1].gain_early.value == -1.0
    assert loss.at[-1].gain_recall.value == 0.0
    assert update.at[-1].recall.value is not None
    assert update.at[-1].recall.value < 0.5


def test_settings_for_one_specimen_may_not_serve_another() -> None:
    """planted: a healthy specimen whose gradient leaps now and then is quiet only where it was tuned on."""
    runs = [*make_runs(), *(make_run("wild", seed, lead=None, kind="healthy", leaps=True) for seed in range(4))]
    at = _row(Judge(runs, tuning_seeds=(0, 2))).at[0]
    assert at.early.value == at.out_early.value == 1.0
    assert at.false_rate.value is not None
    assert at.out_false_rate.value is not None
    assert at.out_false_rate.value > at.false_rate.value == 0.0


def test_a_planted_fault_cannot_be_foreseen() -> None:
    """contract: it opens at its step, so no alarm before it is early, and none is right."""
    runs = [make_run("fault", seed, kind="planted") for seed in range(4)]
    row = _row(Judge(runs, tuning_seeds=(0, 2)))
    assert row.at[-1].early.value is None
    found = row.at[-1].groups["planted"]
    assert (found.targets, found.foreseeable, found.early) == (2, 0, 0)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_how_early_an_alarm_may_be(horizon: int) -> None:
    """planted: 100 steps ahead is a false alarm within 32, and a warning within 256."""
    row = _row(Judge(make_runs(one=100, other=100), tuning_seeds=(0, 2), horizon=horizon))
    if horizon > 100:
        assert row.at[-1].lead == [100.0, 100.0, 100.0]
        assert row.area == 1.0
    else:
        assert row.area is not None
        assert row.area < 1.0
        assert set(row.at[-1].groups) == {"spontaneous", "C1"}


def test_targets_open_anew() -> None:
    """oracle: by hand; not before the end of the one before, and the planted fault stays."""
    targets = (Target(268, 300, 305, 310), Target(311, 340, 345, 350))
    longer = reopened(targets, 256, planted=False)
    assert [target.opens for target in longer] == [44, 311]
    assert [target.opens for target in reopened(targets, 8, planted=False)] == [292, 332]
    assert reopened((Target(300, 300, 305, 310),), 256, planted=True)[0].opens == 300
    assert reopened((Target(0, 10, 12, 15),), HORIZON, planted=False)[0].opens == 0


def test_what_is_known_before_the_step_leads_by_one_more() -> None:
    """planted: the same signal, said to be known ahead."""
    judge = Judge(make_runs(), tuning_seeds=(0, 2))
    after, before = _row(judge), judge.row("gradient norm", SURPRISE, ahead=1)
    assert before is not None
    assert (after.at[0].lead, before.at[0].lead) == ([5.0] * 3, [6.0] * 3)
    fault = Judge([make_run("fault", seed, lead=0, kind="planted") for seed in range(4)], tuning_seeds=(0, 2))
    _row(fault)
    met = fault.row("loss", SURPRISE, ahead=1)
    assert met is not None
    assert met.at[0].groups["planted"][:4] == (2, 2, 2, 2)


def test_what_no_run_has_is_no_row() -> None:
    """contract."""
    assert Judge(make_runs(), tuning_seeds=(0, 2)).row("largest attention logit", ("level",)) is None


def test_figures_say_what_they_rest_on() -> None:
    """oracle: two scoring seeds a specimen, their targets, and steps outside of these."""
    facts = specimen_facts(make_runs(), (1, 3))
    assert facts["quiet"] == {"kind": "healthy", "cause": "none", "runs": 2, "targets": 0, "healthy_steps": 2 * STEPS}
    assert (facts["one"]["targets"], facts["one"]["cause"]) == (2, "C1")
    assert facts["one"]["healthy_steps"] == 2 * (STEPS - (HORIZON + 6 + 33))


def test_a_run_folder_becomes_a_run(tmp_path: Path) -> None:
    """round trip: every signal of the folder, in steps from 0, and scores of every indicator that it allows."""
    folder = record(specimen("lag_99"), seed=0, folder=tmp_path / "a", steps=40)
    run = read_run(folder, "lag_99", 0)
    assert run.cause == "C1"
    assert run.signals["loss/train/mean"].steps == list(range(40))
    assert run.signals["curvature/all/directional"].steps == list(range(4, 40))
    there = {one.name for one in INDICATORS if one.signal in run.signals}
    assert {name for name, _ in run.scored} == there
    assert "gradient norm" in there
