"""The whole forecast as a value, as JSON and as text; deterministic, and complete."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from aftershock.forecast.console import Forecast, Plan, plan_commands, print_outlook, print_plan
from aftershock.forecast.observations import QUANTITIES, Observations, Reading
from aftershock.forecast.outlook import Outlook, forecast, plain
from aftershock.forecast.plan import make_plan
from aftershock.lab.sizes import parse_size

Plant = Callable[..., Observations]
WriteStudy = Callable[..., Path]


@pytest.fixture(scope="module")
def outlook(plant: Plant) -> Outlook:
    return forecast(plant(), parse_size("96x2"), lr=0.3)


def test_everything_is_forecast(outlook: Outlook) -> None:
    """contract: each quantity with an interval at the rate and over the ladder, and the runs it rests on."""
    assert [quantity.key for quantity in outlook.quantities] == list(QUANTITIES)
    for quantity in outlook.quantities:
        assert quantity.interval is not None
        assert quantity.interval.low <= quantity.interval.value <= quantity.interval.high
        assert len(quantity.by_rate) == 7
        assert quantity.num_runs == 63
    assert outlook.failing.rate is not None
    assert outlook.eps is not None
    assert len(outlook.runs) == 63
    assert outlook.sizes == ("16x2", "32x2", "48x2")
    assert any("4 times the parameters" in note for note in outlook.notes)


def test_the_failing_rate_is_warned_of(outlook: Outlook) -> None:
    """planted: 96x2 fails from 0.06 on, and at 0.3 its early logit lies above the learned line."""
    found = {advice.key: advice for advice in outlook.advice}
    assert "qk-layernorm" in found["failing_lr"].change
    assert "early_logit" in found
    early = next(quantity for quantity in outlook.quantities if quantity.key == "early_logit")
    assert early.crosses
    assert early.line is not None
    assert early.line.value == pytest.approx(10.0, rel=0.5)


def test_json_round_trips(outlook: Outlook) -> None:
    """round trip: plain JSON without nan, and every field of the tree."""
    data = outlook.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == set(Outlook._fields)
    assert data["failing"]["rate"]["value"] == outlook.failing.rate.value if outlook.failing.rate else False
    assert plain({"a": (1, math.nan)}) == {"a": [1, None]}


def test_it_is_deterministic(plant: Plant, outlook: Outlook) -> None:
    """property: the same runs and seed give the same forecast to the last bit."""
    assert forecast(plant(), parse_size("96x2"), lr=0.3).to_json() == outlook.to_json()


def test_the_main_rate_is_the_best_of_the_largest_size(plant: Plant) -> None:
    """contract; and a rate outside the ladder is refused."""
    assert forecast(plant(seeds=(0, 1)), parse_size("64x2")).lr == 0.01
    with pytest.raises(ValueError, match=r"rate 3 lies outside the rates trained, 0.0003 to 0.3"):
        forecast(plant(seeds=(0, 1)), parse_size("64x2"), lr=3.0)


def test_a_signal_that_breaks_its_trend_is_refused_alone(plant: Plant) -> None:
    """planted: log Z leaps at 48x2; the other quantities still have intervals, and the text says why this has none."""
    found = plant(seeds=(0, 1))
    runs = [
        run._replace(readings={**run.readings, "abs_log_z": Reading(3.0, 3.0)}) if run.size == "48x2" else run
        for run in found.runs
    ]
    broken = forecast(found._replace(runs=tuple(runs)), parse_size("96x2"))
    by_key = {quantity.key: quantity for quantity in broken.quantities}
    assert by_key["abs_log_z"].interval is None
    assert "runs of 48x2" in by_key["abs_log_z"].refused
    assert by_key["grad_rms"].interval is not None
    assert "add sizes" in _text(broken)


def test_the_text_says_it_all(outlook: Outlook, plant: Plant) -> None:
    """contract: rate, lines, eps, trend, conditions, advice and what it rests on; also where nothing fails."""
    text = " ".join(_text(outlook).split())
    for words in ("96x2 starts to fail at a rate of", "crossed", "AdamW's eps 1e-08", "LR sensitivity", "Condition,",
                  "Change: ", "Rests on 63 runs of planted"):  # fmt: skip
        assert words in text
    calm = _text(forecast(plant(level=2.0, seeds=(0, 1)), parse_size("64x2"), lr=0.003))
    assert "no failing rate. no run fails up to rate 0.3" in " ".join(calm.split())


def test_a_plan_as_text_and_commands(plant: Plant) -> None:
    """contract: one sweep for each purchase, in the study's own settings, and the forecast from all folders."""
    plan = make_plan(plant(), parse_size("96x2"), budget_s=600.0)
    commands = plan_commands(plan, ["out/a/"])
    assert len(commands) == len(plan.purchases) + 1
    first = plan.purchases[0]
    assert (
        f"--from out/a/sweep.yaml --out out/a-plan1 --sizes {first.size} --arms no_qk_norm --seeds 100" in commands[0]
    )
    assert commands[-1].startswith("aftershock forecast out/a/ out/a-plan1")
    console = Console(width=100, record=True, quiet=False, file=None)
    with console.capture() as capture:
        print_plan(plan, ["out/a"], console=console)
    assert "narrows from" in capture.get()
    assert first.size in capture.get()


def test_the_runs_of_a_plan_join_the_forecast(plant: Plant) -> None:
    """planted: a further size on a ladder of its own; the failing rate is held by its interval, nothing else breaks."""
    found = plant(seeds=(0, 1), sigma=0.1)
    more = plant(sizes=("64x2",), rates=(0.01, 0.03, 0.055, 0.1, 0.3), seeds=(100, 101, 102), sigma=0.1, draw=1)
    joined = forecast(found._replace(runs=found.runs + more.runs), parse_size("96x2"), lr=0.03)
    assert joined.failing.rate is not None
    planted = 10 ** (-0.9 - 0.3 * (math.log10(parse_size("96x2").num_block_params) - 4.3))
    assert joined.failing.rate.low < planted < joined.failing.rate.high
    assert all(quantity.interval is not None for quantity in joined.quantities)


def test_both_commands_from_a_folder(write_study: WriteStudy, capsys: pytest.CaptureFixture[str]) -> None:
    """contract: JSON on the output, exit status 0."""
    folder = str(write_study())
    assert Forecast(studies=(folder,), to="48x2", lr=0.1, json=True).run() == 0
    assert json.loads(capsys.readouterr().out)["target"] == "48x2"
    assert Plan(studies=(folder,), to="48x2", budget="1h", json=True).run() == 0
    assert json.loads(capsys.readouterr().out)["target"] == "48x2"


def _text(outlook: Outlook) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        print_outlook(outlook, console=console)
    return capture.get()
