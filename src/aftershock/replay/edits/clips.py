"""Clipping: to a norm, to a multiple of the run's own norms, not at all, or as one of the guard's policies does it.

Must not import other edits.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aftershock.config import nearest
from aftershock.guard.policies.adagc import AdaGC
from aftershock.guard.policies.tensor_clip import TensorClip
from aftershock.guard.policies.update_clip import RmsClip, StableAdamW
from aftershock.guard.policies.zclip import ZClip
from aftershock.guard.policy import Policy, Seen, SkipStep, Stop
from aftershock.replay.edits.checked import Checked, around_step, kind, live
from aftershock.replay.loop import length, trained
from aftershock.replay.run import Run

HISTORY, ARMED = 50, 8
"""Norms that make the running median, and how many there must be before it clips."""


@dataclass(frozen=True, kw_only=True)
class Clip(Checked):
    """Global norm clipped to `norm`; inf takes the workload's own clip off."""

    norm: float

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise ValueError(f"a clip is a norm above 0, got {self.norm}")

    def check(self, run: Run) -> None:
        if run.clip_norm is None and math.isinf(self.norm):
            raise ValueError("the workload clips nothing, so there is no clip to take off")
        if run.clip_norm == self.norm:
            raise ValueError(f"gradients are clipped to {self.norm:g} already")

    def change(self, run: Run) -> None:
        run.clip_norm = None if math.isinf(self.norm) else self.norm


@dataclass(frozen=True, kw_only=True)
class RelativeClip(Checked):
    """Global norm clipped to `ratio` times the median of the last 50 norms before clipping, from the 9th step on.

    The workload's own clip stays where it is lower. A norm that is not finite enters no median.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"a relative clip is a number above 0, got {self.ratio}")

    def check(self, run: Run) -> None:
        return None

    def change(self, run: Run) -> None:
        own, norms = run.clip_norm, deque[float](maxlen=HISTORY)

        def clip(step: int) -> None:
            norm = _norm(run)
            level = self.ratio * statistics.median(norms) if len(norms) >= ARMED else math.inf
            least = min(level, math.inf if own is None else own)
            run.clip_norm = least if 0 < least < math.inf else own
            if math.isfinite(norm):
                norms.append(norm)

        run.after_backward.append(clip)


POLICIES: dict[str, Callable[[], Policy]] = {
    "adagc": AdaGC,
    "rms-clip": RmsClip,
    "stable-adamw": StableAdamW,
    "tensor-clip": lambda: TensorClip(decay=0.95),  # by itself it takes an Adam's beta, and SGD has none
    "zclip": ZClip,
}
"""Policies of the guard, started afresh at the snapshot."""


@dataclass(frozen=True, kw_only=True)
class Treated(Checked):
    """One of the guard's clipping policies from here on, see `POLICIES`; a step that it skips is not taken.

    Those that learn a level from the run start without one. Example: Treated(policy="stable-adamw").
    """

    policy: Literal["adagc", "rms-clip", "stable-adamw", "tensor-clip", "zclip"]

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"no policy {self.policy!r}{nearest(self.policy, POLICIES)}")

    def check(self, run: Run) -> None:
        if self.policy == "stable-adamw" and not all("betas" in g for g in run.workload.optimizer.param_groups):
            raise ValueError(f"{kind(run.workload.optimizer)} keeps no second moment, and StableAdamW divides by it")
        if self.policy == "stable-adamw" and not run.workload.optimizer.state:
            raise ValueError("the optimizer has taken no step yet, so there are no moments for StableAdamW")

    def change(self, run: Run) -> None:
        policy, loss, own = POLICIES[self.policy](), run.loss, [math.nan]
        seen: list[Seen] = []

        def told(model: nn.Module, batch: Any) -> Tensor:
            value = loss(model, batch)
            own[0] = float(value.detach())
            return value

        def before(step: int) -> None:
            rate = float(run.workload.optimizer.param_groups[0]["lr"])
            norm = _norm(run)
            seen[:] = [Seen(step, run.index_of(step), own[0], norm, math.nan, rate, {}, None, ())]
            if isinstance(policy.before_step(seen[0], live(run)), (SkipStep, Stop)):
                run.workload.optimizer.zero_grad(set_to_none=True)
                seen.clear()

        @torch.no_grad()
        def after() -> None:
            if seen:
                policy.after_step(seen.pop(), live(run))

        run.loss = told
        run.undo.append(_hooks_as_now(run.workload.optimizer))
        run.after_backward.append(before)
        around_step(run, _nothing, after)
        run.undo.append(seen.clear)  # first to be called: a step that failed has nothing after it


def _hooks_as_now(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Takes off what a policy will have hung on the optimizer's step."""
    both = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    kept = [set(hooks) for hooks in both]

    def take_off() -> None:
        for hooks, keys in zip(both, kept, strict=True):
            for key in set(hooks) - keys:
                del hooks[key]

    return take_off


def _norm(run: Run) -> float:
    return length([p.grad for p in trained(run) if p.grad is not None]).item()


def _nothing() -> None:
    return None
