"""Which signals and which threshold a detector gets, chosen on the tuning seeds, and what it then does on the others.

Three set-ups of every detector are reported: `default`, its published settings; `tuned`, its main threshold (and, where
the table of sweeps has one, another variant) on the best single signal; `combined`, tuned on several signals, an alarm
of any being an alarm. For the first two the signal is the best of those it reads, or all of them at once. Ours is also
shown on each signal alone (`single`) and on all of them (`all`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from aftershock.bench.alarms import Alarms, Key
from aftershock.bench.corpus import Trace
from aftershock.bench.curves import (
    BUDGET,
    Counts,
    Field,
    areas,
    counts_of,
    field_of,
    once,
    points,
    recall_in_budget,
)
from aftershock.bench.scoring import LEADS, Tally, episodes, num_healthy_steps, tally
from aftershock.bench.sweeps import SWEEPS, default_of
from aftershock.signals.detect.registry import OURS

Setup = Literal["default", "tuned", "combined", "single", "all"]
JUDGED = LEADS.index(1)
"""Choices are made by the area under the curve at lead >= 1: the last step at which an update can be withheld."""


class Half(NamedTuple):
    """The runs of one half of the seeds, and every detector's alarms on each of them."""

    traces: Sequence[Trace]
    alarms: Sequence[Alarms]

    def field(self) -> Field:
        """What there is to find in these runs."""
        return field_of(
            [t.targets for t in self.traces], [num_healthy_steps(t.targets, t.num_steps) for t in self.traces]
        )


class Choice(NamedTuple):
    """A detector with its signals and settings: `index` is the threshold's place in the grid."""

    detector: str
    setup: Setup
    variant: int
    signals: tuple[str, ...]
    index: int

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ from the published ones."""
        sweep = SWEEPS[self.detector]
        value = sweep.grid[self.index]
        changed = {} if value == default_of(self.detector) else {sweep.field: value}
        return {**sweep.variants[self.variant], **changed}


def judge(half: Half, detector: str, variant: int, signals: Sequence[str]) -> list[list[Tally]]:
    """Tallies [run][threshold] of a detector that alarms when one of `signals` does."""
    return [
        [
            tally(
                episodes(_union(alarms, [Key(detector, variant, signal) for signal in signals], index)), trace.targets
            )
            for index in range(len(SWEEPS[detector].grid))
        ]
        for trace, alarms in zip(half.traces, half.alarms, strict=True)
    ]


def choose(half: Half, detector: str) -> list[Choice]:
    """The set-ups of `detector` that do best on these runs; none when no run has a signal that it reads."""
    judge_ = _Judge(half, detector)
    singles = judge_.signals
    if not singles:
        return []
    sources = [(signal,) for signal in singles] + ([singles] if len(singles) > 1 else [])
    sweep = SWEEPS[detector]
    default = sweep.grid.index(default_of(detector))
    variants = range(len(sweep.variants))
    found = [Choice(detector, "default", 0, max(sources, key=lambda s: judge_.at(0, s, default)), default)]
    variant, signals = max(((v, s) for v in variants for s in sources), key=lambda c: judge_.area(*c))
    found.append(Choice(detector, "tuned", variant, signals, judge_.threshold(variant, signals)))
    if len(singles) > 1:
        variant, signals = max((judge_.grown(v) for v in variants), key=lambda c: judge_.area(*c))
        if len(signals) > 1 and judge_.area(variant, signals) > judge_.area(found[-1].variant, found[-1].signals):
            found.append(Choice(detector, "combined", variant, signals, judge_.threshold(variant, signals)))
    if detector == OURS:
        for setup, source in [*(("single", (signal,)) for signal in singles), ("all", singles)]:
            variant = max(variants, key=lambda v: judge_.area(v, source))
            found.append(Choice(detector, setup, variant, source, judge_.threshold(variant, source)))
    return found


class _Judge:
    """Scores of one detector on one half, each computed once."""

    def __init__(self, half: Half, detector: str) -> None:
        self._half, self._detector = half, detector
        self._field = half.field()
        self._counts: dict[tuple[int, frozenset[str]], Counts] = {}
        names = {key.signal: None for alarms in half.alarms for key in alarms if key.detector == detector}
        self.signals = tuple(names)

    def counts(self, variant: int, signals: Sequence[str]) -> Counts:
        key = (variant, frozenset(signals))
        if key not in self._counts:
            self._counts[key] = counts_of(judge(self._half, self._detector, variant, signals))
        return self._counts[key]

    def area(self, variant: int, signals: Sequence[str]) -> tuple[float, float, float]:
        """Area at the judged lead; of equal ones the recall within the budget decides, then the areas at all leads."""
        curve = points(self.counts(variant, signals), self._field, once(len(self._half.traces)))
        by_lead = areas(curve)[0]
        return float(by_lead[JUDGED]), float(recall_in_budget(curve)[0, JUDGED]), float(by_lead.sum())

    def at(self, variant: int, signals: Sequence[str], index: int) -> tuple[float, float]:
        """The same for one threshold: precision times recall, then the fewest false alarms."""
        curve = points(self.counts(variant, signals), self._field, once(len(self._half.traces)))
        part = curve.precision_BSK[0, index, JUDGED] * curve.recall_BSK[0, index, JUDGED]
        return float(part), -float(curve.false_rate_BS[0, index])

    def threshold(self, variant: int, signals: Sequence[str]) -> int:
        """The setting with the highest recall within the budget; where none keeps to it, that with the fewest false
        alarms. Of equal ones the middle: as far from missing as from alarming."""
        curve = points(self.counts(variant, signals), self._field, once(len(self._half.traces)))
        rate, recall = curve.false_rate_BS[0], curve.recall_BSK[0, :, JUDGED]
        usable = np.where(rate <= BUDGET, recall, -math.inf) if (rate <= BUDGET).any() else -rate
        best = np.flatnonzero(usable == usable.max())
        return int(best[len(best) // 2])

    def grown(self, variant: int) -> tuple[int, tuple[str, ...]]:
        """Signals added one by one, the best first, while each makes the area larger."""
        chosen: tuple[str, ...] = ()
        best = (-math.inf, 0.0, 0.0)
        while len(chosen) < len(self.signals):
            wider: list[tuple[str, ...]] = [(*chosen, signal) for signal in self.signals if signal not in chosen]
            candidate = max(wider, key=lambda signals: self.area(variant, signals))
            if self.area(variant, candidate) <= best:
                break
            chosen, best = candidate, self.area(variant, candidate)
        return variant, chosen


def _union(alarms: Mapping[Key, list[list[int]]], keys: Sequence[Key], index: int) -> list[int]:
    there = [alarms[key][index] for key in keys if key in alarms]
    return there[0] if len(there) == 1 else sorted(set().union(*there))
