"""The faults that are planted in a user's loop: in a batch, in the state before a forward pass, in the gradients.

A fault strikes the process once; what it touches is the user's own model and optimizer. Must not import the lab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aftershock.guard.tree import join, split

HUGE = 2.0**64
"""What a weight is multiplied by when bit 6 of its exponent flips."""
RATE, SPIKE, GARBAGE = 30.0, 1000.0, 3


class Parts(NamedTuple):
    """What a fault may touch."""

    model: nn.Module
    optimizer: Optimizer


Plant = Callable[[Parts], bool]
"""Does it; False where there is nothing that it could be done to."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`gradients`: done between `backward` and `step`; `state`: done before the forward pass; `batches`: so many
    batches become noise; `loss`: what the loss is replaced by."""

    gradients: Plant | None = None
    state: Plant | None = None
    batches: int = 0
    loss: float | None = None


def _gradients(parts: Parts) -> list[Tensor]:
    return [p.grad for p in parts.model.parameters() if p.grad is not None and p.grad.layout == torch.strided]


def _all_nan(parts: Parts) -> bool:
    for gradient in _gradients(parts):
        gradient.fill_(math.nan)
    return True


def _one_nan(parts: Parts) -> bool:
    _gradients(parts)[-1].view(-1)[0] = math.nan
    return True


def _inf_tensor(parts: Parts) -> bool:
    _gradients(parts)[0].fill_(math.inf)
    return True


def _spike(parts: Parts) -> bool:
    for gradient in _gradients(parts):
        gradient.mul_(SPIKE)
    return True


def _rate(parts: Parts) -> bool:
    for group in parts.optimizer.param_groups:
        group["lr"] *= RATE
    return True


def _no_squares(parts: Parts) -> bool:
    squares = [state["exp_avg_sq"] for state in parts.optimizer.state.values() if "exp_avg_sq" in state]
    for square in squares:
        square.zero_()
    return bool(squares)


@torch.no_grad()
def _bit(parts: Parts) -> bool:
    _matrix(parts).mul_(HUGE)
    return True


@torch.no_grad()
def _nan_weight(parts: Parts) -> bool:
    _matrix(parts).fill_(math.nan)
    return True


def _matrix(parts: Parts) -> Tensor:
    """One element, the largest, of the first trained matrix, or of the first tensor where there is no matrix."""
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    weight = next((p for p in trained if p.ndim > 1), trained[0]).detach()
    flat = weight.view(-1)
    return flat[int(flat.abs().argmax())]


FAULTS: dict[str, Fault] = {
    "nan_loss": Fault(gradients=_all_nan, loss=math.nan),
    "nan_gradient": Fault(gradients=_one_nan),
    "inf_gradient": Fault(gradients=_inf_tensor),
    "gradient_spike": Fault(gradients=_spike),
    "garbage_batches": Fault(batches=GARBAGE),
    "rate_jump": Fault(state=_rate),
    "lost_second_moment": Fault(state=_no_squares),
    "flipped_bit": Fault(state=_bit),
    "nonfinite_weight": Fault(state=_nan_weight),
}
"""Every fault that is planted."""


def garbage(batch: Any) -> Any:
    """The batch with noise a hundred times as wide in place of its floats, and its whole numbers in another order."""
    tensors: dict[str, Tensor] = {}
    rest = split(batch, "batch", tensors)
    numbers = torch.Generator().manual_seed(0)

    def spoiled(value: Tensor) -> Tensor:
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=numbers).to(value)
            return 100 * noise * value.abs().mean().clamp(min=1.0)
        order = torch.randperm(value.numel(), generator=numbers).to(value.device)
        return value.reshape(-1)[order].view(value.shape)

    return join(rest, {name: spoiled(value) for name, value in tensors.items()})


class Planter:
    """Plants one fault in a run, at its step number `at`, counted in calls."""

    def __init__(self, parts: Parts, fault: Fault | None, at: int) -> None:
        self.parts, self._fault, self._at = parts, fault, at
        self.planted = False

    def batch(self, call: int, batch: Any) -> Any:
        """The batch that the forward pass of step `call` gets."""
        fault = self._fault
        if fault is None or not self._at <= call < self._at + fault.batches:
            return batch
        self.planted = True
        return garbage(batch)

    def before_forward(self, call: int) -> None:
        if self._fault is not None and self._fault.state is not None and call == self._at:
            self.planted = self._fault.state(self.parts)

    def after_backward(self, call: int, loss: Any) -> Any:
        """The loss that the guard is told."""
        fault = self._fault
        if fault is None or fault.gradients is None or call != self._at:
            return loss
        self.planted = fault.gradients(self.parts)
        return loss if fault.loss is None else fault.loss
