"""Studies as the forecast sees them: readings, brackets, and each kind of study that nothing can rest on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from aftershock.forecast.observations import (
    Observations,
    Reading,
    early_reading,
    early_step,
    end_reading,
    read_observations,
)
from aftershock.lab.recipe import RunConfig
from aftershock.store.study import RunRef

WriteStudy = Callable[..., Path]
Plant = Callable[..., Observations]


def test_a_study_is_read_back(write_study: WriteStudy) -> None:
    """round trip: sizes, rates, ends and signals, as they were written; two folders are taken together."""
    folders = [write_study(name="a", seeds=(0,)), write_study(name="b", seeds=(1,))]
    found = read_observations(folders)
    assert found.sizes == ["16x2", "32x2"]
    assert found.rates == [0.01, 0.1, 1.0]
    assert len(found.runs) == 12
    assert found.arm == "no_qk_norm"
    first = found.runs[1]
    assert (first.width, first.depth, first.num_params, first.lr, first.seed) == (16, 2, 6144, 0.1, 0)
    values = {key: 10**reading.low for key, reading in first.readings.items()}
    # the last block's output, the early logit at step 4 = 2 % of 200, ends as means of five
    expected = {"early_logit": 5.0, "logit": 7.6, "abs_log_z": 6.0, "output_rms": 2.0, "grad_rms": 1e-3}
    assert values == pytest.approx(expected)
    assert [run.fails for run in found.runs if run.size == "32x2" and run.seed == 1] == [False, False, True]
    assert [curve.bracket for curve in found.curves] == [Reading(-1.0, 0.0)] * 4


def test_diverged_runs_are_bounds(write_study: WriteStudy) -> None:
    """planted: what grows is known from below, the gradient not at all, and its curve is open where no rate trains."""

    def signals(ref: RunRef) -> dict[str, Sequence[float]]:
        last = 50.0 if ref.lr == 1.0 else 8.0
        names = ("attn/blocks.0/max_abs_logit", "output/head/abs_log_z", "output/blocks.1/rms")
        return {name: [4.0, 5.0, last, math.nan] for name in (*names, "grad_clipped/blocks.0.mlp.in/rms")}

    folder = write_study(signals=signals, loss=lambda ref: None if ref.lr == 1.0 or ref.size == "32x2" else 2.5)
    found = read_observations([folder])
    died = next(run for run in found.runs if run.size == "16x2" and run.lr == 1.0)
    assert died.fails
    assert died.readings["logit"] == Reading(math.log10(50), math.inf)
    assert died.readings["grad_rms"] == Reading(-math.inf, math.inf)
    assert died.readings["early_logit"].high == math.log10(5.0)  # it lived through step 4
    assert {curve.bracket for curve in found.curves if curve.size == "32x2"} == {Reading(-math.inf, -2.0)}


def test_end_and_early_readings() -> None:
    """contract: no value, too early an end, a death before 2 %."""
    assert end_reading([math.nan, -1.0], died=False, grows=True) is None
    assert end_reading([1.0, 10.0, math.nan], died=True, grows=True) == Reading(1.0, math.inf)
    assert early_reading([0, 4], [10.0, 100.0], 4, died=True) == Reading(2.0, 2.0)
    assert early_reading([0, 4], [10.0, math.inf], 4, died=True) == Reading(1.0, math.inf)
    assert early_reading([4], [math.nan], 4, died=True) is None
    assert early_reading([0, 10], [10.0, 100.0], 4, died=False) is None  # it lived on, but nobody looked at step 4


@pytest.mark.parametrize(
    ("measured", "step"), [((0, 4, 8), 4), ((0, 10), 10), ((0, 20), None), ((), None), ((0, 3, 5), 5)]
)
def test_the_early_step(measured: tuple[int, ...], step: int | None) -> None:
    """contract: the first from 2 % on, not later than 5 % of 200 steps; else a sentence with the setting to change."""
    found, problem = early_step(measured, 200)
    assert found == step
    assert (problem == "") == (step is not None)
    assert step is not None or "measure_every=4" in problem


def _other_eps(ref: RunRef, config: RunConfig) -> RunConfig:
    eps = 1e-6 if ref.seed == 1 else 1e-8
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, eps=eps))


def _other_heads(ref: RunRef, config: RunConfig) -> RunConfig:
    return (
        dataclasses.replace(config, model=dataclasses.replace(config.model, heads=1)) if ref.size == "32x2" else config
    )


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"change": _other_eps}, r"differ in optim.eps \(1e-06, 1e-08\)"),
        ({"change": _other_heads}, r"differ in head dimension \(16, 32\)"),
        ({"sizes": ("16x2",)}, "has one size, 16x2"),
        ({"rates": (0.1, 1.0)}, "16x2 has 2 rates, needs 3"),
        ({"sizes": ("16x2", "32x2"), "seeds": (0,)}, "has 2 curves .* needs 4; add seeds or sizes"),
        ({"loss": lambda ref: None}, "every run diverged.* add lower rates"),
        ({"signals": lambda ref: {}}, "no run recorded .*; train with --set measure_every=10"),
    ],
)
def test_a_study_nothing_can_rest_on_is_refused(write_study: WriteStudy, study: dict[str, object], words: str) -> None:
    """contract: each with a sentence that says what to add, or the fields that differ."""
    folder = write_study(**study)
    with pytest.raises(ValueError, match=words):
        read_observations([folder])


def test_arms_are_chosen_by_name(write_study: WriteStudy) -> None:
    """contract."""
    folders = [write_study(name="a"), write_study(name="b", arm="baseline")]
    with pytest.raises(ValueError, match="2 arms; choose one with --arm: no_qk_norm, baseline"):
        read_observations(folders)
    assert read_observations(folders, arm="baseline").arm == "baseline"
    with pytest.raises(ValueError, match="did you mean 'no_qk_norm'"):
        read_observations(folders, arm="no_qk_nrm")


def test_late_measurements_are_noted(write_study: WriteStudy) -> None:
    """contract: ends are read, the early logit is not, and the note says what to set."""
    found = read_observations([write_study(every=20)])
    assert "early_logit" not in found.runs[0].readings
    assert "measure_every=4" in found.notes[0]


def test_studies_that_looked_at_other_steps_are_taken_together(write_study: WriteStudy) -> None:
    """contract: how often a run is measured is no setting of its training; only the earliest logits compare."""

    def often(ref: RunRef, config: RunConfig) -> RunConfig:
        return dataclasses.replace(config, measure_every=8)

    found = read_observations(
        [write_study(name="a", seeds=(0,)), write_study(name="b", seeds=(1,), every=8, change=often)]
    )
    assert {run.seed: "early_logit" in run.readings for run in found.runs} == {0: True, 1: False}
    assert "measured at steps [4, 8]" in found.notes[0]
