"""The page of a forecast: one self-contained HTML file with its plots, the runs behind it and what checked it later.

Drawn from the forecast alone, which it repeats in `script#numbers`. jinja2 is imported inside.
"""

from __future__ import annotations

import json
from pathlib import Path

from aftershock._version import __version__
from aftershock.forecast.observations import Observation
from aftershock.forecast.outlook import Outlook
from aftershock.report import charts, paper, words
from aftershock.report.forecast_figures import failing_panel, quantity_panels

NAME = "forecast.html"
LEGEND = ("runs it rests on", "forecast", "trained since")
"""By number of the mark and colour in every panel."""


def write_forecast_page(outlook: Outlook, folder: str | Path) -> Path:
    """Write `forecast.html` into `folder`; it opens offline.

    Example:
        path = write_forecast_page(forecast_study(["out/sweep"], to="128x2"), "out/forecast")
    """
    return paper.write_whole(Path(folder) / NAME, render_forecast(outlook))


def render_forecast(outlook: Outlook) -> str:
    """The page as ASCII HTML."""
    env = paper.environment()
    env.filters.update(
        loss=words.loss, number=words.number, rate=words.rate, count=words.count, setting=str, heat=float
    )
    env.globals.update(
        width=charts.WIDTH, height=charts.HEIGHT, left=charts.LEFT, right=charts.RIGHT, bottom=charts.BOTTOM
    )
    used = LEGEND if outlook.check is not None else LEGEND[:2]
    page = env.get_template("forecast.html.j2").render(
        o=outlook,
        headline=headline(outlook),
        failing=failing_panel(outlook),
        panels=quantity_panels(outlook),
        arms=[{"arm": name, "settings": {}} for name in used],
        symbols=[charts.symbol(index) for index in range(len(used))],
        runs=[(run, outcome(run)) for run in (*outlook.runs, *outlook.checked_by)],
        num_fitted=len(outlook.runs),
        json=paper.embedded(json.dumps(outlook.to_json(), allow_nan=False)),
        version=__version__,
        style=paper.asset("templates/style.css"),
    )
    return paper.ascii_html(page)


def headline(outlook: Outlook) -> str:
    """What the page is opened for, in one sentence."""
    rate = outlook.failing.rate
    if rate is None:
        return f"{outlook.target}: no failing rate can be foretold"
    span = f"{words.number(rate.low, 2)} to {words.number(rate.high, 2)}"
    return f"{outlook.target} starts to fail at a rate of {words.number(rate.value, 2)} ({span})"


def outcome(run: Observation) -> str:
    """How a run ended."""
    if run.final_loss is None:
        return "diverged"
    return f"{words.loss(run.final_loss)}{', fails' if run.fails else ''}"
