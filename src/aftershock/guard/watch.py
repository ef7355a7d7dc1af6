"""What the guard watches: a detector each for loss, gradient norm and update norm, and the kind of trouble they name.

Plain floats in, verdicts out; whether a value is finite is decided before any statistic sees it. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from aftershock.signals.detect.combine import Cause, Combiner, CombinerState, Moved
from aftershock.signals.detect.robust import Robust, robust_for
from aftershock.signals.detect.roles import role_of
from aftershock.signals.detect.rule import Rule, Verdict

SIGNALS = ("loss", "grad_norm", "update_norm")
PATIENCE = 32
"""Quiet steps that end a run of alarms, as in the ladder: what moved before them is another story."""


class Judged(NamedTuple):
    """`verdicts` that are not ok, by signal, and the kind of trouble so far; None while nothing speaks."""

    verdicts: dict[str, Verdict]
    cause: Cause | None


class Watch:
    """The detectors with their states.

    - `threshold`: sigmas above the usual from which a value is a spike; None: the detector's own (7)
    - `rules`: another detector for a signal, by its name

    Example:
        watch = Watch()
        watch.judge(step, {"loss": 2.1, "grad_norm": 0.7}).verdicts  # {} while all is well
    """

    def __init__(self, *, threshold: float | None = None, rules: Mapping[str, Rule[Any]] | None = None) -> None:
        given = dict(rules or {})
        for name in given:
            if name not in SIGNALS:
                raise ValueError(f"no signal {name!r} to watch; there are {', '.join(SIGNALS)}")
        self._rules = {name: given.get(name) or _rule(name, threshold) for name in SIGNALS}
        self._states = {name: rule.init() for name, rule in self._rules.items()}
        self._combiner = Combiner(signals=SIGNALS)
        self._moved = self._combiner.init()
        self._alarms: dict[str, Moved] = {}
        self._now = 0

    def judge(self, step: int, values: Mapping[str, float]) -> Judged:
        """The verdicts on the values of one step. Each signal at most once a step; a missing one is not judged."""
        found: dict[str, Verdict] = {}
        for name, value in values.items():
            if not math.isfinite(value):
                found[name] = "nonfinite"
                continue
            self._states[name], verdict = self._rules[name].update(self._states[name], value)
            if verdict != "ok":
                found[name] = verdict
        self._moved, cause = self._combiner.update(self._moved, step, found)
        self._now = step
        self._alarms = {name: one for name, one in self._alarms.items() if step - one.last <= PATIENCE}
        for name, verdict in found.items():
            old = self._alarms.get(name)
            self._alarms[name] = Moved(name, verdict, step, step) if old is None else old._replace(last=step)
        return Judged(found, cause)

    @property
    def moved(self) -> tuple[Moved, ...]:
        """The signals of the run of alarms that goes on, each with its first verdict and onset."""
        return tuple(one for one in self._alarms.values() if self._now - one.last <= PATIENCE)

    def rewind(self) -> None:
        """The run went back: baselines stay, runs in progress and what had moved are forgotten."""
        self._states = {name: rule.rewind(self._states[name]) for name, rule in self._rules.items()}
        self._moved, self._alarms = self._combiner.init(), {}

    def state_dict(self) -> dict[str, Any]:
        """JSON types."""
        rules = {name: rule.to_dict(self._states[name]) for name, rule in self._rules.items()}
        alarms = [list(one) for one in self._alarms.values()]
        return {"rules": rules, "moved": [list(one) for one in self._moved.moved], "alarms": alarms, "now": self._now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when a signal was watched by another detector."""
        self._states = {name: rule.from_dict(state["rules"][name]) for name, rule in self._rules.items()}
        self._moved = CombinerState(tuple(Moved(*one) for one in state["moved"]))
        self._alarms = {one[0]: Moved(*one) for one in state["alarms"]}
        self._now = state["now"]


def _rule(signal: str, threshold: float | None) -> Robust:
    rule = robust_for(role_of(signal.replace("_", " ")))
    if threshold is None:
        return rule
    from dataclasses import replace

    return replace(rule, threshold=threshold)
