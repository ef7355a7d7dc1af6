"""The criteria of early logits and of a failing rate foretold, on planted studies; and that a forecast comes first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from aftershock.claims.claim import RunResult, Signal
from aftershock.claims.criteria import NO_QK
from aftershock.claims.forecast_criteria import (
    FITTED,
    FORECAST_TRIALS,
    HELD_OUT,
    _rate_at,
    _rung,
    early_logit_separates,
    failing_rate_is_foretold,
    foretell,
    observations_of,
    to_commit,
)
from aftershock.claims.foretold import COMMITTED
from aftershock.claims.growth import LOGIT
from aftershock.claims.records import checkout_folder, read_records
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size
from aftershock.lab.sweep import expand

L0, BEST, BROKEN = 6.4, 2.3, 3.5
CENTER = 4.3
STEPS = range(0, 200, 4)

Threshold = Callable[[str, int], float]


def falling(size: str, seed: int) -> float:
    """log10 of the rate from which a curve fails: -0.9 - 0.3 n, and a tenth of a decade between seeds."""
    return -0.9 - 0.3 * (math.log10(parse_size(size).num_block_params) - CENTER) + 0.1 * (seed - 4)


def study(
    claim_id: str,
    threshold: Threshold = falling,
    *,
    early: Callable[[float, int], float] = lambda above, seed: 10 ** (1 + above),
) -> list[RunResult]:
    """All runs of a claim's study. `early(decades above the threshold, seed)` is the logit at step 4."""
    sweep = FORECAST_TRIALS[claim_id].sweep
    runs = []
    for size, lr, seed in itertools.product(sweep.sizes, sweep.lrs, sweep.seeds):
        above = math.log10(lr) - threshold(size, seed)
        values = [3.0, early(above, seed), *[50.0] * (len(STEPS) - 2)]
        runs.append(
            RunResult(
                size=size,
                arm=NO_QK,
                lr=lr,
                seed=seed,
                num_params=parse_size(size).num_block_params,
                initial_loss=L0,
                final_loss=BROKEN if above >= 0 else BEST + 0.1 * (math.log10(lr) + 2) ** 2,
                signals={LOGIT: Signal(STEPS, values)},
            )
        )
    return runs


@pytest.mark.parametrize(
    ("early", "verdict"),
    [
        (lambda above, seed: 10 ** (1 + above), "supported"),
        (lambda above, seed: 10.0, "contradicted"),
        (lambda above, seed: 10 ** (1 + above * (seed != 3)), "inconclusive"),
    ],
)
def test_planted_verdicts_of_the_early_logit(early: Callable[[float, int], float], verdict: str) -> None:
    """planted: a logit that knows, one that is the same in every run, one that knows nothing in one seed of three."""
    result = early_logit_separates(study("P4", early=early))
    assert result.verdict == verdict
    json.dumps(result.detail)


def test_the_auc_counts_pairs_and_ties() -> None:
    """oracle: seed 3's logits are all equal, which is a half; the others part the runs without a mistake."""
    result = early_logit_separates(study("P4", early=lambda above, seed: 10 ** (1 + above * (seed != 3))))
    assert result.detail["AUC"] == {"seed 3": 0.5, "seed 4": 1.0, "seed 5": 1.0}
    assert result.effect == pytest.approx(2.5 / 3)
    assert result.detail["AUC of the rate alone"]["mean over seeds"] > 0.9


def test_thresholds_come_from_the_other_seeds() -> None:
    """planted: seed 3's logits are ten times those of the others, so the threshold of the others fails it."""
    result = early_logit_separates(study("P4", early=lambda above, seed: 10 ** (1 + above + 2 * (seed == 3))))
    assert result.detail["accuracy at it"]["seed 3"] < 0.7
    assert 10 < result.detail["threshold from the other seeds"]["seed 3"] * 3 < 90


def test_runs_that_ended_before_are_left_out_and_counted() -> None:
    """contract."""
    runs = study("P4", early=lambda above, seed: math.nan if above > 0.8 else 10 ** (1 + above))
    result = early_logit_separates(runs)
    assert result.detail["runs"]["without an early logit"] == sum(
        math.log10(run.lr) - falling(run.size, run.seed) > 0.8 for run in runs
    )
    assert result.verdict == "supported"


def test_planted_verdicts_of_the_foretold_rate() -> None:
    """planted: the law goes on at the held-out sizes; there it breaks three steps early; and nothing ever fails."""
    kept = failing_rate_is_foretold(study("P5"))
    assert kept.verdict == "supported"
    assert set(kept.detail["failing rate foretold"]) == set(HELD_OUT)
    assert kept.detail["share of seeds the interval meets"] == dict.fromkeys(HELD_OUT, 1.0)
    json.dumps(kept.detail)
    broken = failing_rate_is_foretold(study("P5", lambda size, seed: falling(size, seed) - 1.5 * (size in HELD_OUT)))
    assert broken.verdict == "contradicted"
    assert broken.effect == pytest.approx(kept.effect + 3, abs=1)
    calm = failing_rate_is_foretold(study("P5", lambda size, seed: 2.0))
    assert calm.verdict == "inconclusive"
    assert math.isnan(calm.effect)


def test_a_step_is_a_rung_whatever_its_decades() -> None:
    """contract: from 0.03 to 0.1 is one step as from 0.1 to 0.3, and one step beyond the ladder is 0.9."""
    lrs = np.array(PAPER_LRS)
    assert [_rung(lr, lrs) for lr in (0.03, 0.1, 0.3)] == pytest.approx([4.0, 5.0, 6.0])
    assert _rung(0.9, lrs) == pytest.approx(7.0)
    assert _rung(9e-5, lrs) == pytest.approx(-1.0)
    assert math.isnan(_rung(None, lrs))
    assert [_rate_at(rung, lrs) for rung in (4.0, 6.0, 7.0)] == pytest.approx([0.03, 0.3, 0.9])


def test_only_the_fitted_sizes_are_seen() -> None:
    """property: whatever the held-out sizes do, the forecast is the same to the last bit."""
    runs = [run for run in study("P5") if run.size in FITTED]
    other = [
        run for run in study("P5", lambda size, seed: falling(size, seed) - (size in HELD_OUT)) if run.size in FITTED
    ]
    assert foretell(runs) == foretell(other)


def test_what_is_committed_is_what_is_foretold() -> None:
    """contract: of each held-out size, as JSON holds it, and to the last bit the same again."""
    fitted = [run for run in study("P5") if run.size in FITTED]
    made = to_commit(fitted)
    assert set(made) == set(HELD_OUT)
    assert json.loads(json.dumps(made, allow_nan=False)) == made == to_commit(fitted)
    assert made["96x2"]["ladder_rate"] == foretell(fitted)["96x2"].ladder_rate


def test_the_record_holds_the_forecast_that_was_committed() -> None:
    """contract: the file beside the record says what the record says was foretold."""
    records, folder = read_records().get("P5", []), checkout_folder()
    if not records or folder is None:
        pytest.skip("P5 is not on record in this checkout")
    committed = json.loads((folder / "P5" / COMMITTED).read_text())
    assert committed["date"][:10] <= records[0].date
    assert set(committed["run_ids"]) < set(records[0].run_ids)
    rates = {size: said["ladder_rate"] for size, said in committed["forecast"].items()}
    assert records[0].detail["failing rate foretold"] == pytest.approx(rates, rel=1e-5)  # a record has six digits


def test_the_studies_share_their_runs() -> None:
    """property: P4's runs are the fitted part of P5's, by id, and no held-out one is among them."""
    forecast = FORECAST_TRIALS["P5"].forecast
    assert forecast is not None
    fitted = {p.ref.run_id for p in expand(forecast.sweep)}
    assert {p.ref.run_id for p in expand(FORECAST_TRIALS["P4"].sweep)} == fitted
    held = {p.ref.run_id for p in expand(FORECAST_TRIALS["P5"].sweep) if p.ref.size in HELD_OUT}
    assert not held & fitted
    largest = parse_size(FITTED[-1]).num_block_params
    assert [parse_size(size).num_block_params / largest for size in HELD_OUT] == [4.0, 16.0]
    assert FORECAST_TRIALS["P5"].sweep.lrs == PAPER_LRS


def test_a_run_without_the_signal_is_an_error() -> None:
    """contract."""
    runs = [dataclasses.replace(study("P4")[0], lr=0.1, signals={})]
    with pytest.raises(ValueError, match="lr 0.1 seed 3 has not recorded attn/blocks.0"):
        observations_of(runs)
