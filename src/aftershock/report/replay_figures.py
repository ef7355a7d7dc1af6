"""Geometry of two figures of a replay's page: the loss around the spike, and effects beside shams.

Turns the data of `replay.written.explanation_data` into coordinates, paths and labels; the template only prints them.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aftershock.report.replay_axes import (
    LABEL,
    LEAST,
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Flag,
    Tick,
    round_steps,
    round_values,
    to_float,
)
from aftershock.report.words import number

LOSS_HEIGHT, LOSS_TOP, LOSS_BOTTOM = 390, 50, 36
NUM_COLOURS = 6
"""As many as the style has colours that stay apart."""


class Curve(NamedTuple):
    """A replay's loss. `group`: recorded, control, sham or cell; `index` its colour; `shown` at first.

    `crosses`: where the loss is not finite; `note`: what became of the spike.
    """

    name: str
    group: str
    index: int
    shown: bool
    path: str
    crosses: str
    note: str


class LossFigure(NamedTuple):
    """The loss around the spike. `steps`: first and last of the axis; `calm`, `spike`: the heights of the level and of
    what counts as the spike."""

    steps: tuple[int, int]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    flags: list[Flag]
    calm: float
    spike: float
    curves: list[Curve]


# -------------------------------------------------------------------------------------------------------- the loss


def loss_figure(data: Mapping[str, Any], order: Sequence[str]) -> LossFigure:
    """The recorded loss, controls, shams and cells, from before the snapshot to the last replay's end.

    `order`: names of the cells, those to be looked at first in front.
    """
    window = data["window"]
    curves: dict[str, dict[str, Any]] = data["curves"]
    # A replay is stopped when its answer is clear; what was recorded after that is context.
    after = min(data["recorded"]["steps"][-1], window["end"] + max(10, (window["end"] - window["start"]) // 3))
    last = max([window["end"], after, *(curve["steps"][-1] for curve in curves.values() if curve["steps"])])
    first = max(window["start"] - max(5, (last - window["start"]) // 10), min(data["recorded"]["steps"]))
    drawn = {name: _inside(curve, first, last) for name, curve in {"recorded": data["recorded"], **curves}.items()}
    values = [loss for curve in drawn.values() for _, loss in curve if loss != "inf"]
    log = data["baseline"]["unit"] == "log"
    x = Axis(first, last, LEFT, WIDTH - RIGHT)
    y = _loss_axis([max(v, LEAST) if log else v for v in values] or [1.0], log=log)
    base = data["baseline"]
    calm, spike = ((_loss_of(base, excess)) for excess in (0.0, base["threshold"]))
    return LossFigure(
        steps=(first, last),
        x_ticks=[Tick(x.at(step), str(step)) for step in round_steps(first, last)],
        y_ticks=_loss_ticks(y),
        flags=_flags(window, x),
        calm=y.at(calm),
        spike=y.at(spike),
        curves=[_curve(name, drawn[name], data, order, x, y) for name in ["recorded", *_controls(curves), *order]
                if drawn.get(name)],
    )  # fmt: skip


def _inside(curve: Mapping[str, Any], first: int, last: int) -> list[tuple[int, Any]]:
    pairs = zip(curve["steps"], curve["losses"], strict=True)
    return [(step, loss) for step, loss in pairs if first <= step <= last]


def _controls(curves: Iterable[str]) -> list[str]:
    return [name for name in curves if name.split("#")[0] == "control"]


def _loss_of(base: Mapping[str, Any], excess: float) -> float:
    if base["unit"] == "log":
        return math.exp(base["level"] + excess)
    return base["level"] + excess * base["scale"]


def _curve(
    name: str, points: Sequence[tuple[int, Any]], data: Mapping[str, Any], order: Sequence[str], x: Axis, y: Axis
) -> Curve:
    cell = next((one for one in data["cells"] if one["name"] == name), None)
    group = "recorded" if name == "recorded" else "control" if cell is None else _group(cell)
    own = [one for one in order if one in data["curves"]]
    index = own.index(name) % NUM_COLOURS if name in own else 0
    path, crosses, pen = "", "", False
    for step, loss in points:
        if loss == "inf":
            if pen or not path:  # the first of them
                crosses += f"M{x.at(step) - 4:.1f} {LOSS_TOP:.1f}l8 8m0-8l-8 8"
            pen = False
            continue
        path += f"{'L' if pen else 'M'}{x.at(step):.1f} {y.at(loss):.1f}"
        pen = True
    chosen = {remedy["cell"] for remedy in data["remedies"][:2]} | {"skip"}
    shown = group in ("recorded", "control") or name in chosen
    note = "" if cell is None or cell["spike"] is None else f"spike {cell['spike']}"
    return Curve(name, group, index, shown, path, crosses, note)


def _group(cell: Mapping[str, Any]) -> str:
    return "sham" if cell["family"] == "sham" else "cell"


def _loss_axis(values: Sequence[float], *, log: bool) -> Axis:
    low, high = (math.log(min(values)), math.log(max(values))) if log else (min(values), max(values))
    span = max(high - low, 0.02 * max(abs(high), 1.0))
    bottom, top = LOSS_HEIGHT - LOSS_BOTTOM, LOSS_TOP
    return Axis(low - 0.05 * span, high + 0.07 * span, bottom, top, log)


def _loss_ticks(y: Axis) -> list[Tick]:
    if not y.log:
        return [Tick(y.at(value), number(value)) for value in round_values(y.low, y.high)]
    low, high = math.exp(y.low), math.exp(y.high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) > 2:
            every = math.ceil(len(inside) / 9)
            return [Tick(y.at(value), f"{value:g}") for value in inside[::every]]
    return [Tick(y.at(value), number(value)) for value in round_values(low, high)]


def _flags(window: Mapping[str, int], x: Axis) -> list[Flag]:
    """Labels side by side where there is room, else one row lower."""
    found: list[Flag] = []
    ends: dict[int, float] = {}
    for key, name in (("start", "snapshot"), ("onset", "onset"), ("peak", "peak"), ("end", "end")):
        at, text = x.at(window[key]), f"{name} {window[key]}"
        anchor = "end" if at + LABEL * len(text) > WIDTH else "start"
        left = at - LABEL * len(text) if anchor == "end" else at
        row = next(row for row in range(9) if ends.get(row, -math.inf) < left - 8)
        ends[row] = left + LABEL * len(text)
        found.append(Flag(text, at, row, anchor))
    return found


# --------------------------------------------------------------------------------------------- effects beside shams

FOREST_WIDTH, FOREST_HEIGHT, FOREST_PAD = 340, 26, 12


class ForestRow(NamedTuple):
    """One cell: its interval as a path, its mark at `x`; `beyond` says it lies outside of the axis on that side."""

    whisker: str
    x: float
    beyond: str


class Forest(NamedTuple):
    """Effects on one axis. `band`: where the shams lie; `gone`: left of it a peak is no spike; both may be None."""

    ticks: list[Tick]
    zero: float
    band: tuple[float, float] | None
    gone: float | None
    rows: dict[str, ForestRow]


def forest(data: Mapping[str, Any]) -> Forest | None:
    """The effect of each cell on the peak against the shams' median; None where no cell has one."""
    cells = [cell for cell in data["cells"] if cell["effect"] is not None]
    if not cells or data["shams"] is None:
        return None
    middle = to_float(data["shams"]["median"])
    sides = [to_float(data["shams"][name]) - middle for name in ("lowest", "highest")]
    band = tuple(side if not math.isnan(side) else 0.0 for side in sides)
    gone = data["baseline"]["threshold"] - middle
    reached = [0.0, *band, gone, *(to_float(c["effect"][key]) for c in cells for key in ("log_peak", "low", "high"))]
    finite = [value for value in reached if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = max(high - low, 0.5)
    x = Axis(low - 0.04 * span, high + 0.04 * span, FOREST_PAD, FOREST_WIDTH - FOREST_PAD)
    return Forest(
        ticks=[Tick(x.at(value), f"{value:g}") for value in round_values(x.low, x.high, most=6)],
        zero=x.at(0.0),
        band=(x.at(band[0]), x.at(band[1])) if all(map(math.isfinite, band)) else None,
        gone=x.at(gone) if math.isfinite(gone) else None,
        rows={cell["name"]: _forest_row(cell["effect"], x) for cell in cells},
    )


def _forest_row(effect: Mapping[str, Any], x: Axis) -> ForestRow:
    value, low, high = (to_float(effect[key]) for key in ("log_peak", "low", "high"))
    beyond = "" if math.isfinite(value) else "right" if value > 0 else "left"
    ends = [x.at(x.low if end == -math.inf else x.high if end == math.inf else end) for end in (low, high)]
    at = {"": x.at(value) if not beyond else 0.0, "left": float(FOREST_PAD), "right": float(FOREST_WIDTH - FOREST_PAD)}
    return ForestRow(f"M{ends[0]:.1f} {FOREST_HEIGHT / 2:g}H{ends[1]:.1f}", at[beyond], beyond)
