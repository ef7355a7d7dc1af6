"""Geometry of the page's two static charts: final loss against rate (one panel per size), sensitivity against size.

Turns the numbers into coordinates, path strings and labels; the template only prints them. Coordinates are SVG user
units, y downwards. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aftershock.report.words import count, loss, rate

WIDTH, HEIGHT = 460, 292
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 18, 38
DODGE = 7.0
"""Sideways shift between arms, so that marks at one rate do not hide each other."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label at a coordinate of its axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One seed's final loss. `failed`: it diverged, and is drawn as a cross on the l0 line."""

    title: str
    failed: bool
    path: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm in one panel: `path` through the means, `band` from lowest to highest seed."""

    arm: str
    index: int
    path: str
    band: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: axes, an optional dotted rule (the initial loss), and a line per arm."""

    title: str
    subtitle: str
    label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    rule_y: float | None
    rule_label: str
    lines: tuple[Line, ...]


def loss_panels(numbers: Mapping[str, Any]) -> list[Panel]:
    """One panel per size, all with the same axes, so that sizes can be compared by eye."""
    arms = [arm["arm"] for arm in numbers["arms"]]
    rates: list[float] = numbers["rates"]
    drawn = [v for g in numbers["groups"] for p in g["points"] for v in (p["low"], p["high"]) if v is not None]
    if not drawn:
        return []
    starts = [g["l0"] for g in numbers["groups"] if g["l0"] is not None]
    scale = _linear(min(drawn), max([*drawn, *starts]))
    panels: list[Panel] = []
    for size in numbers["sizes"]:
        groups = [g for g in numbers["groups"] if g["size"] == size["size"]]
        l0 = next((g["l0"] for g in groups if g["l0"] is not None), None)
        lines = [_loss_line(g, numbers, arms.index(g["arm"]), scale) for g in groups]
        blocks = size["num_block_params"]
        panels.append(
            Panel(
                title=size["size"],
                subtitle=f"{count(blocks)} parameters in blocks" if blocks is not None else "",
                label=f"Final loss against learning rate at size {size['size']}; the table below holds the numbers",
                x_ticks=tuple(Tick(at=_log_x(lr, rates), label=rate(lr)) for lr in rates),
                y_ticks=scale.ticks,
                rule_y=scale.y(l0) if l0 is not None else None,
                rule_label=f"initial loss {loss(l0)}",
                lines=tuple(lines),
            )
        )
    return panels


def sensitivity_panel(numbers: Mapping[str, Any]) -> Panel | None:
    """LR sensitivity against block parameters, a line per arm, with the bootstrap interval where there is one."""
    groups = [g for g in numbers["groups"] if g["lr_sensitivity"] is not None]
    if not groups:
        return None
    arms = [arm["arm"] for arm in numbers["arms"]]
    sizes = [s for s in numbers["sizes"] if any(g["size"] == s["size"] for g in groups)]
    params = {s["size"]: float(s["num_block_params"] or i + 1) for i, s in enumerate(sizes)}
    ladder = sorted(set(params.values()))
    tops = [value for g in groups for value in (g["lr_sensitivity"], *(g["interval"] or ()))]
    scale = _linear(0.0, max([*tops, 1e-6]))
    lines: list[Line] = []
    for index, arm in enumerate(arms):
        own = [g for g in groups if g["arm"] == arm]
        shift = _shift(index, len(arms))
        spots = [(_log_x(params[g["size"]], ladder) + shift, scale.y(g["lr_sensitivity"])) for g in own]
        whiskers = "".join(
            f"M{x:.1f} {scale.y(g['interval'][0]):.1f}V{scale.y(g['interval'][1]):.1f}"
            for (x, _), g in zip(spots, own, strict=True)
            if g["interval"] is not None
        )
        marks = tuple(
            Mark(title=f"{g['size']} {arm}: {g['lr_sensitivity']:.3f}", failed=False, path=symbol_at(index, x, y))
            for (x, y), g in zip(spots, own, strict=True)
        )
        lines.append(Line(arm=arm, index=index, path=_path(spots), band=whiskers, marks=marks))
    ticks = {_log_x(value, ladder): count(value) for value in params.values()}
    return Panel(
        title="Sensitivity against size",
        subtitle="parameters in blocks",
        label="LR sensitivity against model size; the table holds the numbers",
        x_ticks=tuple(Tick(at=at, label=label) for at, label in _apart(ticks)),
        y_ticks=scale.ticks,
        rule_y=None,
        rule_label="",
        lines=tuple(lines),
    )


def _loss_line(group: Mapping[str, Any], numbers: Mapping[str, Any], index: int, scale: _Scale) -> Line:
    rates = numbers["rates"]
    shift = _shift(index, len(numbers["arms"]))
    known = [p for p in group["points"] if p["loss"] is not None]
    spots = [(_log_x(p["lr"], rates) + shift, scale.y(p["loss"])) for p in known]
    upper = [(x, scale.y(p["high"])) for (x, _), p in zip(spots, known, strict=True)]
    lower = [(x, scale.y(p["low"])) for (x, _), p in zip(spots, known, strict=True)]
    marks: list[Mark] = []
    for run in numbers["runs"]:
        if (run["size"], run["arm"]) != (group["size"], group["arm"]) or run["outcome"] == "unfinished":
            continue
        diverged = run["outcome"] == "diverged"
        value = group["l0"] if diverged else min(run["final_loss"], group["l0"] or math.inf)
        if value is None:
            continue
        x, y = _log_x(run["lr"], rates) + shift, scale.y(value)
        step = "" if run["diverged_step"] is None else f" at step {run['diverged_step']}"
        what = f"diverged{step}" if diverged else f"loss {loss(run['final_loss'])}"
        title = f"{run['size']}, {run['arm']}, rate {rate(run['lr'])}, seed {run['seed']}: {what}"
        path = f"M{x - 3.6:.1f} {y - 3.6:.1f}l7.2 7.2m0-7.2l-7.2 7.2" if diverged else symbol_at(index, x, y)
        marks.append(Mark(title=title, failed=diverged, path=path))
    band = f"{_path([*upper, *reversed(lower)])}Z" if len(known) > 1 else ""
    return Line(arm=group["arm"], index=index, path=_path(spots), band=band, marks=tuple(marks))


def symbol_at(index: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond: arms stay apart without colour."""
    shapes = (
        f"M{x - 3.4:.1f} {y:.1f}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0Z",
        f"M{x - 3.1:.1f} {y - 3.1:.1f}h6.2v6.2h-6.2Z",
        f"M{x:.1f} {y - 4.2:.1f}l4 7h-8Z",
        f"M{x:.1f} {y - 4.4:.1f}l4.4 4.4l-4.4 4.4l-4.4-4.4Z",
    )
    return shapes[index % len(shapes)]


def symbol(index: int) -> str:
    """The arm's mark for the legend, centred in a 26 x 12 box."""
    return symbol_at(index, 13, 6)


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(spots))


def _shift(index: int, num_arms: int) -> float:
    return (index - (num_arms - 1) / 2) * min(DODGE, 24 / max(num_arms, 1))


def _log_x(value: float, ladder: Sequence[float]) -> float:
    inner = 18
    low, high = math.log(ladder[0]), math.log(ladder[-1])
    part = 0.5 if high == low else (math.log(value) - low) / (high - low)
    return LEFT + inner + part * (WIDTH - LEFT - RIGHT - 2 * inner)


def _apart(ticks: Mapping[float, str], gap: float = 46.0) -> list[tuple[float, str]]:
    """Tick labels that do not run into each other; the first always stays."""
    kept: list[tuple[float, str]] = []
    for at, label in sorted(ticks.items()):
        if not kept or at - kept[-1][0] >= gap:
            kept.append((at, label))
    return kept


@dataclass(frozen=True, kw_only=True)
class _Scale:
    low: float
    high: float
    ticks: tuple[Tick, ...] = ()

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _linear(low: float, high: float) -> _Scale:
    """A linear scale from just below `low` (0 stays 0) to just above `high`, with 4 to 8 round ticks."""
    least = 0.01 * max(abs(high), 1.0)  # a flat curve is drawn flat, not as magnified noise
    if high - low < least:
        low = 0.0 if low == 0 else low - (least - (high - low)) / 2
        high = low + least
    span = high - low
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    start = low if low == 0 else low - 0.06 * span
    end = high + 0.03 * span
    bare = _Scale(low=start, high=end)
    first = math.ceil(start / step - 1e-9) * step
    digits = max(0, -math.floor(math.log10(step)) + (1 if step / power == 2.5 else 0))
    values = [first + i * step for i in range(int((end - first) / step) + 1)]
    return _Scale(low=start, high=end, ticks=tuple(Tick(at=bare.y(v), label=f"{v:.{digits}f}") for v in values))
