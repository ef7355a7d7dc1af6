"""A forecast is on disk before what it is about: written once, kept, refused when late or when it no longer holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from aftershock.claims.catalog import CLAIMS
from aftershock.claims.claim import Claim, Forecast, Trial
from aftershock.claims.forecast_criteria import FORECAST_TRIALS, HELD_OUT
from aftershock.claims.foretold import COMMITTED, commit_forecast, refuse_late_forecast
from aftershock.lab.sweep import expand

P5 = FORECAST_TRIALS["P5"]
FORETELLING = [claim for claim in CLAIMS if isinstance(claim.trial, Trial) and claim.trial.forecast]


def forecast(says: object) -> Forecast:
    assert P5.forecast is not None
    return dataclasses.replace(P5.forecast, foretell=lambda runs: {"rate": says})


@pytest.mark.parametrize("claim", FORETELLING, ids=lambda claim: claim.id)
def test_contract_a_forecast_rests_on_part_of_its_study(claim: Claim) -> None:
    assert isinstance(claim.trial, Trial)
    assert claim.trial.forecast is not None
    before = {planned.ref.run_id for planned in expand(claim.trial.forecast.sweep)}
    assert before < {planned.ref.run_id for planned in expand(claim.trial.sweep)}


def test_it_is_written_once_and_kept(tmp_path: Path) -> None:
    """round trip: with the time and the runs that it rests on; the same forecast later changes no byte."""
    path = commit_forecast(forecast(0.1), [], tmp_path / "P5")
    assert path == tmp_path / "P5" / COMMITTED
    text = path.read_text()
    made = json.loads(text)
    assert made["forecast"] == {"rate": 0.1}
    assert made["date"].endswith("+00:00")
    assert not {p.ref.run_id for p in expand(P5.sweep) if p.ref.size in HELD_OUT} & set(made["run_ids"])
    commit_forecast(forecast(0.1 * (1 + 1e-12)), [], tmp_path / "P5")  # the last bits of another machine
    assert path.read_text() == text


@pytest.mark.parametrize("says", [0.3, None, {"low": 0.1}, "0.1", 0.1001])
def test_another_forecast_is_refused(tmp_path: Path, says: object) -> None:
    """planted: the runs, or the code, foretell something else than what is on file."""
    path = commit_forecast(forecast(0.1), [], tmp_path)
    text = path.read_text()
    with pytest.raises(ValueError, match=r"forecast\.json, of .*, is not what its runs foretell now"):
        commit_forecast(forecast(says), [], tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"forecast": {}}'])
def test_a_damaged_forecast_is_named(tmp_path: Path, text: str) -> None:
    """planted."""
    (tmp_path / COMMITTED).write_text(text)
    with pytest.raises(ValueError, match=r"forecast\.json: not a committed forecast"):
        commit_forecast(forecast(0.1), [], tmp_path)


def test_a_late_forecast_is_refused(tmp_path: Path) -> None:
    """planted: one run of a held-out size has begun. Those of the fitted sizes may have, and so may all afterwards."""
    runs, folder = tmp_path / "runs", tmp_path / "P5"
    for planned in expand(P5.sweep):
        if planned.ref.size not in HELD_OUT:
            (runs / planned.ref.run_id).mkdir(parents=True)
    refuse_late_forecast(P5, folder, runs=runs)
    late = next(planned.ref for planned in expand(P5.sweep) if planned.ref.size == HELD_OUT[1])
    (runs / late.run_id).mkdir()
    with pytest.raises(ValueError, match=rf"1 runs .* \(first: {late.run_id}; sizes 192x2\) .* must come first"):
        refuse_late_forecast(P5, folder, runs=runs)
    refuse_late_forecast(FORECAST_TRIALS["P4"], folder, runs=runs)  # foretells nothing
    commit_forecast(forecast(0.1), [], folder)
    refuse_late_forecast(P5, folder, runs=runs)
