from __future__ import annotations

import pytest

from aftershock.bench.probes import after_nan, update_cost
from aftershock.signals.detect.registry import OURS


@pytest.mark.parametrize(
    ("name", "event", "false_alarms", "armed_after"),
    [
        (OURS, True, 0, 0),
        ("lightning", True, 0, 0),
        ("olmo-skip", True, 128, 0),  # skips the 128 good steps that share a window with the NaN
        ("stability-monitor", False, 0, 128),
        ("zclip", False, 0, None),  # its mean is NaN for ever
        ("flagscale", False, 0, 1),
        ("delayed-mean", False, 0, 999),  # in the old half of its window from 500 to 1,000 steps later
    ],
)
def test_what_a_nan_does(name: str, event: bool, false_alarms: int, armed_after: int | None) -> None:
    """planted: the defects that the adapters repeat, and that ours has none of them."""
    found = after_nan(name)
    assert found.sees_spike
    assert (found.event, found.false_alarms, found.armed_after) == (event, false_alarms, armed_after)


def test_a_rule_that_sees_no_single_spike_is_not_called_deaf() -> None:
    """planted: five in a row are its least."""
    found = after_nan("kill-loss-spike")
    assert (found.sees_spike, found.armed_after) == (False, None)


def test_an_update_takes_some_time() -> None:
    """property."""
    assert 0 < update_cost("lightning") < update_cost("spike-score")
