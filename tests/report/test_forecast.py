"""The page of a forecast: its plots hold what was forecast, what it rests on and what checked it; it opens offline."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aftershock.forecast.observations import Observation, Observations, Reading, judged
from aftershock.forecast.outlook import Outlook, forecast, set_apart
from aftershock.lab.presets import tiny_run
from aftershock.lab.recipe import PAPER_LRS
from aftershock.lab.sizes import parse_size
from aftershock.report.forecast import headline, render_forecast, write_forecast_page
from aftershock.report.forecast_figures import failing_panel, quantity_panels


def runs(sizes: Sequence[str], *, starts: float = 0.05) -> list[Observation]:
    """Runs that fail from the rate `starts` on; the logit grows as the rate, and at the highest rate the run dies."""
    noise, found = np.random.default_rng(0), []
    for size in map(parse_size, sizes):
        for seed in (0, 1):
            for lr in PAPER_LRS:
                died, value = lr > 0.2, 2.0 + math.log10(lr) + 0.05 * noise.standard_normal()
                above = Reading(value, math.inf if died else value)
                grad = Reading(-math.inf, math.inf) if died else Reading(-value - 3, -value - 3)
                readings = dict.fromkeys(("early_logit", "logit", "abs_log_z", "output_rms"), above)
                found.append(
                    Observation(
                        run_id=f"{size.label}-{lr:g}-{seed}",
                        size=size.label,
                        width=size.width,
                        depth=size.depth,
                        num_params=size.num_block_params,
                        lr=lr,
                        seed=seed,
                        initial_loss=5.5,
                        final_loss=None if died else 5.4 if lr >= starts else 2.0,
                        fails=False,
                        seconds=1.0,
                        readings=readings | {"grad_rms": grad},
                    )
                )
    return found


def outlook(*sizes: str, **settings: Any) -> Outlook:
    config = dataclasses.replace(tiny_run(steps=200), measure_every=4)
    seen = Observations("out/sweep", "no_qk_norm", config, judged(runs(sizes, **settings)), ())
    target = parse_size("96x2")
    others, later = set_apart(seen, target)
    return forecast(others, target, lr=0.01, later=later)


@pytest.fixture(scope="module")
def checked() -> Outlook:
    return outlook("16x2", "32x2", "48x2", "96x2")


def test_every_signal_has_a_panel_with_its_runs(checked: Outlook) -> None:
    """contract: the band over the ladder, a mark for each run that has the signal, a cross for each that died."""
    panels = quantity_panels(checked)
    assert [panel.title for panel in panels] == [one.title for one in checked.quantities if one.by_rate]
    for panel in panels:
        band, fitted, check = panel.lines
        assert len(band.marks) == len(PAPER_LRS)
        known = 6 if "gradient" in panel.title else 7  # nothing is known of the gradient of a run that died
        assert (len(fitted.marks), len(check.marks)) == (6 * known, 2 * known)
        assert sum(mark.failed for mark in fitted.marks) == (0 if known == 6 else 6)
    ruled = {panel.title: panel.rule_label for panel in panels}
    assert ruled["|log Z| at the end"] == "danger line 100"
    assert ruled["output RMS at the end"] == ""


def test_a_bar_reaches_from_the_last_rate_that_trains_to_the_first_that_fails(checked: Outlook) -> None:
    """oracle: brackets at 0.03 and 0.1 for every seed; the target's are those trained since."""
    panel = failing_panel(checked)
    assert panel is not None
    ticks = {tick.label: tick.at for tick in panel.y_ticks}
    bars = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", panel.lines[1].path)
    assert len(bars) == 6
    for low, high in bars:
        assert float(low) == pytest.approx(ticks["0.03"], abs=0.06)  # printed with one digit
        assert float(high) == pytest.approx(ticks["0.1"], abs=0.06)
    assert [mark.title for mark in panel.lines[2].marks] == [
        f"96x2, seed {seed}: trains at 0.03, fails from 0.1" for seed in (0, 1)
    ]


def test_what_never_fails_is_drawn_open(checked: Outlook) -> None:
    """planted: without a failing run there is no failing rate, no plot of it, and the headline says so."""
    calm = checked._replace(failing=checked.failing._replace(rate=None, refused="no run fails"), failing_by_size=())
    assert failing_panel(calm) is None
    assert headline(calm) == "96x2: no failing rate can be foretold"
    assert "No run fails." in render_forecast(calm)


def test_the_page_is_whole_and_repeats_its_numbers(checked: Outlook, tmp_path: Path) -> None:
    """round trip: the embedded JSON is the forecast; the page needs nothing from elsewhere."""
    page = write_forecast_page(checked, tmp_path).read_text(encoding="ascii")
    found = re.search(r'<script type="application/json" id="numbers"[^>]*>(.*?)</script>', page, re.S)
    assert found is not None
    assert json.loads(found.group(1)) == json.loads(json.dumps(checked.to_json()))
    assert not re.search(r'(?:src|href)="https?:', page)
    assert headline(checked) in page
    assert page.count("<td>check</td>") == 14
    assert checked.check is not None
    assert checked.check.rungs == 0.0


def test_without_runs_of_the_target_nothing_is_said_of_a_check() -> None:
    """contract: two marks in the legend, no table of what came later."""
    plain = outlook("16x2", "32x2", "48x2")
    page = render_forecast(plain)
    assert 'id="later"' not in page
    assert "trained since" not in page
    assert all(len(panel.lines) == 2 for panel in quantity_panels(plain))
