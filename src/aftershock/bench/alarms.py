"""Alarm steps of every detector on every signal it reads, for a whole grid of thresholds; one run at a time.

A rule whose threshold does not steer its state is run once, with the loosest threshold, and the stricter ones are asked
only where that one alarms. Must not import torch or numpy at heart: rules run on plain floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aftershock.bench.corpus import Signal, Trace
from aftershock.bench.sweeps import SWEEPS, Sweep, make_rule
from aftershock.signals.detect.registry import DETECTORS
from aftershock.signals.detect.roles import Role, role_of
from aftershock.signals.detect.rule import ALARMS, Rule


class Key(NamedTuple):
    """A detector with one variant of its settings, on one signal."""

    detector: str
    variant: int
    signal: str


Alarms = dict[Key, list[list[int]]]
"""By key, for each threshold of the detector's grid, the steps at which it alarms."""


def run_alarms(trace: Trace, detectors: Sequence[str] = tuple(SWEEPS)) -> Alarms:
    """Alarms of `detectors` on the signals of a run that each of them reads."""
    found: Alarms = {}
    for name in detectors:
        for signal, series in trace.signals.items():
            role = role_of(signal)
            if role in DETECTORS[name].reads:
                for index, variant in enumerate(SWEEPS[name].variants):
                    found[Key(name, index, signal)] = grid_alarms(name, role, variant, series)
    return found


def grid_alarms(name: str, role: Role, variant: Mapping[str, Any], series: Signal) -> list[list[int]]:
    """Alarm steps for each threshold of the grid of `name`."""
    sweep = SWEEPS[name]
    rules = [make_rule(name, role, {**variant, sweep.field: value}) for value in sweep.grid]
    return _one_pass(rules, series) if _steady(sweep, variant) else [alarm_steps(rule, series) for rule in rules]


def alarm_steps(rule: Rule[Any], series: Signal) -> list[int]:
    """Steps at which `rule`, from a fresh state, calls a value of the series an alarm."""
    state, found = rule.init(), []
    for step, value in zip(series.steps, series.values, strict=True):
        state, verdict = rule.update(state, value)
        if verdict in ALARMS:
            found.append(step)
    return found


def _steady(sweep: Sweep, variant: Mapping[str, Any]) -> bool:
    return sweep.steady and sweep.field not in variant


def _one_pass(rules: Sequence[Rule[Any]], series: Signal) -> list[list[int]]:
    loosest, *stricter = rules
    state = loosest.init()
    found: list[list[int]] = [[] for _ in rules]
    for step, value in zip(series.steps, series.values, strict=True):
        before = state
        state, verdict = loosest.update(before, value)
        if verdict not in ALARMS:
            continue
        found[0].append(step)
        for rule, steps in zip(stricter, found[1:], strict=True):
            if rule.update(before, value).verdict not in ALARMS:
                break
            steps.append(step)
    return found
