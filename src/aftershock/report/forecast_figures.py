"""Geometry of a forecast's plots: failing rate against size, and each signal of the target against rate.

Turns the forecast into coordinates and path strings in `charts`' panels; the template only prints them. All axes are
logarithmic; values below are in decades. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from aftershock.forecast.fits import Interval
from aftershock.forecast.observations import Curve, Observation, Reading, curves_of
from aftershock.forecast.outlook import Outlook, QuantityForecast
from aftershock.report import charts
from aftershock.report.charts import Line, Mark, Panel, Tick
from aftershock.report.replay_axes import Axis
from aftershock.report.words import count, number, rate

RESTS, FORECAST, CHECK = 0, 1, 2
"""Numbers of the marks and colours: runs it rests on, forecast, trained since."""
MARGIN = 18.0
OPEN = 0.15
"""Decades that an open end is drawn beyond the ladder."""
JITTER = 3.0
"""Between seeds of one size, which would hide each other."""


def failing_panel(outlook: Outlook) -> Panel | None:
    """Brackets of the curves, the fit's interval at each size, and what was found at the target since."""
    sized = [(math.log10(one.num_params), one.rate) for one in outlook.failing_by_size]
    if all(interval is None for _, interval in sized):
        return None
    x = _across([at for at, _ in sized])
    rates = [math.log10(lr) for lr in outlook.rates]
    ends = [math.log10(end) for _, interval in sized if interval is not None for end in interval]
    y = _up([rates[0] - OPEN, rates[-1] + OPEN, *ends])
    known = [(x.at(at), interval) for at, interval in sized if interval is not None]
    lines = [
        _band(known, y, title=f"{outlook.target}, forecast"),
        _brackets(curves_of(outlook.runs), x, y, RESTS),
    ]
    if outlook.checked_by:
        lines.append(_brackets(curves_of(outlook.checked_by), x, y, CHECK))
    return Panel(
        title="Failing rate against size",
        subtitle=f"parameters in blocks; intervals of {outlook.level:.0%} for one new seed",
        label="Failing learning rate against size; the tables below hold the numbers",
        x_ticks=_apart(
            Tick(at=x.at(math.log10(one.num_params)), label=f"{one.size} ({count(one.num_params)})")
            for one in outlook.failing_by_size
        ),
        y_ticks=tuple(Tick(at=y.at(math.log10(lr)), label=rate(lr)) for lr in outlook.rates),
        rule_y=None,
        rule_label="",
        lines=tuple(lines),
    )


def quantity_panels(outlook: Outlook) -> list[Panel]:
    """A panel for each signal that is forecast: its interval at the target by rate, its danger line, the runs."""
    return [_quantity_panel(outlook, one) for one in outlook.quantities if one.by_rate]


def _quantity_panel(outlook: Outlook, one: QuantityForecast) -> Panel:
    rates = [math.log10(lr) for lr in outlook.rates]
    x = _across(rates)
    line = None if one.line is None else math.log10(one.line.value)
    seen = [*_seen(outlook.runs, one.key), *_seen(outlook.checked_by, one.key)]
    ends = [math.log10(end) for at in one.by_rate for end in at.interval if end > 0]
    finite = [end for _, reading in seen for end in reading if math.isfinite(end)]
    y = _up([*ends, *finite, *([] if line is None else [line])])
    bands = [(x.at(math.log10(at.lr)), at.interval) for at in one.by_rate]
    lines = [_band(bands, y, title=f"{outlook.target}, forecast"), _readings(outlook.runs, one.key, x, y, RESTS)]
    if outlook.checked_by:
        lines.append(_readings(outlook.checked_by, one.key, x, y, CHECK))
    return Panel(
        title=one.title,
        subtitle="against learning rate",
        label=f"{one.title} against learning rate; the tables below hold the numbers",
        x_ticks=_apart(Tick(at=x.at(at), label=rate(lr)) for at, lr in zip(rates, outlook.rates, strict=True)),
        y_ticks=_decade_ticks(y),
        rule_y=None if line is None else y.at(line),
        rule_label="" if one.line is None else f"danger line {number(one.line.value, 2)}",
        lines=tuple(lines),
    )


def _band(spots: Sequence[tuple[float, Interval]], y: Axis, *, title: str) -> Line:
    """The line through the values, within their intervals."""
    values = [(at, y.at(math.log10(interval.value))) for at, interval in spots]
    upper = [(at, y.at(math.log10(interval.high))) for at, interval in spots]
    lower = [(at, y.at(math.log10(interval.low))) for at, interval in spots]
    marks = tuple(
        Mark(
            title=f"{title}: {number(interval.value, 2)} ({number(interval.low, 2)} to {number(interval.high, 2)})",
            failed=False,
            path=charts.symbol_at(FORECAST, at, up),
        )
        for (at, up), (_, interval) in zip(values, spots, strict=True)
    )
    return Line(
        arm="forecast", index=FORECAST, path=_path(values), band=f"{_path([*upper, *reversed(lower)])}Z", marks=marks
    )


def _brackets(curves: Sequence[Curve], x: Axis, y: Axis, index: int) -> Line:
    """From the last rate that trains to the first that fails, one a seed; an open one runs to the axis' end."""
    path, marks = "", []
    for curve in curves:
        seeds = [each.seed for each in curves if each.size == curve.size]
        at = x.at(math.log10(curve.num_params)) + JITTER * (seeds.index(curve.seed) - (len(seeds) - 1) / 2)
        low, high = (min(max(end, y.low), y.high) for end in curve.bracket)
        path += f"M{at:.1f} {y.at(low):.1f}V{y.at(high):.1f}"
        words = f"trains at {_rate(curve.bracket.low)}, fails from {_rate(curve.bracket.high)}"
        title = f"{curve.size}, seed {curve.seed}: {words}"
        marks.append(Mark(title=title, failed=False, path=charts.symbol_at(index, at, y.at((low + high) / 2))))
    return Line(arm="runs", index=index, path=path, band="", marks=tuple(marks))


def _readings(runs: Sequence[Observation], key: str, x: Axis, y: Axis, index: int) -> Line:
    """A mark for each run; one of which only a bound is known, since it diverged, is a cross."""
    marks = []
    for run, reading in _seen(runs, key):
        bound = reading.low != reading.high
        spot = next(end for end in reading if math.isfinite(end))
        at, up = x.at(math.log10(run.lr)), y.at(spot)
        value = f"{'at least ' if bound else ''}{number(10**spot)}"
        path = f"M{at - 3.6:.1f} {up - 3.6:.1f}l7.2 7.2m0-7.2l-7.2 7.2" if bound else charts.symbol_at(index, at, up)
        marks.append(Mark(title=f"{run.size}, rate {rate(run.lr)}, seed {run.seed}: {value}", failed=bound, path=path))
    return Line(arm="runs", index=index, path="", band="", marks=tuple(marks))


def _seen(runs: Sequence[Observation], key: str) -> list[tuple[Observation, Reading]]:
    """The runs of which something is known of the signal."""
    pairs = [(run, run.readings[key]) for run in runs if key in run.readings]
    return [(run, reading) for run, reading in pairs if any(map(math.isfinite, reading))]


def _across(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    return Axis(low, high if high > low else low + 1, charts.LEFT + MARGIN, charts.WIDTH - charts.RIGHT - MARGIN)


def _up(values: Iterable[float]) -> Axis:
    """With a little room at both ends."""
    found = list(values)
    low, high = min(found), max(found)
    room = max(0.08 * (high - low), 0.05)  # the label of a line at the lower end stands below it
    return Axis(low - room, high + room, charts.HEIGHT - charts.BOTTOM, charts.TOP)


def _decade_ticks(y: Axis) -> tuple[Tick, ...]:
    """At powers of ten, or, where fewer than three are in sight, at 1, 2 and 5 times them."""
    factors = (1.0,) if y.high - y.low >= 3 else (1.0, 2.0, 5.0)
    decades = range(math.floor(y.low), math.ceil(y.high) + 1)
    values = [decade + math.log10(factor) for decade in decades for factor in factors]
    step = 1 if y.high - y.low < 9 else 2
    inside = [value for value in values if y.low <= value <= y.high][::step]
    return tuple(Tick(at=y.at(value), label=number(10**value, 2)) for value in inside)


def _apart(ticks: Iterable[Tick], gap: float = 46.0) -> tuple[Tick, ...]:
    """Labels that do not run into each other; the last, which is the target's or the highest rate, always stays."""
    kept: list[Tick] = []
    for tick in reversed(list(ticks)):
        if not kept or kept[-1].at - tick.at >= gap:
            kept.append(tick)
    return tuple(reversed(kept))


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(spots))


def _rate(decades: float) -> str:
    return "no rate" if math.isinf(decades) else rate(10**decades)
