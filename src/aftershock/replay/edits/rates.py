"""Learning rates scaled, set, or held down to what they were, on top of the schedule.

A rate lies there only while the optimizer steps, so no scheduler sees it. Decoupled decay goes along with the rate, as
in the optimizer itself. Must not import other edits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aftershock.guard.rates import take_off
from aftershock.replay.edits.checked import Checked, around_step
from aftershock.replay.run import Run


@dataclass(frozen=True, kw_only=True)
class ScaledRate(Checked):
    """Every group's rate times `factor`.

    Example:
        ScaledRate(factor=0.5)
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise ValueError(f"a rate is scaled by a number from 0 on, got {self.factor}")

    def check(self, run: Run) -> None:
        if self.factor == 1:
            raise ValueError("the rate times 1 is what it was; give another factor")

    def change(self, run: Run) -> None:
        _with_rates(run, lambda group, own: own * self.factor)


@dataclass(frozen=True, kw_only=True)
class FixedRate(Checked):
    """The same rate in every group and step, whatever the schedule says."""

    lr: float

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"a rate is a number from 0 on, got {self.lr}")

    def check(self, run: Run) -> None:
        return None

    def change(self, run: Run) -> None:
        _with_rates(run, lambda group, own: self.lr)


@dataclass(frozen=True, kw_only=True)
class RateBefore(Checked):
    """No group's rate above what it was at the snapshot: a jump of the schedule is corrected, its descents stay."""

    def check(self, run: Run) -> None:
        if run.workload.scheduler is None:
            raise ValueError("the workload has no scheduler, so its rate does not change and there is no jump to undo")
        if not any(float(group["lr"]) > 0 for group in run.workload.optimizer.param_groups):
            raise ValueError("every rate is 0 at the snapshot; holding it there would stop the training")

    def change(self, run: Run) -> None:
        limits = [float(group["lr"]) for group in run.workload.optimizer.param_groups]
        _with_rates(run, lambda group, own: own if float(own) <= limits[group] else limits[group])


def _with_rates(run: Run, rate: Callable[[int, Any], Any]) -> None:
    """`rate(group, own)` in place of each group's own rate, during the step."""
    optimizer = run.workload.optimizer
    own: list[Any] = []

    def put() -> None:
        own[:] = [group["lr"] for group in optimizer.param_groups]
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = rate(index, own[index])

    def back() -> None:
        if own:
            take_off(optimizer, own)
            own.clear()

    around_step(run, put, back)
