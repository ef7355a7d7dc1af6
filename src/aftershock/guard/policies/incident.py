"""What policies that rewind keep in mind: when the trouble began, where it is, how often it came back, where to go.

Must not import a policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from aftershock.guard.policy import Seen
from aftershock.signals.detect.rule import Verdict

LEADS: frozenset[Verdict] = frozenset({"spike", "shift", "nonfinite"})
"""Verdicts that can begin a run of alarms. A drift is too slow and a jump too good to say where damage began."""


class Alarms(NamedTuple):
    """A run of alarms: `onset` = (step, batch id) of its first one, and `quiet` batches since the last."""

    onset: tuple[int, int] | None = None
    quiet: int = 0

    def after(self, seen: Seen, *, loud: bool, patience: int, count: bool) -> Alarms:
        """With this step in: `patience` quiet batches end the run; `count` is False at the second look at a batch."""
        if loud:
            return Alarms(self.onset or (seen.step, seen.batch_id), 0)
        if self.onset is None or not count:
            return self
        return Alarms() if self.quiet + 1 >= patience else self._replace(quiet=self.quiet + 1)


class Place(NamedTuple):
    """Failures at one place of the run: how many, the `step` of the latest, the target and length of its rewind."""

    failures: int = 0
    step: int = 0
    target: int = 0
    skipped: int = 0

    def failed(self, step: int, *, reach: int) -> Place:
        """One more failure, at `step`: the same place as long as the run did not get `reach` steps beyond the last.

        So each new place lies `reach` steps further on, and a run can never rewind for ever.
        """
        same = self.failures > 0 and step <= self.step + reach
        return self._replace(failures=self.failures + 1, step=step) if same else Place(1, step, 0, 0)


def leads(verdicts: Mapping[str, Verdict]) -> bool:
    """Whether a verdict is one that can begin an incident; what the loss alone does slowly is no trouble."""
    return any(kind in LEADS and (signal, kind) != ("loss", "shift") for signal, kind in verdicts.items())


def is_finite(seen: Seen) -> bool:
    """Whether loss and gradient are finite: decided on the values and the verdicts, before any statistic sees them."""
    named = (seen.verdicts.get("loss"), seen.verdicts.get("grad_norm"))
    return math.isfinite(seen.loss) and math.isfinite(seen.grad_norm) and "nonfinite" not in named


def newest(healthy: tuple[int, ...], *, until: int) -> int:
    """The newest of the healthy steps up to `until`; the oldest there is when all of them are later."""
    assert healthy, "asked for a snapshot when there is none"
    return max((step for step in healthy if step <= until), default=healthy[0])
