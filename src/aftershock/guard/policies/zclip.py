"""ZClip: clip the global gradient norm by its z-score (Kumar et al. 2025, arXiv 2504.02507), with repairs.

Repairs to the public code: a norm that is not finite never enters mean and variance (there one NaN switches clipping
off for ever), the state is saved, norms may come from shards. Must not import the guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import gradients, limited, scale, told
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import Action, Continue, Live, Seen

TINY = 1e-6
"""Added to sigma, as in the public code."""


@dataclass(kw_only=True, eq=False)
class ZClip(Editor):
    """Clips norms g whose z = (g - mu) / (sigma + 1e-6) exceeds `threshold`, then all to `max_norm`.

    Clipped to `factor` (mu + threshold sigma / (z / threshold)) in mode "adaptive", to mu in "mean", and to mu +
    threshold sigma in "percentile". mu and sigma^2 start as mean and population variance of the first `warmup` finite
    norms, in which only `max_norm` clips, and move by 1 - `decay` with each norm as clipped by z (not by `max_norm`).
    A healthy norm above threshold is clipped too; below it, with `max_norm` out of reach, gradients keep their bits.

    Example:
        guard = Guard(model, optimizer, policy=ZClip(max_norm=1.0))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("mean", "var", "first")

    threshold: float = 2.5
    factor: float = 1.0
    mode: Literal["adaptive", "mean", "percentile"] = "adaptive"
    decay: float = 0.97
    warmup: int = 25
    max_norm: float = 1.0
    """`math.inf` for none."""

    _mean: float = field(default=0.0, init=False, repr=False)
    _var: float = field(default=0.0, init=False, repr=False)
    _first: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, threshold=1e-9, factor=1e-9, decay=0, warmup=2)
        if self.decay >= 1 or not self.max_norm > 0:
            raise ValueError(f"ZClip: decay must be below 1 and max_norm above 0, got {self.decay}, {self.max_norm}")
        if self.mode not in ("adaptive", "mean", "percentile"):
            raise ValueError(f"ZClip: mode must be adaptive, mean or percentile, got {self.mode!r}")

    def edit(self, seen: Seen, live: Live) -> Action:
        norm = seen.grad_norm
        if len(self._first) < self.warmup:
            self._first.append(norm)
            if len(self._first) == self.warmup:
                self._mean = math.fsum(self._first) / self.warmup
                self._var = math.fsum((x - self._mean) ** 2 for x in self._first) / self.warmup
            target = norm
        else:
            target = self._target(norm)
            self._mean = self.decay * self._mean + (1 - self.decay) * target
            self._var = self.decay * self._var + (1 - self.decay) * (target - self._mean) ** 2
        factor = limited(norm, min(target, self.max_norm))
        if factor < 1:
            grads = gradients(live).grads
            scale(grads, [factor] * len(grads))
        return Continue(told("gradient norm clipped by z-score", limited(norm, target)))

    def _target(self, norm: float) -> float:
        sigma = math.sqrt(self._var)
        z = (norm - self._mean) / (sigma + TINY)
        if z <= self.threshold:
            return norm
        if self.mode == "mean":
            return self._mean
        if self.mode == "percentile":
            return self._mean + self.threshold * sigma
        return self.factor * (self._mean + self.threshold * sigma / (z / self.threshold))
