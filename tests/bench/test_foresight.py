"""foresight: rows at risk by hand, a forecast that is calibrated where it can be, and none where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aftershock.bench.corpus import Signal, Trace
from aftershock.bench.foresight import (
    EVERY,
    NAMES,
    Rows,
    Steps,
    fit_and_forecast,
    judge_forecasts,
    live_name,
    rows_of,
    steps_of,
)
from aftershock.bench.scoring import Target
from aftershock.forecast.hazard import SETS, SHIPPED, WITHIN, Track, probability
from tests.bench.test_precursors import make_runs


def _trace(*targets: Target, num_steps: int = 100) -> Trace:
    return Trace("x", "spontaneous", 0, {}, targets, num_steps)


def _signals(num_steps: int = 100) -> dict[str, Signal]:
    rng = np.random.default_rng(0)
    steps = list(range(num_steps))
    return {
        "loss/train/mean": Signal(steps, rng.normal(2, 0.01, num_steps).tolist()),
        "grad/all/norm": Signal(steps[1:], rng.lognormal(0, 0.1, num_steps - 1).tolist()),
    }


def test_steps_have_the_features_of_the_tracks() -> None:
    """equivalence: those of a track that was given the same values, also where a signal starts later."""
    signals = _signals()
    found = steps_of(signals, _trace())
    track = Track("gradient")
    for step in range(100):
        if step:
            track.add(signals["grad/all/norm"].values[step - 1])
        columns = [NAMES.index("gradient/now"), NAMES.index("gradient/fast")]
        assert found.x_NC[step, columns].tolist() == track.features()
    assert found.there == {"loss", "gradient"}


def test_who_is_at_risk() -> None:
    """oracle: by hand: not before 20 losses, not within a spike, not where what comes is not known."""
    found = steps_of(_signals(), _trace(Target(30, 50, 52, 55), Target(56, 80, 80, 99)))
    ahead = found.ahead_N
    assert (ahead[:19] == -1).all()
    assert (ahead[19], ahead[49]) == (31, 1)
    assert (ahead[50:56] == -1).all()
    assert (ahead[56], ahead[79]) == (24, 1)
    assert (ahead[80:] == -1).all()
    names = ("loss/now",)
    one = rows_of([found], [0], [0], names, 1)
    assert (one.y_N.sum(), len(one.y_N)) == (2, 31 + 24)
    eight = rows_of([found], [0], [0], names, 8)
    assert eight.y_N.sum() == 16
    calm = rows_of([steps_of(_signals(), _trace())], [0], [0], names, 8)
    assert (calm.y_N.sum(), len(calm.y_N)) == (0, 100 - 8 - 19)  # of the last 8 steps the future is not known
    assert len(rows_of([found], [0], [0], names, 32).y_N) == len(range(20, 50, EVERY[32])) + len(range(56, 80, 4))


def test_runs_without_the_signals_are_left_out() -> None:
    """contract."""
    with_both = steps_of(_signals(), _trace())
    alone = steps_of({"loss/train/mean": _signals()["loss/train/mean"]}, _trace())
    rows = rows_of([alone, with_both], [0, 1], [0, 1], ("loss/now", "gradient/now"), 1)
    assert set(rows.run_N.tolist()) == {1}
    assert set(rows.specimen_N.tolist()) == {1}


def _rows(seed: int, *, specimens: int = 8, per: int = 600, slope: float = 1.0) -> Rows:
    """Log-odds -3 + slope x in every specimen."""
    rng = np.random.default_rng(seed)
    x_N = rng.exponential(1.0, specimens * per)
    y_N = rng.random(len(x_N)) < 1 / (1 + np.exp(3 - slope * x_N))
    specimen_N = np.repeat(np.arange(specimens), per)
    return Rows(x_N[:, None], y_N, specimen_N * 10 + seed, specimen_N)


def test_what_can_be_forecast_is() -> None:
    """planted: the fit finds the line, for rows of known specimens and of others alike."""
    found = fit_and_forecast(_rows(0), _rows(1))
    # standard errors of 4,800 outcomes, a tenth of them positive
    assert (found.line.intercept, found.line.coef_C[0]) == pytest.approx((-3.0, 1.0), abs=0.25)
    assert np.abs(found.unseen_N - found.seen_N).max() < 1.0
    assert set(found.apart) == set(range(8))


def test_what_one_specimen_alone_shows_is_not_trusted_in_it() -> None:
    """planted: x means something in specimen 0 only; without it the forecast there is the base rate's."""
    tuning, held = (_rows(seed, slope=0.0) for seed in (0, 1))
    mine = tuning.specimen_N == 0
    y_N = np.where(mine, tuning.x_NC[:, 0] > 1.5, tuning.y_N)
    found = fit_and_forecast(tuning._replace(y_N=y_N), held)
    chance = [probability(value) for value in found.unseen_N[held.specimen_N == 0].tolist()]
    assert max(chance) - min(chance) < 0.05
    assert np.mean(chance) == pytest.approx(1 / (1 + math.e**3), abs=0.02)


def test_the_whole_way_on_runs_that_are_foretold() -> None:
    """planted: a gradient five steps ahead: skill in known and unseen specimens, calibrated, and none from the loss."""
    runs = make_runs(third=5, fourth=5)
    judged = judge_forecasts(runs, tuning_seeds=(0, 2), processes=1, sets=(*SETS[:2], SETS[5]))
    assert [hazard.signals for hazard in judged.hazards] == list(SHIPPED[:2])
    by_name = {(one.name, one.k): one for one in judged.forecasters}
    ours, loss = by_name[live_name(SETS[1]), 8], by_name[live_name(SETS[0]), 8]
    assert ours.log_skill.value is not None
    assert ours.log_skill.value > 0.3
    assert ours.unseen_log_skill.value is not None
    assert ours.unseen_log_skill.value > 0.3
    assert loss.unseen_log_skill.value is not None
    assert abs(loss.unseen_log_skill.value) < 0.1
    assert by_name["robust z of the gradient norm", 8].gain_over_gradient.value == 0.0
    assert [one.k for one in judged.forecasters[: len(WITHIN)]] == list(WITHIN)
    assert sum(bin_.count for bin_ in ours.reliability) == ours.steps
    claimed = sum(bin_.count * bin_.claimed for bin_ in ours.reliability)
    assert claimed == pytest.approx(ours.onsets, rel=0.5)  # 8 spikes
    steps, score = judged.scored[0][live_name(SETS[1]), "level"]
    assert len(steps) == len(score)
    assert math.isinf(score[0])
    assert score[298] > score[200] + 2


def test_steps_are_plain_values() -> None:
    """contract: a run without spikes is at risk to its end."""
    found = steps_of(_signals(), _trace())
    assert isinstance(found, Steps)
    assert np.isinf(found.ahead_N[19:]).all()
