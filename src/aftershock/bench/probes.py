"""What can be measured of a detector without a corpus: its cost per update, and what it does after a NaN.

Must not import torch or numpy.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from aftershock.bench.sweeps import make_rule
from aftershock.signals.detect.registry import DETECTORS
from aftershock.signals.detect.roles import Role
from aftershock.signals.detect.rule import ALARMS, Rule

LEVELS: dict[Role, tuple[float, float]] = {
    "loss": (2.2, 0.02),
    "gradient": (0.24, 0.02),
    "update": (0.05, 0.004),
    "rms_t": (1.0, 0.05),
    "curvature": (0.5, 0.05),
    "logit": (8.0, 0.4),
    "log_z": (8.0, 0.1),
}
"""Level and spread of a quiet signal of each role."""
BEFORE, AFTER = 1100, 1100
"""Quiet steps before the NaN and after it: enough for the longest window to fill, and to be rid of it."""
SPIKE = 100.0
"""How high the spike is that a detector is asked about, in levels."""
TIMED, ROUNDS = 500, 9


class AfterNan(NamedTuple):
    """`event`: the NaN itself is an alarm. `false_alarms` in the 1,100 good steps after it that are none without a NaN.
    `armed_after`: good steps after which a spike of 100 times the level alarms again, and ever after; None when it does
    not within those steps. `sees_spike`: it alarms on that spike where there was no NaN; else `armed_after` is None."""

    event: bool
    false_alarms: int
    armed_after: int | None
    sees_spike: bool


def role_read(detector: str) -> Role:
    """The role the probes use: the first that the detector reads."""
    return DETECTORS[detector].reads[0]


def after_nan(detector: str, settings: Mapping[str, Any] | None = None) -> AfterNan:
    """What `detector` decides on one NaN in a quiet signal, and after it."""
    role = role_read(detector)
    rule = make_rule(detector, role, settings or {})
    quiet, spike = _quiet(role, BEFORE + AFTER), SPIKE * LEVELS[role][0]
    clean, hurt = _Walk(rule, quiet[:BEFORE]), _Walk(rule, quiet[:BEFORE])
    sees = clean.alarms_on(spike)
    event = hurt.step(math.nan)
    false = blind = 0
    for gap, value in enumerate(quiet[BEFORE:], start=1):
        if not hurt.alarms_on(spike):
            blind = gap
        alarms, would = hurt.step(value), clean.step(value)
        false += alarms and not would
    return AfterNan(event, false, blind if sees and blind < AFTER else None, sees)


def update_cost(detector: str, settings: Mapping[str, Any] | None = None) -> float:
    """Microseconds per update with full windows: the fastest of a few rounds, since other programs only ever add."""
    role = role_read(detector)
    rule = make_rule(detector, role, settings or {})
    values = _quiet(role, BEFORE + TIMED)
    state = rule.init()
    for value in values[:BEFORE]:
        state, _ = rule.update(state, value)
    best = math.inf
    for _ in range(ROUNDS):
        current = state
        started = time.perf_counter()
        for value in values[BEFORE:]:
            current, _ = rule.update(current, value)
        best = min(best, time.perf_counter() - started)
    return 1e6 * best / TIMED


class _Walk:
    """A rule on its way through a signal."""

    def __init__(self, rule: Rule[Any], values: list[float]) -> None:
        self._rule, self._state = rule, rule.init()
        for value in values:
            self.step(value)

    def step(self, value: float) -> bool:
        self._state, verdict = self._rule.update(self._state, value)
        return verdict in ALARMS

    def alarms_on(self, value: float) -> bool:
        """Whether it would alarm on `value` now; it goes on as if asked nothing."""
        return self._rule.update(self._state, value).verdict in ALARMS


def _quiet(role: Role, count: int) -> list[float]:
    rng = random.Random(0)
    level, spread = LEVELS[role]
    return [rng.gauss(level, spread) for _ in range(count)]
