"""A rate per tensor that falls with outliers of its momentum (llm-foundry's DecoupledAdaLRLion).

Must not import the guard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import gradients, norms, told
from aftershock.guard.policies.kept import Kept
from aftershock.guard.policies.moments import FIRST
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen
from aftershock.signals.ranks import local, sharding


@dataclass(kw_only=True, eq=False)
class AdaptiveLR(Editor):
    """Scales tensor i's update by max(`least`, `factor`^N), N its momentum outliers in the last `timeout` steps.

    An outlier is a momentum norm (`exp_avg` or `momentum_buffer`, as it lies before the step) above `threshold` times
    its mean over steps t - 2 `window` to t - `window`: delayed, since outliers come in clusters. Armed once the older
    window has a norm. Tensors without outliers keep their bits; only the others are copied for the step.

    Example:
        guard = Guard(model, optimizer, policy=AdaptiveLR(window=200))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps", "recent", "older", "outliers")

    threshold: float = 10.0
    window: int = 500
    factor: float = 0.707
    least: float = 1e-4
    timeout: int = 100

    _steps: int = field(default=0, init=False, repr=False)
    _recent: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    _older: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    _outliers: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)
    _kept: Kept = field(default_factory=Kept, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, threshold=1, window=1, factor=0, least=0, timeout=1)

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        found = {}
        for name, param in zip(now.names, now.params, strict=True):
            state = live.optimizer.state.get(param, {})
            momentum = next((state[key] for key in FIRST if state.get(key) is not None), None)
            if momentum is not None:
                found[name] = momentum
        if self._steps and now.names and not found:
            raise ValueError(f"AdaptiveLR: {type(live.optimizer).__name__} keeps no momentum to watch; set one")
        spread = sharding({name: live.params[name] for name in found})
        pieces = [local(momentum) for momentum in found.values()]
        for name, norm in zip(found, norms(pieces, spread), strict=True):
            self._observe(name, norm)
        loud = [name for name in found if self._outliers.get(name)]
        self._kept.take(loud, [local(live.params[name]) for name in loud])
        self._steps += 1
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        weights = {name: local(live.params[name]) for name in self._kept.names}
        factors = {name: max(self.least, self.factor ** len(self._outliers[name])) for name in weights}
        least = self._kept.scale(weights, factors)
        self._kept.drop()
        return Continue(told("a tensor's rate lowered for outliers of its momentum", least))

    def _observe(self, name: str, norm: float) -> None:
        recent, older = self._recent.setdefault(name, []), self._older.setdefault(name, [])
        outliers = [step for step in self._outliers.get(name, []) if step > self._steps - self.timeout]
        if older and norm > self.threshold * (sum(older) / len(older)):
            outliers.append(self._steps)
        self._outliers[name] = outliers
        recent.append(norm)
        if len(recent) > self.window:
            older.append(recent.pop(0))
        if len(older) > self.window:
            older.pop(0)
