from __future__ import annotations

from typing import Any

import pytest

from aftershock.report import charts


def test_marks_lie_inside_and_diverged_runs_on_the_rule(numbers: dict[str, Any]) -> None:
    """contract: one mark per ended run, crosses at the initial loss."""
    panels = charts.loss_panels(numbers)
    assert [panel.title for panel in panels] == ["w32-d2", "w64-d3"]
    assert sum(len(line.marks) for panel in panels for line in panel.lines) == 56
    assert sum(mark.failed for panel in panels for line in panel.lines for mark in line.marks) == 10
    assert panels[0].y_ticks == panels[1].y_ticks
    for panel in panels:
        assert panel.rule_y is not None
        ticks = [tick.at for tick in (*panel.y_ticks,)]
        assert all(charts.TOP <= at <= charts.HEIGHT - charts.BOTTOM for at in [*ticks, panel.rule_y])
        assert all(charts.LEFT <= tick.at <= charts.WIDTH - charts.RIGHT for tick in panel.x_ticks)


def test_sensitivity_has_a_point_per_size_and_arm(numbers: dict[str, Any]) -> None:
    panel = charts.sensitivity_panel(numbers)
    assert panel is not None
    assert [len(line.marks) for line in panel.lines] == [2, 2]
    assert all(line.band.count("M") == 2 for line in panel.lines)


@pytest.mark.parametrize(("low", "high"), [(1.9, 6.0), (0.0, 1e-6), (3.0, 3.0), (1e-4, 2e-4), (0.0, 950.0)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    """contract: any range."""
    scale = charts._linear(low, high)
    assert 3 <= len(scale.ticks) <= 9
    assert len({tick.label for tick in scale.ticks}) == len(scale.ticks)
    assert scale.low <= low
    assert scale.high >= high
    assert all(abs(scale.y(float(tick.label)) - tick.at) < 0.3 for tick in scale.ticks)  # labels are not rounded away
