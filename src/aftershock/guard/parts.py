"""What one step of the guard is made with, and what became of it. Must not import the guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn
from torch.optim import Optimizer

from aftershock.guard.actions import Actions, Clock
from aftershock.guard.agree import Ranks
from aftershock.guard.policy import Action, Policy
from aftershock.guard.recorder import FlightRecorder
from aftershock.guard.watch import Watch

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler


class Outcome(NamedTuple):
    """What became of a step. `taken`: the optimizer moved; `action`: the policy's last word on it.

    With accumulation, `action` is None until the last micro-batch. With late reading it is that of the step before.
    """

    action: Action | None
    taken: bool
    step: int
    batch_id: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step is made with.

    `driven`: the guard itself calls optimizer, scheduler and scaler; `judged`: hears of every step, once it is judged.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    scaler: GradScaler | None
    policy: Policy
    ranks: Ranks
    recorder: FlightRecorder
    watch: Watch
    clock: Clock
    actions: Actions
    clip_norm: float | None
    update: Literal["sample", "all"]
    dry_run: bool
    driven: bool
    late: bool | None
    judged: Callable[[Outcome], None]
