"""The optimizer's own numbers: betas, momentum, eps. They lie in its groups, and go back with the snapshot.

Must not import other edits than the moments'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from aftershock.guard.policies.moments import betas_of
from aftershock.guard.policies.switches import BetaSwitch
from aftershock.replay.edits.checked import Checked, kind, live
from aftershock.replay.edits.state import RefreshedSecond
from aftershock.replay.run import Run

Moments = Literal["keep", "recompute", "refresh"]


@dataclass(frozen=True, kw_only=True)
class Betas(Checked):
    """Adam's beta1 and beta2 in all groups; nan leaves one as it is. `moments` says what becomes of m and v:

    - "keep": as stored, with their counter t. The new bias corrections 1 - beta^t do not fit them early in a run
    - "recompute": times (1 - new^t) / (1 - old^t), so that m_hat and v_hat are the same before and after
    - "refresh": v from gradients taken at the snapshot, see `RefreshedSecond`; m as with "recompute"

    Example:
        Betas(beta2=0.9, moments="recompute")
    """

    beta1: float = math.nan
    beta2: float = math.nan
    moments: Moments = "keep"

    def __post_init__(self) -> None:
        if self.moments not in ("keep", "recompute", "refresh"):
            raise ValueError(f"moments are keep, recompute or refresh, got {self.moments!r}")
        self._switch()  # which refuses what are no betas

    def check(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        if not all("betas" in group for group in groups):
            raise ValueError(f"{kind(run.workload.optimizer)} has no betas")
        if all(self._wanted(betas_of(group)) == betas_of(group) for group in groups):
            raise ValueError(f"the betas are {betas_of(groups[0])} already")
        if self.moments == "refresh":
            RefreshedSecond().check(run)

    def change(self, run: Run) -> None:
        self._switch().turn(live(run), again=False)
        if self.moments == "refresh":
            RefreshedSecond().change(run)

    def _switch(self) -> BetaSwitch:
        return BetaSwitch(beta1=self.beta1, beta2=self.beta2, moments="keep" if self.moments == "keep" else "recompute")

    def _wanted(self, old: tuple[float, float]) -> tuple[float, ...]:
        return tuple(b if math.isnan(new) else new for b, new in zip(old, (self.beta1, self.beta2), strict=True))


@dataclass(frozen=True, kw_only=True)
class Momentum(Checked):
    """SGD's momentum in all groups; its buffer stays."""

    momentum: float

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    def check(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        if not all("momentum" in group for group in groups):
            raise ValueError(f"{kind(run.workload.optimizer)} has no momentum; an Adam has beta1")
        if all(group["momentum"] == self.momentum for group in groups):
            raise ValueError(f"momentum is {self.momentum:g} already")
        if self.momentum == 0 and any(group.get("nesterov") for group in groups):
            raise ValueError("Nesterov's method without momentum is not defined; give one above 0")

    def change(self, run: Run) -> None:
        for group in run.workload.optimizer.param_groups:
            group["momentum"] = self.momentum


@dataclass(frozen=True, kw_only=True)
class Eps(Checked):
    """Adam's eps in all groups: times `factor`, or set to `value` (the other one is nan)."""

    factor: float = math.nan
    value: float = math.nan

    def __post_init__(self) -> None:
        given = [x for x in (self.factor, self.value) if not math.isnan(x)]
        if len(given) != 1 or not 0 <= given[0] < math.inf:
            raise ValueError(f"eps: give a factor or a value from 0 on, got {self.factor} and {self.value}")

    def check(self, run: Run) -> None:
        groups = run.workload.optimizer.param_groups
        if not all(isinstance(group.get("eps"), (int, float)) for group in groups):
            raise ValueError(f"{kind(run.workload.optimizer)} has no eps")
        if all(self._of(group["eps"]) == group["eps"] for group in groups):
            raise ValueError(f"eps is {groups[0]['eps']:g} already")

    def change(self, run: Run) -> None:
        for group in run.workload.optimizer.param_groups:
            group["eps"] = self._of(group["eps"])

    def _of(self, old: float) -> float:
        return old * self.factor if math.isnan(self.value) else self.value
