"""Geometry of two figures of a replay's page: the heat map of places by steps, and until when it could be averted.

Turns the data of `replay.written.explanation_data` into coordinates, paths and labels; the template only prints them.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aftershock.replay.norms import KINDS
from aftershock.report.replay_axes import LABEL, RIGHT, WIDTH, Axis, Flag, Tick, round_steps, to_float

# --------------------------------------------------------------------------------------------------- the heat map

LABELS = 210
"""Width of the names on the left."""
HEAT_ROW, HEAT_GAP, HEAT_TOP = 15, 24, 30
LEVELS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Ends of the steps of colour, in robust sigmas; from 4 on a place is outside of its band."""


class HeatRow(NamedTuple):
    """One place. `first`: "often" where it is most often first of its level, "clear" where that is clear, else "";
    `marks`: where each kind moved, or None."""

    name: str
    title: str
    y: float
    first: str
    marks: tuple[float | None, float | None]


class HeatMap(NamedTuple):
    """Places by steps, one panel a kind. `paths`: by kind and colour, 0 the calmest; `levels`: captions and their y."""

    height: float
    panels: tuple[tuple[float, float], tuple[float, float]]
    rows: list[HeatRow]
    levels: list[tuple[str, float]]
    paths: list[list[str]]
    x_ticks: list[Tick]
    onsets: tuple[float, float]
    left_out: int


def heat_map(data: Mapping[str, Any]) -> HeatMap | None:
    """Places that have a row of z, by level; None where it was not asked where the spike began."""
    found = data["places"]
    if found is None:
        return None
    start, stop = found["steps"]
    half = (WIDTH - LABELS - HEAT_GAP) / 2
    panels = ((LABELS, LABELS + half), (LABELS + half + HEAT_GAP, float(WIDTH)))
    axes = [Axis(start, stop, *panel) for panel in panels]
    rows: list[HeatRow] = []
    levels: list[tuple[str, float]] = []
    paths = [[""] * (2 * len(LEVELS)) for _ in axes]
    y = float(HEAT_TOP)
    for level in ("model", "layer", "tensor", "head"):
        own = [i for i, move in enumerate(found["moves"]) if move["level"] == level and found["z"]["gradient"][i]]
        if not own:
            continue
        y += 18
        levels.append((f"{level}s" if level != "model" else level, y - 5))
        first = found["first"].get(level)
        for i in own:
            rows.append(_heat_row(found["moves"][i], first, y, axes))
            for kind, axis, drawn in zip(KINDS, axes, paths, strict=True):
                _paint(found["z"][kind][i], start, axis, y + HEAT_ROW / 2, drawn)
            y += HEAT_ROW
    onsets = tuple(axis.at(found["onset"]) for axis in axes)
    ticks = [Tick(axis.at(step), str(step)) for axis in axes for step in round_steps(start, stop, most=5)]
    left_out = sum(z is None for z in found["z"]["gradient"])
    return HeatMap(y + 26, panels, rows, levels, paths, ticks, (onsets[0], onsets[1]), left_out)


def _heat_row(move: Mapping[str, Any], first: Mapping[str, Any] | None, y: float, axes: Sequence[Axis]) -> HeatRow:
    most = int((LABELS - 26) / LABEL)
    name = move["place"]
    short = name if len(name) <= most else f"..{name[-(most - 2) :]}"
    marks = [None if move[kind] is None else axis.at(move[kind]) for kind, axis in zip(KINDS, axes, strict=True)]
    leads = "" if first is None or first["place"] != name else "clear" if first["clear"] else "often"
    return HeatRow(short, name, y, leads, (marks[0], marks[1]))


def _paint(z_T: Sequence[Any], start: int, axis: Axis, y: float, drawn: list[str]) -> None:
    """One row as strokes: neighbours of one colour are one stroke. The second half of the colours is for falling."""
    colours = [_colour(to_float(z)) for z in z_T]
    begin = 0
    for i in range(1, len(colours) + 1):
        if i < len(colours) and colours[i] == colours[begin]:
            continue
        if colours[begin] is not None:
            left, right = axis.at(start + begin), axis.at(start + i)
            drawn[colours[begin] or 0] += f"M{left:.1f} {y:g}H{right:.1f}"
        begin = i


def _colour(z: float) -> int | None:
    level = sum(abs(z) >= end for end in LEVELS)
    return None if level == 0 else level - 1 + (len(LEVELS) if z < 0 else 0)


# --------------------------------------------------------------------------------------------------- the timeline

LINE_ROW, LINE_TOP = 30, 34


class LineRow(NamedTuple):
    """One question: `can` from the snapshot on, `open` between what is known; `yes`, `no`: marks of what was asked."""

    name: str
    y: float
    can: tuple[float, float] | None
    open: tuple[float, float] | None
    yes: list[float]
    no: list[float]
    said: str


class Timeline(NamedTuple):
    """Until when the spike could be averted."""

    height: float
    rows: list[LineRow]
    flags: list[Flag]
    x_ticks: list[Tick]


def timeline(data: Mapping[str, Any]) -> Timeline | None:
    """A row for a change by one ulp, and one for each remedy; None where it was not asked."""
    found = data["no_return"]
    if found is None:
        return None
    x = Axis(found["start"], found["peak"] + 1, LABELS, WIDTH - RIGHT)
    turns = {"a change of 1 ulp": found["perturbed"], **found["remedies"]}
    rows = [_line_row(name, turn, x, LINE_TOP + i * LINE_ROW) for i, (name, turn) in enumerate(turns.items())]
    flags = [Flag(f"{key} {found[key]}", x.at(found[key]), 0, "end") for key in ("onset", "peak")]
    if flags[1].x - flags[0].x < LABEL * len(flags[1].name) + 8:
        flags[0] = flags[0]._replace(row=1)
    ticks = [Tick(x.at(step), str(step)) for step in round_steps(found["start"], found["peak"])]
    return Timeline(LINE_TOP + len(rows) * LINE_ROW + 28, rows, flags, ticks)


def _line_row(name: str, turn: Mapping[str, Any], x: Axis, y: float) -> LineRow:
    low, high = turn["low"], turn["high"]
    can = None if low is None else (x.at(x.low), x.at(low + 1))
    begin = x.low if low is None else low + 1
    unknown = None if turn["finished"] or begin >= high else (x.at(begin), x.at(high))
    asked = {int(step): removed for step, removed in turn["asked"].items()}
    yes, no = ([x.at(step + 0.5) for step, removed in asked.items() if removed is side] for side in (True, False))
    said = turn["error"] or ("not finished" if not turn["finished"] else "never" if low is None else f"until {low}")
    return LineRow(name, y, can, unknown, yes, no, said)
