"""AdaGC: clip each tensor's gradient by its own moving average norm (Wang et al. 2025, arXiv 2502.11034), with repairs.

Repairs to the public port: a tensor's average starts at its own first gradient, whenever that comes (there it is
uninitialised memory), it cannot sink to 0 and freeze the tensor, and the global norm is computed once a step, not once
a tensor. Must not import the guard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import global_norm, gradients, limited, norms, scale, told
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import Action, Continue, Live, Seen


@dataclass(kw_only=True, eq=False)
class AdaGC(Editor):
    """Clips tensor i to `ratio` gamma_i, gamma_i the moving average of its clipped norms.

    In the first `warmup` steps all are scaled by h = min(1, `max_norm` / |g|), |g| the global norm, and gamma_i =
    min(gamma_i, |h g_i|). Later h_i = min(1, ratio gamma_i / |g_i|), gamma_i = `decay` gamma_i + (1 - decay) |h_i g_i|.
    gamma_i starts at the tensor's first gradient that is not 0, after the warm-up unclipped, and never falls below
    `floor` times that start; a gradient of exactly 0 (an expert without tokens) teaches nothing.

    Example:
        guard = Guard(model, optimizer, policy=AdaGC())
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps", "gamma", "start")

    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0
    floor: float = 0.01

    _steps: int = field(default=0, init=False, repr=False)
    _gamma: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _start: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, ratio=1, decay=0, warmup=0, max_norm=1e-12, floor=1e-9)
        if self.decay >= 1 or self.floor > 1:
            raise ValueError(f"AdaGC: decay must be below 1 and floor at most 1, got {self.decay}, {self.floor}")

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        norms_P = norms(now.grads, now.spread)
        warming = self._steps < self.warmup
        common = limited(global_norm(norms_P), self.max_norm) if warming else 1.0
        factors = [self._factor(name, norm, common, warming) for name, norm in zip(now.names, norms_P, strict=True)]
        least = scale(now.grads, factors)
        self._steps += 1
        # The warm-up clips by a fixed norm, which is no event.
        where = now.names[factors.index(least)] if factors else ""
        return Continue("" if warming else told(f"gradient of {where} clipped by AdaGC", least))

    def _factor(self, name: str, norm: float, common: float, warming: bool) -> float:
        if norm == 0:
            return common
        if name not in self._gamma:
            self._gamma[name] = self._start[name] = common * norm
            return common
        gamma = self._gamma[name]
        if warming:
            new, factor = min(gamma, common * norm), common
        else:
            factor = limited(norm, self.ratio * gamma)
            new = self.decay * gamma + (1 - self.decay) * factor * norm
        self._gamma[name] = max(new, self.floor * self._start[name])
        return factor
