"""SPAM and Stable-SPAM: clip elements and norms by their history, zero Adam's moments now and then; and on demand.

SPAM: Huang et al. 2025, arXiv 2501.06842. Stable-SPAM: Huang et al. 2025, arXiv 2502.17055. Repairs to the public
code: the gradient of a reset step goes into the zeroed moments (Stable-SPAM loses it), and an element that never had a
gradient is not clipped to 0 for ever. Must not import the guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import gradients, maxima, norms, scale
from aftershock.guard.policies.incident import leads
from aftershock.guard.policies.kept import Kept
from aftershock.guard.policies.moments import moments, rms_t, zero
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen, SkipStep
from aftershock.signals.ranks import local

TINY = 1e-8
"""Added to sqrt(b) in Stable-SPAM's norm, as in the public code."""


@dataclass(kw_only=True, eq=False)
class Spam(Editor):
    """Spike-aware Adam: element clip, and moments zeroed every `period` steps with a soft restart.

    Where g^2 > `threshold` v, g = sign(g) sqrt(threshold v), v as stored before the step; not in the `grace` steps at
    the start and after each reset, nor where v = 0 (the source would freeze such an element). After a reset the step is
    scaled by 1 - c(s), c(s) = 0.99 (1 + cos(pi s / warmup)) / 2 in step s < `warmup`. `restart` also restarts Adam's
    bias correction, which the source does not. Before the first reset, a run without such elements keeps its bits.

    Example:
        guard = Guard(model, optimizer, policy=Spam())
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps",)

    period: int = 500
    threshold: float = 5000.0
    warmup: int = 150
    grace: int = 20
    restart: bool = False

    _steps: int = field(default=0, init=False, repr=False)
    _kept: Kept = field(default_factory=Kept, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, period=1, threshold=1e-12, warmup=0, grace=0)

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        since = self._steps % self.period
        is_reset = since == 0 and self._steps > 0
        if is_reset:
            zero(live.optimizer, list(live.params.values()), restart=self.restart)
        elif since >= self.grace:
            adam = moments(now, live)
            # Tensor by tensor: scratch of the largest one, not of the model.
            for place, v in zip(adam.places, adam.second, strict=True):
                top = (v * self.threshold).sqrt_().masked_fill_(v == 0, torch.inf).to(now.grads[place].dtype)
                now.grads[place].clamp_(-top, top)
        if self._warms():
            self._kept.take(now.names, now.weights)
        return Continue("moments zeroed, rates warm up again" if is_reset else "")

    def after_step(self, seen: Seen, live: Live) -> Action:
        if self._warms():
            cosine = 0.99 * 0.5 * (1 + math.cos(math.pi * (self._steps % self.period) / self.warmup))
            weights = {name: local(live.params[name]) for name in self._kept.names}
            self._kept.scale(weights, dict.fromkeys(weights, 1 - cosine))
            self._kept.drop()
        self._steps += 1
        return CONTINUE

    def _warms(self) -> bool:
        return self._steps >= self.period and self._steps % self.period < self.warmup


@dataclass(kw_only=True, eq=False)
class StableSpam(Editor):
    """Stable-SPAM: elements and norms of each tensor's gradient brought to their history, moments zeroed at times.

    Per tensor, M = `decay` M + (1 - decay) max|g|; where |g| > M / (1 - decay^t), g = g M_hat / max|g|. Then with n =
    |g|: a = `norm_decay` a + (1 - norm_decay) n, b = `square_decay` b + (1 - square_decay) n^2, both debiased, and g =
    g / n a_hat / (sqrt(b_hat) + 1e-8). Every `period` steps m, v and Adam's counter restart, then take in g.
    t counts a tensor's own gradients that are not 0; the source counts from the last reset. By its definition this
    changes every step: all tensors' gradients get a norm near 1, which Adam does not see but a global clip does.

    Example:
        guard = Guard(model, optimizer, policy=StableSpam())
    """

    SAVED: ClassVar[tuple[str, ...]] = ("steps", "history")

    decay: float = 0.999
    norm_decay: float = 0.7
    square_decay: float = 0.9
    period: int = 1000

    _steps: int = field(default=0, init=False, repr=False)
    _history: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)
    """By name: t, M, a, b."""

    def __post_init__(self) -> None:
        require(self, decay=0, norm_decay=0, square_decay=0, period=1)
        if max(self.decay, self.norm_decay, self.square_decay) >= 1:
            raise ValueError("StableSpam: decay, norm_decay and square_decay must be below 1")

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        is_reset = self._steps > 0 and self._steps % self.period == 0
        if is_reset:
            zero(live.optimizer, list(live.params.values()), restart=True)
        top_P = maxima(now.grads, now.spread)
        for name, grad, top in zip(now.names, now.grads, top_P, strict=True):
            if top > 0:
                usual = self._usual_top(name, top)
                if usual < top:
                    grad.copy_(torch.where(grad.abs() > usual, grad * (usual / top), grad))
        norm_P = norms(now.grads, now.spread)
        scale(now.grads, [self._factor(name, norm) for name, norm in zip(now.names, norm_P, strict=True)])
        self._steps += 1
        return Continue("moments zeroed" if is_reset else "")

    def _usual_top(self, name: str, top: float) -> float:
        t, most, a, b = self._history.get(name, (0.0, 0.0, 0.0, 0.0))
        most = self.decay * most + (1 - self.decay) * top
        self._history[name] = [t + 1, most, a, b]
        return most / (1 - self.decay ** (t + 1))

    def _factor(self, name: str, norm: float) -> float:
        if norm == 0:
            return 1.0
        t, most, a, b = self._history[name]
        a = self.norm_decay * a + (1 - self.norm_decay) * norm
        b = self.square_decay * b + (1 - self.square_decay) * norm**2
        self._history[name] = [t, most, a, b]
        a_hat, b_hat = a / (1 - self.norm_decay**t), b / (1 - self.square_decay**t)
        return a_hat / (math.sqrt(b_hat) + TINY) / norm


@dataclass(kw_only=True, eq=False)
class MomentumReset(Editor):
    """The reset as a reaction: on an alarm, zero the moments of those tensors whose RMS_t fired, and of no other.

    An alarm is a spike or shift of loss, gradient or update norm. RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2))), v before
    the step, fires above `threshold`. With `skip` the alarming step is not taken, so that the bad gradient is not the
    first to enter the fresh moments; at most once every `cooldown` steps. Adam's counter restarts (`restart`), else the
    first step after the reset is up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times too long.

    Example:
        guard = Guard(model, optimizer, policy=MomentumReset())
    """

    SAVED: ClassVar[tuple[str, ...]] = ("last",)

    threshold: float = 2.3
    skip: bool = True
    restart: bool = True
    cooldown: int = 20

    _last: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, threshold=0, cooldown=0)

    def edit(self, seen: Seen, live: Live) -> Action:
        if not leads(seen.verdicts) or (self._last >= 0 and seen.batch_id < self._last + self.cooldown):
            return CONTINUE
        now = gradients(live)
        adam = moments(now, live)
        fired = [place for place, value in zip(adam.places, rms_t(now, adam), strict=True) if value > self.threshold]
        if not fired:
            return CONTINUE
        zero(live.optimizer, [now.params[place] for place in fired], restart=self.restart)
        self._last = seen.batch_id
        names = [now.names[place] for place in fired]
        reason = f"moments zeroed where RMS_t > {self.threshold:g}: {', '.join(names[:5])} ({len(names)} tensors)"
        return SkipStep(reason) if self.skip else Continue(reason)

    def after_rewind(self, step: int) -> None:
        """In restart mode the data's clock goes back too."""
        self._last = -1
