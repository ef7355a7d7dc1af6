from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aftershock.forecast.sensitivity import lr_sensitivity
from aftershock.report import signals
from aftershock.report.numbers import study_numbers
from aftershock.store.reader import RunReader, StatSeries
from aftershock.store.study import Study, write_manifest

StudyBuilder = Callable[..., Path]


def test_numbers_equal_the_store(full_study: Path, numbers: dict[str, Any]) -> None:
    """oracle: sensitivity and losses of each group recomputed from `Study.rows` by hand."""
    rows = Study(full_study).rows()
    assert len(numbers["runs"]) == len(rows) == 56
    for group in numbers["groups"]:
        own = [row for row in rows if (row.ref.size, row.ref.arm) == (group["size"], group["arm"])]
        l0 = own[0].summary["initial_loss"]
        means = []
        for lr in sorted({row.ref.lr for row in own}):
            ends = [row.summary["final_loss"] for row in own if row.ref.lr == lr]
            means.append(sum(l0 if end is None else end for end in ends) / len(ends))
        assert group["lr_sensitivity"] == pytest.approx(lr_sensitivity(means, l0), abs=1e-12)  # order of additions
        assert [point["loss"] for point in group["points"]] == pytest.approx(means, abs=1e-12)
        assert group["best_loss"] == pytest.approx(min(means), abs=1e-12)


def test_the_planted_result_is_found(numbers: dict[str, Any]) -> None:
    """planted."""
    assert numbers["headline"]["main"] == (
        "Without qk-layernorm, training fails from learning rate 0.1 up at w32-d2 and from 0.03 up at w64-d3; "
        "with it every rate trains."
    )
    assert {(g["size"], g["arm"]): g["fails_from"] for g in numbers["groups"]} == {
        ("w32-d2", "qk-norm"): None,
        ("w32-d2", "no-qk-norm"): 0.1,
        ("w64-d3", "qk-norm"): None,
        ("w64-d3", "no-qk-norm"): 0.03,
    }
    assert numbers["settings"]["by_arm"] == {
        "qk-norm": {"model.qk_norm": "head"},
        "no-qk-norm": {"model.qk_norm": "off"},
    }
    assert {event["kind"] for event in numbers["events"]} == {"diverged"}
    assert len(numbers["events"]) == numbers["counts"]["status"]["diverged"] == 10


def test_it_is_json_without_nan(numbers: dict[str, Any]) -> None:
    """round trip."""
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_without_series_the_verdicts_are_the_same(full_study: Path, numbers: dict[str, Any]) -> None:
    """equivalence."""
    quick = study_numbers(full_study, series=False)
    assert {k: v for k, v in quick.items() if k != "series"} == {k: v for k, v in numbers.items() if k != "series"}
    assert quick["series"]["runs"] == {}


def test_series_carry_the_recorded_values(full_study: Path, numbers: dict[str, Any]) -> None:
    """oracle: what the reader gives, to the five digits the page keeps."""
    run_id = numbers["runs"][-1]["run_id"]
    own = numbers["series"]["runs"][run_id]
    grid, values = own["signals"][signals.LOGIT]
    found = RunReader(full_study / "runs" / run_id).stats(signals.LOGIT)[signals.LOGIT]
    assert own["grids"][grid] == found.steps.tolist()
    np.testing.assert_allclose(values, found.values, rtol=5e-5)  # five significant digits
    assert numbers["runs"][-1]["peak_logit"] == found.values.max()


def test_missing_runs_stay_missing(build_study: StudyBuilder) -> None:
    states = {3e-4: "missing", 0.3: "open"}
    folder = build_study(sizes=["w32-d2"], seeds=[0], leave=lambda ref: states.get(ref.lr, "done"), tensors=False)
    numbers = study_numbers(folder)
    assert numbers["counts"]["status"] == {"missing": 2, "finished": 9, "diverged": 1, "interrupted": 2}
    assert [g["lr_sensitivity"] for g in numbers["groups"]] == [None, None]
    assert numbers["groups"][0]["note"] == "2 of 7 rates have no finished run"
    first = numbers["runs"][0]
    assert (first["outcome"], first["final_loss"], first["steps"]) == ("unfinished", None, None)
    assert "4 runs of 14 have no result (2 missing and 2 interrupted)" in numbers["headline"]["details"][-1]


def test_a_study_that_has_not_begun(tmp_path: Path, build_study: StudyBuilder) -> None:
    folder = build_study(sizes=["w32-d2"], leave=lambda ref: "missing")
    numbers = study_numbers(folder)
    assert numbers["headline"]["main"] == "No run has finished yet: 28 missing."
    write_manifest(tmp_path, name="empty", title="", runs=[])
    with pytest.raises(ValueError, match="lists no runs"):
        study_numbers(tmp_path)
    with pytest.raises(ValueError, match="no study"):
        study_numbers(tmp_path / "nowhere")


def test_a_large_study_leaves_out_per_tensor_signals_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """planted: too many numbers for one page."""
    steps = np.arange(500)
    names = ["loss/train/ce", signals.LOGIT, *(f"param/blocks.{i}.mlp.in/rms" for i in range(12))]
    runs = {f"r{i}": {name: StatSeries(steps, steps * 1.0) for name in names} for i in range(4)}
    assert signals.page_signals(runs).left_out == []
    monkeypatch.setattr(signals, "MAX_VALUES", 1000)
    found = signals.page_signals(runs)
    assert found.names == ["loss/train/ce", signals.LOGIT]
    assert len(found.left_out) == 12
    assert found.left_out[-1] == "param/blocks.11.mlp.in/rms"
    assert len(found.runs["r0"]["signals"][signals.LOGIT][1]) <= 125
