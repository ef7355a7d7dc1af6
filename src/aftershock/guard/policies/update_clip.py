"""Limits on the update itself, applied after the step: global (Levanter), per tensor (Adafactor), StableAdamW.

Each keeps a copy of the weights while the step is taken, since one parameter group has one rate. theta = old + s (new -
old) scales decoupled decay alike. Must not import the guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import global_norm, gradients, limited, norms, told
from aftershock.guard.policies.kept import Kept
from aftershock.guard.policies.moments import moments, rms_t
from aftershock.guard.policies.rates import StepRates
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen
from aftershock.signals.ranks import local, sharding

SIGMA_FLOOR = 1e-6
"""Floor of the standard deviation, as in Levanter."""


@dataclass(kw_only=True, eq=False)
class UpdateClip(Editor):
    """Scales the update down to mean + `sigmas` std of the last `window` norms of unclipped updates (Levanter).

    Population standard deviation, floored at 1e-6; armed after `arm_after` norms. An update within the limit keeps its
    bits; one that is not finite is left to the guard and enters no statistic.

    Example:
        guard = Guard(model, optimizer, policy=UpdateClip(sigmas=2.0))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("last",)

    sigmas: float = 3.0
    window: int = 128
    arm_after: int = 64

    _last: list[float] = field(default_factory=list, init=False, repr=False)
    _kept: Kept = field(default_factory=Kept, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, sigmas=0, window=2, arm_after=2)
        if self.arm_after > self.window:
            raise ValueError(f"UpdateClip: arm_after {self.arm_after} lies beyond the window of {self.window}")

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        self._kept.take(now.names, now.weights)
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        weights = {name: local(live.params[name]) for name in self._kept.names}
        spread = sharding({name: live.params[name] for name in weights})
        norm = global_norm(norms(self._kept.updates(list(weights.values())), spread))
        factor = 1.0
        if math.isfinite(norm):
            if len(self._last) >= self.arm_after:
                mean = math.fsum(self._last) / len(self._last)
                var = math.fsum((x - mean) ** 2 for x in self._last) / len(self._last)
                factor = limited(norm, mean + self.sigmas * max(math.sqrt(var), SIGMA_FLOOR))
                self._kept.scale(weights, dict.fromkeys(weights, factor))
            self._last = [*self._last, norm][-self.window :]
        self._kept.drop()
        return Continue(told("update clipped", factor))


@dataclass(kw_only=True, eq=False)
class RmsClip(Editor):
    """Divides each tensor's update by max(1, RMS(u) / `limit`), u = (new - old) / rate (Adafactor, arXiv 1804.04235).

    With decoupled decay u holds lambda theta too. A tensor whose rate is 0 is left alone.

    Example:
        guard = Guard(model, optimizer, policy=RmsClip(limit=1.0))
    """

    SAVED: ClassVar[tuple[str, ...]] = ()

    limit: float = 1.0

    _kept: Kept = field(default_factory=Kept, init=False, repr=False)
    _rates: StepRates = field(default_factory=StepRates, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, limit=1e-12)

    def edit(self, seen: Seen, live: Live) -> Action:
        self._rates.watch(live.optimizer)
        now = gradients(live)
        self._kept.take(now.names, now.weights)
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        params = {name: live.params[name] for name in self._kept.names}
        weights = {name: local(param) for name, param in params.items()}
        norm_P = norms(self._kept.updates(list(weights.values())), sharding(params))
        factors = {}
        for (name, param), norm in zip(params.items(), norm_P, strict=True):
            reach = self._rates.of(param) * self.limit * math.sqrt(param.numel())
            factors[name] = limited(norm, reach) if reach > 0 and math.isfinite(norm) else 1.0
        least = self._kept.scale(weights, factors)
        self._kept.drop()
        return Continue(told("a tensor's update clipped", least))


@dataclass(kw_only=True, eq=False)
class StableAdamW(Editor):
    """Divides each tensor's rate by max(1, RMS_t): AdamW becomes StableAdamW (Wortsman et al. 2023, algorithm 2).

    RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2))) with v *after* the step and debiased, g as the optimizer got it, clipped
    or not: the paper's form; some public ones take v before. v then holds (1 - beta2) g^2, so RMS_t <= sqrt(1 / (1 -
    beta2)) once the bias is gone. The source uses beta2 = 0.99: with 0.999 a spike is met about three times as hard.

    Example:
        guard = Guard(model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99)), policy=StableAdamW())
    """

    SAVED: ClassVar[tuple[str, ...]] = ()

    _kept: Kept = field(default_factory=Kept, init=False, repr=False)

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        self._kept.take(now.names, now.weights)
        return CONTINUE

    def after_step(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        if now.names != self._kept.names:
            raise ValueError(
                "StableAdamW: the gradients are gone after the step; call zero_grad after the guard's step"
            )
        adam = moments(now, live)
        if not adam.places:
            raise ValueError(f"StableAdamW needs an Adam, and {type(live.optimizer).__name__} kept no moments")
        weights = dict(zip(now.names, now.weights, strict=True))
        factors = {}
        for place, value in zip(adam.places, rms_t(now, adam), strict=True):
            factors[now.names[place]] = limited(value, 1.0) if math.isfinite(value) else 1.0
        least = self._kept.scale(weights, factors)
        self._kept.drop()
        return Continue(told("a tensor's rate lowered for its RMS_t", least))
