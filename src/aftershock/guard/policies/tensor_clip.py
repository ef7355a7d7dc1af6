"""Clips with limits that the run sets itself: per tensor (OLMo), per unit (NFNets), and relative to the last norms.

Must not import the guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from aftershock.guard.policies.editor import Editor
from aftershock.guard.policies.gradients import Gradients, gradients, limited, norms, scale, told
from aftershock.guard.policies.saved import require
from aftershock.guard.policy import CONTINUE, Action, Continue, Live, Seen
from aftershock.signals.places import match
from aftershock.signals.ranks import is_sharded


@dataclass(kw_only=True, eq=False)
class TensorClip(Editor):
    """Clips each tensor to `ratio` times the moving average of its own clipped norms (OLMo's trainer).

    The average starts at the tensor's first norm that is not 0 and moves by 1 - `decay`; a decay of nan means the
    larger of the optimizer's betas, as in the source. Gradients of exactly 0 teach nothing. The source leaves the
    ratio to the user; 2 is ours.

    Example:
        guard = Guard(model, optimizer, policy=TensorClip(ratio=3.0))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("average",)

    ratio: float = 2.0
    decay: float = math.nan

    _average: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, ratio=1)
        if not (math.isnan(self.decay) or 0 <= self.decay < 1):
            raise ValueError(f"TensorClip: decay must lie in [0, 1) or be nan, got {self.decay}")

    def edit(self, seen: Seen, live: Live) -> Action:
        now = gradients(live)
        decay = self._decay_of(live)
        factors = [
            self._factor(name, norm, decay) for name, norm in zip(now.names, norms(now.grads, now.spread), strict=True)
        ]
        least = scale(now.grads, factors)
        return Continue(told(f"gradient of {now.names[factors.index(least)]} clipped" if factors else "", least))

    def _factor(self, name: str, norm: float, decay: float) -> float:
        if norm == 0:
            return 1.0
        average = self._average.get(name, norm)
        factor = limited(norm, self.ratio * average)
        self._average[name] = decay * average + (1 - decay) * factor * norm
        return factor

    def _decay_of(self, live: Live) -> float:
        if not math.isnan(self.decay):
            return self.decay
        betas = [float(beta) for group in live.optimizer.param_groups for beta in group.get("betas", ())]
        if not betas:
            raise ValueError(
                "TensorClip: this optimizer has no betas to take the average's decay from; give decay=0.99"
            )
        return max(betas)


@dataclass(kw_only=True, eq=False)
class UnitClip(Editor):
    """Adaptive gradient clipping: each unit's gradient to `limit` max(|w|, `floor`) (Brock et al. 2021, arXiv
    2102.06171, eq. 3).

    A unit is a row along the first axis of a tensor of two axes or more (an output of a Linear or Conv), a whole
    tensor otherwise. `exclude`: names (patterns) left alone; the paper leaves out the last linear layer. Sharded
    tensors of two axes must be sharded along the first, as FSDP2 does.

    Example:
        guard = Guard(model, optimizer, policy=UnitClip(limit=0.01, exclude=("head.*",)))
    """

    SAVED: ClassVar[tuple[str, ...]] = ()

    limit: float = 0.01
    floor: float = 1e-3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self, limit=1e-12, floor=0)

    def edit(self, seen: Seen, live: Live) -> Action:
        left = set(match(self.exclude, live.params, what="parameter")) if self.exclude else set()
        names = [name for name in live.params if name not in left]
        rows = gradients(live, names=[name for name in names if _axes(live.params[name]) > 1])
        for name, param, weight, grad in zip(rows.names, rows.params, rows.weights, rows.grads, strict=True):
            _require_rows(name, param)
            axes = tuple(range(1, grad.ndim))
            # Float32 at least, also for bf16 gradients; a factor of 1 keeps the bits of units that are not clipped.
            wide = torch.promote_types(grad.dtype, torch.float32)
            norm_R = torch.linalg.vector_norm(grad, dim=axes, keepdim=True, dtype=wide)
            top_R = self.limit * torch.linalg.vector_norm(weight, dim=axes, keepdim=True, dtype=wide).clamp(self.floor)
            over_R = norm_R > top_R
            grad.mul_(torch.where(over_R, top_R / torch.where(over_R, norm_R, 1.0), 1.0))
        self._whole(gradients(live, names=[name for name in names if _axes(live.params[name]) <= 1]))
        return CONTINUE  # some unit is clipped at nearly every step, by definition: no event

    def _whole(self, now: Gradients) -> None:
        grad_P, weight_P = norms(now.grads, now.spread), norms(now.weights, now.spread)
        limits = [self.limit * max(weight, self.floor) for weight in weight_P]
        scale(now.grads, [limited(norm, top) for norm, top in zip(grad_P, limits, strict=True)])


@dataclass(kw_only=True, eq=False)
class RelativeClip(Editor):
    """Clips the global norm to `ratio` times the mean of the last `window` norms, as clipped (after MaxText's #14).

    Armed after `arm_after` steps. The window holds clipped norms, so a spike raises the limit by its clipped size.

    Example:
        guard = Guard(model, optimizer, policy=RelativeClip(ratio=1.5))
    """

    SAVED: ClassVar[tuple[str, ...]] = ("last",)

    ratio: float = 1.2
    window: int = 100
    arm_after: int = 10

    _last: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, ratio=1, window=1, arm_after=1)
        if self.arm_after > self.window:
            raise ValueError(f"RelativeClip: arm_after {self.arm_after} lies beyond the window of {self.window}")

    def edit(self, seen: Seen, live: Live) -> Action:
        norm, factor = seen.grad_norm, 1.0
        if len(self._last) >= self.arm_after:
            factor = limited(norm, self.ratio * math.fsum(self._last) / len(self._last))
        if factor < 1:
            grads = gradients(live).grads
            scale(grads, [factor] * len(grads))
        self._last = [*self._last, factor * norm][-self.window :]
        return Continue(told("gradient norm clipped", factor))


def _axes(param: Tensor) -> int:
    return sum(size > 1 for size in param.shape)


def _require_rows(name: str, param: Tensor) -> None:
    if not is_sharded(param):
        return
    placements: Sequence = param.placements  # pyright: ignore[reportAttributeAccessIssue]
    if any(placement.is_shard() and placement.dim != 0 for placement in placements):
        raise ValueError(f"UnitClip: the units of {name} are spread over ranks ({placements}); leave it out (exclude=)")
