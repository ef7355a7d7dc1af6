"""What is read off a replay's losses, on curves whose answer is known."""

from __future__ import annotations

import math

import pytest

from aftershock.replay.response import Response, baseline, cost, effect, measure, recovery, wilson
from aftershock.replay.run import Window

WINDOW = Window(60, 100, 102, 106)


def curve(spike: list[float], *, onset: int = 100, steps: int = 160, level: float = 1.0) -> dict[int, float]:
    losses = dict.fromkeys(range(40, steps), level)
    return losses | {onset + i: level * value for i, value in enumerate(spike)}


SPIKE = [2.0, 10.0, 100.0, 10.0, 2.0, 1.5]


def test_heights_are_logs_over_the_level() -> None:
    """oracle: a spike of a factor 100 over a level of 1e-5 is ln 100 high, whatever the level."""
    for level in (1.0, 1e-5, 300.0):
        base = baseline(curve(SPIKE, level=level), WINDOW)
        found = measure(curve(SPIKE, level=level), base, since=60)
        assert found.peak_excess == pytest.approx(math.log(100), rel=1e-9)  # one log and one exp
        assert base.height == found.peak_excess
        assert found.present
        assert (found.onset, found.peak_step, found.duration) == (100, 102, 6)
        # Ln of each loss less the band of 3 sigma at 0.01 each: summed by hand.
        expected = sum(math.log(v) - 0.03 for v in SPIKE)
        assert found.area == pytest.approx(expected, rel=1e-9)


def test_recovery_is_the_first_of_five_calm_steps() -> None:
    """oracle: at a twentieth of the peak, in the loss's own unit, it counts as recovered."""
    base = baseline(curve(SPIKE), WINDOW)
    # (100 - 1) / 20 + 1 = 5.95: so 2.0 at step 104 is back, 10 at step 103 is not.
    assert recovery(curve(SPIKE), 102, base) == 104
    assert recovery({s: v for s, v in curve(SPIKE).items() if s < 108}, 102, base) is None


def test_half_the_height_decides_whether_the_spike_is_there() -> None:
    """planted: in log units, so a hundredfold spike is there from tenfold on."""
    base = baseline(curve(SPIKE), WINDOW)
    assert measure(curve([1.0, 11.0]), base, since=60).present
    assert not measure(curve([1.0, 9.0]), base, since=60).present
    quiet = measure(curve([]) | {70: 1.01, 110: 1.02}, base, since=60)  # within the band of 3 sigma at 0.01
    assert (quiet.present, quiet.onset, quiet.area, quiet.recovery) == (False, None, 0.0, None)


def test_only_what_comes_after_the_change_counts() -> None:
    """contract: `since` keeps the shared prefix out."""
    base = baseline(curve(SPIKE), WINDOW)
    assert not measure(curve(SPIKE), base, since=110).present
    with pytest.raises(ValueError, match="took no step"):
        measure(curve(SPIKE), base, since=500)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_higher_than_any(bad: float) -> None:
    """planted: and the first such step is named."""
    base = baseline(curve(SPIKE), WINDOW)
    found = measure(curve([2.0, bad, 5.0, bad]), base, since=60)
    assert (found.peak_excess, found.peak_step, found.nonfinite_at, found.present) == (math.inf, 101, 101, True)
    recorded = baseline(curve([2.0, bad]), Window(60, 100, 101, 102))
    assert recorded.height == math.inf
    assert math.isfinite(recorded.threshold)


def test_losses_below_zero_are_measured_in_their_spread() -> None:
    """oracle: level -3 +- 1, a rise to 97 is 100 / 1.4826 of its scaled MAD."""
    calm = {step: -3.0 + (-1.0) ** step for step in range(40, 100)}
    base = baseline(calm | {100: 97.0, 101: 97.0, 102: 97.0}, Window(60, 100, 100, 103))
    assert base.unit == "sigma"
    assert base.excess(97.0) == pytest.approx(100 / 1.482602218505602, rel=1e-9)


def test_no_level_is_refused() -> None:
    """contract: nothing recorded before the onset."""
    with pytest.raises(ValueError, match="start the recording earlier"):
        baseline({100: 1.0, 101: 5.0}, Window(60, 100, 101, 102))


def response(peak: float, *, present: bool) -> Response:
    return Response(present, peak, 100, 1.0, 3, 100, 105, None, None, 1.0, 2.0, True)


def test_effect_is_the_difference_from_the_shams() -> None:
    """oracle: medians 1 and 5, every sham above the cell."""
    shams = [response(peak, present=True) for peak in (4.0, 5.0, 5.0, 6.0)]
    found = effect([response(1.0, present=False)], shams)
    assert (found.log_peak, found.removed, found.sham_removed, found.beyond) == (-4.0, 1.0, 0.0, True)
    assert -5.0 <= found.low <= -4.0 <= found.high <= -3.0
    assert found.sham_low == 0.0
    assert found.sham_high == pytest.approx(0.4899, abs=1e-4)


def test_effect_of_nothing_is_no_effect() -> None:
    """planted: a cell drawn as the shams are has an interval around 0, and infinite peaks on both sides are equal."""
    shams = [response(peak, present=True) for peak in (4.0, 5.0, 4.5, 6.0, 5.5)]
    found = effect([response(5.2, present=True)], shams)
    assert found.low <= 0 <= found.high
    assert not found.beyond
    both = effect([response(math.inf, present=True)], [response(math.inf, present=True)] * 3)
    assert (both.log_peak, both.low, both.high) == (0.0, 0.0, 0.0)
    assert effect([response(1.0, present=False)], [response(math.inf, present=True)] * 3).log_peak == -math.inf
    with pytest.raises(ValueError, match="shams"):
        effect([response(1.0, present=False)], [])


def test_wilson_against_its_published_form() -> None:
    """oracle: 1 of 10 by the textbook formula gives 0.018 to 0.404."""
    assert wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


def test_cost_is_read_on_calm_steps_only() -> None:
    """oracle: a remedy that doubles the calm loss costs ln 2, however it does in the spike."""
    base = baseline(curve(SPIKE), WINDOW)
    cell = dict.fromkeys(curve([]), 2.0)
    assert cost(cell, curve(SPIKE), base, since=60) == pytest.approx(math.log(2), rel=1e-9)
    assert math.isnan(cost(cell, dict.fromkeys(range(40, 160), 50.0), base, since=60))
