"""Axes of the figures of a replay's page: from values to SVG user units, y downwards; ticks at round numbers. Pure."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

WIDTH = 1040
LEFT, RIGHT = 64, 18
LABEL = 7.0
"""Width of a letter of a label."""
LEAST = 1e-12
"""What a value of 0 or less is drawn as on an axis of logs."""


class Tick(NamedTuple):
    """A label at a coordinate of its axis."""

    at: float
    label: str


class Flag(NamedTuple):
    """A named step: a rule at `x`, its label in row `row`, beginning or ending there."""

    name: str
    x: float
    row: int
    anchor: str


class Axis(NamedTuple):
    """From values to coordinates, linear or by logs."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            value = math.log(max(value, LEAST))
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.05), 1.05) * (self.end - self.start)


def round_values(low: float, high: float, *, most: int = 8) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten; not many more than `most`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def round_steps(first: int, last: int, *, most: int = 10) -> list[int]:
    """The same of whole numbers."""
    return [int(value) for value in round_values(first, max(last, first + 1), most=most) if value == int(value)]


def to_float(value: Any) -> float:
    """A number of an explanation's data, where null is nan and "inf" infinite."""
    return math.nan if value is None else float(value)
