from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.bench.curves import (
    Counts,
    Field,
    area,
    areas,
    areas_in_budget,
    counts_of,
    field_of,
    interval,
    once,
    points,
    recall_in_budget,
    resampled,
    weighted_medians,
)
from aftershock.bench.scoring import HORIZON, REFRACTORY, Target, episodes, num_healthy_steps, tally

STEPS, RUNS = 1600, 4
SPIKES = [Target(onset - HORIZON, onset, onset + 9, onset + 20) for onset in (500, 900, 1300)]


def _area(alarms: list[range] | list[list[int]]) -> tuple[float, float]:
    """Area at lead >= 8, and false alarms per 10,000, of a detector with these alarms at each of its settings."""
    tallies = [[tally(episodes(steps), SPIKES) for steps in alarms] for _ in range(RUNS)]
    field = field_of([SPIKES] * RUNS, [num_healthy_steps(SPIKES, STEPS)] * RUNS)
    curve = points(counts_of(tallies), field, once(RUNS))
    return float(areas(curve)[0, -1]), float(curve.false_rate_BS[0, 0])


def test_a_perfect_detector_has_area_one_and_a_silent_one_none() -> None:
    """planted."""
    assert _area([[target.onset for target in SPIKES]]) == (1.0, 0.0)
    assert _area([[]]) == (0.0, 0.0)


def test_a_detector_that_always_fires_has_the_base_rate_as_precision() -> None:
    """planted: every spike caught, and a false alarm each `REFRACTORY` healthy steps."""
    found, rate = _area([range(STEPS)])
    healthy = num_healthy_steps(SPIKES, STEPS)
    expected = len(SPIKES) / (len(SPIKES) + healthy / REFRACTORY)
    assert found == pytest.approx(expected, rel=0.05)  # blocks of 16 steps are cut at the edges of 3 targets
    assert rate == pytest.approx(10_000 / REFRACTORY, rel=0.05)  # likewise


def test_a_worse_setting_never_makes_the_area_smaller() -> None:
    """property: half caught without a false alarm, then all of them at the price of an alarm everywhere."""
    alone, _ = _area([[SPIKES[0].onset]])
    both, _ = _area([[SPIKES[0].onset], list(range(STEPS))])
    always, _ = _area([range(STEPS)])
    assert alone == pytest.approx(1 / 3)
    assert both == pytest.approx(1 / 3 + 2 / 3 * always)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_the_area_is_that_under_the_envelope(pairs: list[tuple[float, float]]) -> None:
    """oracle: the best precision at or beyond each recall, summed over a fine grid."""
    precision, recall = np.array([[p for p, _ in pairs]]), np.array([[r for _, r in pairs]])
    grid = (np.arange(2000) + 0.5) / 2000
    best = [max((p for p, r in pairs if r >= x), default=0.0) for x in grid]
    # each jump of the envelope is misplaced by at most one cell of the grid
    assert area(precision, recall)[0] == pytest.approx(np.mean(best), abs=len(pairs) / 2000)


def test_settings_over_the_budget_do_not_count_within_it() -> None:
    """planted: the loose setting catches both targets with 2 false alarms in 10,000 steps, the strict one catches 1."""
    caught = np.array([[[2.0] * 5, [1.0] * 5]])
    false = np.array([[[2.0] * 5, [0.0] * 5]])
    counts = Counts(caught, false, np.array([[2.0, 0.0]]))
    curve = points(counts, Field(np.full((1, 5), 2.0), np.array([10_000.0])), once(1))
    assert curve.false_rate_BS.tolist() == [[2.0, 0.0]]
    assert recall_in_budget(curve).tolist() == [[0.5] * 5]
    assert areas_in_budget(curve)[0, 1] == 0.5
    assert areas(curve)[0, 1] == 0.5 + 0.5 * 0.5


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """planted: recall 0.6 over 60 runs of one target; of 200 intervals at 95 %, about 190 hold it."""
    rng = np.random.default_rng(0)
    weights = resampled(60, samples=400)
    field = Field(np.ones((60, 5)), np.full(60, 100.0))
    held = 0
    for _ in range(200):
        hits = rng.random(60) < 0.6
        caught = np.repeat(hits[:, None, None], 5, axis=2).astype(float)
        curve = points(Counts(caught, np.zeros_like(caught), np.zeros((60, 1))), field, weights)
        low, high = interval(curve.recall_BSK[:, 0, 0])
        held += low <= 0.6 <= high
    assert 175 <= held <= 198  # four standard errors (3.1) around 190, and percentile intervals are a little narrow


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=1, max_size=12))
def test_a_weighted_median_is_that_of_the_runs_drawn(values: list[tuple[int, int]]) -> None:
    """oracle: each run repeated as often as it was drawn; the lower middle of an even number."""
    steps, runs = np.array([v for v, _ in values], dtype=float), np.array([r for _, r in values])
    weights = np.array([[1.0, 2.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    for found, row in zip(weighted_medians(steps, runs, weights), weights, strict=True):
        drawn = sorted(v for v, r in values for _ in range(int(row[r])))
        assert math.isnan(found) if not drawn else found == drawn[(len(drawn) - 1) // 2]
