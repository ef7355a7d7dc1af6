"""Shares of incidents with intervals, and one judgement out of those of several classes of causes.

Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from aftershock.claims.claim import Judgement, Verdict
from aftershock.claims.criteria import above_zero
from aftershock.claims.grid import Interval
from aftershock.replay.response import wilson

SIGNS: Mapping[Verdict, float] = {"supported": 1.0, "inconclusive": 0.0, "contradicted": -1.0}
"""A verdict as a number, for a record's tables."""

HALF = 0.5

NOTHING = Interval(math.nan, math.nan, math.nan)
"""What could not be measured."""


class Share(NamedTuple):
    """`count` of `total`."""

    count: int
    total: int

    @property
    def interval(self) -> Interval:
        """With Wilson's 95 % interval, never of no width; nan of none."""
        if not self.total:
            return NOTHING
        return Interval(self.count / self.total, *wilson(self.count, self.total))


def difference(ours: Share, theirs: Share) -> Interval:
    """ours - theirs with a 95 % interval from both Wilson intervals (Newcombe 1998, method 10).

    low = d - sqrt((a - a_low)^2 + (b_high - b)^2), and high likewise. It takes the two as independent: for shares of
    the same incidents, which mostly agree, it is too wide rather than too narrow. nan where either is of none.
    """
    a, b = ours.interval, theirs.interval
    d = a.value - b.value
    return Interval(
        d, d - math.hypot(a.value - a.low, b.high - b.value), d + math.hypot(a.high - a.value, b.value - b.low)
    )


def mostly(measured: Interval) -> Verdict:
    """Of a share that is to be above a half: supported where the whole interval is, contradicted where it is below."""
    return above_zero(Interval(*(end - HALF for end in measured)))


def least(found: Mapping[str, Interval]) -> Interval:
    """The one of the smallest value, `NOTHING` of none."""
    return min(found.values(), key=lambda measured: measured.value, default=NOTHING)


def judged_by_class(
    verdicts: Mapping[str, Verdict],
    found: Mapping[str, Interval],
    *,
    worst: Interval,
    meaning: str,
    tables: Mapping[str, Mapping[str, float]],
) -> Judgement:
    """Of a claim judged per cause class: its `together`, the effect of the `worst` class, and the tables of all."""
    return Judgement(
        verdict=together(verdicts),
        effect=worst.value,
        interval=worst.bounds,
        meaning=meaning,
        detail={**tables, **as_tables(found), "verdict by class": as_numbers(verdicts)},
    )


def together(by_class: Mapping[str, Verdict]) -> Verdict:
    """Of a claim judged per cause class: supported where every class is, contradicted where some class is and none is
    supported, else inconclusive: what holds then depends on the cause, or nothing was measured."""
    found = set(by_class.values())
    if found == {"supported"}:
        return "supported"
    return "contradicted" if "contradicted" in found and "supported" not in found else "inconclusive"


def as_numbers(by_class: Mapping[str, Verdict]) -> dict[str, float]:
    """Verdicts by class, for a record's tables: 1 supported, 0 inconclusive, -1 contradicted."""
    return {name: SIGNS[verdict] for name, verdict in by_class.items()}


def as_tables(found: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """Intervals by name, for a record: the tables `value`, `low` and `high`."""
    return {end: {name: getattr(measured, end) for name, measured in found.items()} for end in Interval._fields}
