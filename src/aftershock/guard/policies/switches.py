"""Switches of hyper-parameters in the middle of a run: betas, eps, decay of embeddings, z-loss, precision.

Each fires once, at step `at` or at the first alarm, and stays: where a restored snapshot or checkpoint brings the old
settings back, they are switched again and that is told (OPT-175B trained on with old betas). Must not import the guard.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import gradients, norms
from aftershock.guard.policies.incident import is_finite, leads
from aftershock.guard.policies.kept import Kept
from aftershock.guard.policies.moments import betas_of, groups
from aftershock.guard.policies.rates import StepRates
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen
from aftershock.signals.places import match
from aftershock.signals.ranks import local

ALARM = -1
"""`at` = ALARM: at the first spike, shift or non-finite verdict, instead of at a step."""


@dataclass(kw_only=True, eq=False)
class Switch(Editor):
    """What all switches share: when they fire. `at` is a step, or `ALARM` (-1)."""

    SAVED: ClassVar[tuple[str, ...]] = ("on_since",)

    at: int = ALARM

    _on_since: int = field(default=-1, init=False, repr=False)

    def edit(self, seen: Seen, live: Live) -> Action:
        if self._on_since < 0:
            if not self.is_due(seen, live):
                return CONTINUE
            self._on_since = seen.step
            return Continue(self.turn(live, again=False))
        return Continue(self.turn(live, again=True))

    def is_due(self, seen: Seen, live: Live) -> bool:
        """Whether to fire at this step."""
        return _is_due(self.at, seen)

    def on_nonfinite(self, seen: Seen, live: Live) -> str:
        """The step is skipped, but it may be the alarm that the switch waits for."""
        if self._on_since >= 0 or not self.is_due(seen, live):
            return ""
        self._on_since = seen.step
        return self.turn(live, again=False)

    @abstractmethod
    def turn(self, live: Live, *, again: bool) -> str:
        """Set what is to be set, where it is not so already; what was done, in words, or nothing."""


@dataclass(kw_only=True, eq=False)
class BetaSwitch(Switch):
    """Sets beta1 and beta2 of all groups (nan leaves one as it is); `moments` says what becomes of m and v.

    "keep": m and v stay as stored, and so does Adam's counter, so that in the first 1 / (1 - beta) steps of a run the
    new bias correction 1 - beta^t no longer fits them. "recompute": m and v are multiplied by (1 - new^t) / (1 -
    old^t), so that the debiased moments are continuous. Late in a run the two are the same.

    Example:
        guard = Guard(model, optimizer, policy=BetaSwitch(beta2=0.95))
    """

    beta1: float = math.nan
    beta2: float = math.nan
    moments: Literal["keep", "recompute"] = "keep"

    def __post_init__(self) -> None:
        if not all(math.isnan(beta) or 0 <= beta < 1 for beta in (self.beta1, self.beta2)):
            raise ValueError(f"BetaSwitch: betas must lie in [0, 1), got {self.beta1}, {self.beta2}")
        if math.isnan(self.beta1) and math.isnan(self.beta2):
            raise ValueError("BetaSwitch: give beta1, beta2 or both; it would do nothing")
        if self.moments not in ("keep", "recompute"):
            raise ValueError(f"BetaSwitch: moments must be keep or recompute, got {self.moments!r}")

    def turn(self, live: Live, *, again: bool) -> str:
        told = ""
        for group in live.optimizer.param_groups:
            if "betas" not in group:
                raise ValueError(f"BetaSwitch: {type(live.optimizer).__name__} has no betas")
            old = betas_of(group)
            new = tuple(b if math.isnan(want) else want for b, want in zip(old, (self.beta1, self.beta2), strict=True))
            if new != old:
                if self.moments == "recompute":
                    _rescale(live, group, old, new)
                group["betas"] = new
                told = f"betas {old} -> {new}, moments {self.moments}" + (" (a restore had undone it)" if again else "")
        return told


@dataclass(kw_only=True, eq=False)
class EpsSwitch(Switch):
    """Sets Adam's eps of the groups of the parameters `names` (patterns).

    Lower where RMS(g) comes near eps and the step dies (`below`: fires when a tensor's RMS(g) < below * its eps);
    higher to damp early spikes. A group holds one eps: names must cover whole groups.

    Example:
        guard = Guard(model, optimizer, policy=EpsSwitch(eps=1e-15, below=10.0))
    """

    eps: float
    names: tuple[str, ...] = ("*",)
    below: float = 0.0

    def __post_init__(self) -> None:
        require(self, eps=0, below=0)

    def is_due(self, seen: Seen, live: Live) -> bool:
        if not self.below:
            return _is_due(self.at, seen)
        _require_eps(live.optimizer)
        if not is_finite(seen):
            return False
        now = gradients(live, names=match(self.names, live.params, what="parameter"))
        group_of = groups(live.optimizer)
        for param, norm in zip(now.params, norms(now.grads, now.spread), strict=True):
            # A gradient of exactly 0 is a frozen or unused tensor, which no eps helps.
            if 0 < norm / math.sqrt(max(1, param.numel())) < self.below * float(group_of[param]["eps"]):
                return True
        return False

    def turn(self, live: Live, *, again: bool) -> str:
        _require_eps(live.optimizer)
        chosen = [live.params[name] for name in match(self.names, live.params, what="parameter")]
        told = ""
        for group in live.optimizer.param_groups:
            inside = _inside(group, chosen)
            if inside == "some":
                raise ValueError(
                    f"EpsSwitch: {self.names} cover a part of a parameter group; give them their own group"
                )
            if inside == "all" and group["eps"] != self.eps:
                told = f"eps {group['eps']:g} -> {self.eps:g}" + (" (a restore had undone it)" if again else "")
                group["eps"] = self.eps
        return told


def _require_eps(optimizer: torch.optim.Optimizer) -> None:
    if any("eps" not in group for group in optimizer.param_groups):
        raise ValueError(f"EpsSwitch: {type(optimizer).__name__} has no eps")


@dataclass(kw_only=True, eq=False)
class DecaySwitch(Switch):
    """Takes weight decay off the parameters `names` (patterns), by default those with "embed" in their name (OLMo 2).

    Where they fill a group its weight_decay becomes 0. Where they share one with others, decoupled decay (AdamW) is
    given back after each step: theta += rate lambda theta_old, from a copy of these weights. Coupled decay (L2) in
    a shared group is refused.

    Example:
        guard = Guard(model, optimizer, policy=DecaySwitch(at=0))
    """

    names: tuple[str, ...] = ("*embed*",)

    _kept: Kept = field(default_factory=Kept, init=False, repr=False)
    _rates: StepRates = field(default_factory=StepRates, init=False, repr=False)

    def turn(self, live: Live, *, again: bool) -> str:
        names = match(self.names, live.params, what="parameter")
        chosen = [live.params[name] for name in names]
        told, shared = "", []
        for group in live.optimizer.param_groups:
            inside = _inside(group, chosen)
            if inside == "none" or not group.get("weight_decay", 0):
                continue
            if inside == "all":
                told = f"weight decay {group['weight_decay']:g} off {', '.join(names[:5])}"
                group["weight_decay"] = 0.0
                continue
            if not group.get("decoupled_weight_decay", False):
                raise ValueError(f"DecaySwitch: {self.names} share a group with others and its decay is coupled (L2)")
            members = {id(param) for param in group["params"]}
            shared += [name for name, param in zip(names, chosen, strict=True) if id(param) in members]
        self._rates.watch(live.optimizer)
        shared = [name for name in shared if live.params[name].grad is not None]
        self._kept.take(shared, [local(live.params[name]) for name in shared])
        if shared and not again:
            told = f"weight decay given back to {', '.join(shared[:5])}"
        return told

    def after_step(self, seen: Seen, live: Live) -> Action:
        group_of = groups(live.optimizer)
        for name in self._kept.names:
            group = group_of[live.params[name]]
            decay = self._rates.of(live.params[name]) * float(group["weight_decay"])
            local(live.params[name]).add_(self._kept.old(name), alpha=decay)
        self._kept.drop()
        return CONTINUE


@dataclass
class Dial:
    """A number that the training loop reads at each step: `loss + dial.value * (log_z**2).mean()`."""

    value: float = 0.0


@dataclass(kw_only=True, eq=False)
class ZLossSwitch(Switch):
    """Turns z-loss on: raises `dial.value` linearly from 0 to `coefficient` over `ramp` steps (100 to 1,000).

    z-loss is coefficient * mean(log Z^2); the loop adds it to its loss. Usual: 1e-4, some use 1e-5.

    Example:
        dial = Dial()
        guard = Guard(model, optimizer, policy=ZLossSwitch(dial=dial))  # the loop adds dial.value * (log_z**2).mean()
    """

    SAVED: ClassVar[tuple[str, ...]] = ("on_since", "taken")

    dial: Dial
    coefficient: float = 1e-4
    ramp: int = 100

    _taken: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, coefficient=0, ramp=1)

    def turn(self, live: Live, *, again: bool) -> str:
        self.dial.value = self.coefficient * min(1.0, self._taken / self.ramp)
        return "" if again else f"z-loss rises to {self.coefficient:g} over {self.ramp} steps"

    def after_step(self, seen: Seen, live: Live) -> Action:
        if self._on_since >= 0:
            self._taken += 1
            self.dial.value = self.coefficient * min(1.0, self._taken / self.ramp)
        return CONTINUE


@dataclass(kw_only=True, eq=False)
class PrecisionSwitch(Switch):
    """Runs the span after the alarm in another precision: calls `apply(dtype)` now and `apply(None)` `steps` later.

    `apply` is the loop's own: it chooses torch.autocast's dtype, casts modules, or leaves a fused attention kernel out;
    None means as before. Fires again at the next alarm. Without `steps` (0) the run stays there.

    Example:
        guard = Guard(model, optimizer, policy=PrecisionSwitch(apply=lambda dtype: autocast.set(dtype), steps=200))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("on_since", "taken", "spans")

    apply: Callable[[torch.dtype | None], Any]
    dtype: torch.dtype = torch.float32
    steps: int = 0

    _taken: int = field(default=0, init=False, repr=False)
    _spans: int = field(default=0, init=False, repr=False)
    _applied: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, steps=0)

    def is_due(self, seen: Seen, live: Live) -> bool:
        """At a fixed step once; after that span only an alarm calls again."""
        return _is_due(ALARM if self._spans else self.at, seen)

    def turn(self, live: Live, *, again: bool) -> str:
        if self._applied:
            return ""
        self.apply(self.dtype)
        self._applied = True
        # After a resume it is applied once more, which is no news.
        return "" if again else f"precision {self.dtype}"

    def after_step(self, seen: Seen, live: Live) -> Action:
        if self._on_since < 0:
            return CONTINUE
        self._taken += 1
        if not self.steps or self._taken < self.steps:
            return CONTINUE
        self.apply(None)
        self._applied, self._taken, self._on_since = False, 0, -1
        self._spans += 1
        return Continue(f"precision as before, after {self.steps} steps")


def _is_due(at: int, seen: Seen) -> bool:
    return leads(seen.verdicts) or not is_finite(seen) if at == ALARM else seen.step >= at


def _inside(group: dict[str, Any], chosen: list[Tensor]) -> Literal["all", "some", "none"]:
    wanted = {id(param) for param in chosen}
    count = sum(id(param) in wanted for param in group["params"])
    return "none" if not count else "all" if count == len(group["params"]) else "some"


def _rescale(live: Live, group: dict[str, Any], old: tuple[float, ...], new: tuple[float, ...]) -> None:
    """Stored moments such that the debiased ones are the same under the new betas."""
    for param in group["params"]:
        state = live.optimizer.state.get(param, {})
        t = float(state.get("step", 0))
        if t:
            for key, index in (("exp_avg", 0), ("exp_avg_sq", 1), ("max_exp_avg_sq", 1)):
                if isinstance(state.get(key), Tensor):
                    local(state[key]).mul_((1 - new[index] ** t) / (1 - old[index] ** t))
