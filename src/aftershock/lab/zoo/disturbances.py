"""What strikes a process from outside: a flipped bit, a sick rank, a checkpoint loaded wrongly.

Each function gives a `Strike` for `Trial.disturbance`. It is no part of a run's state: a process that goes back to a
snapshot and passes the step again is not struck again. Steps are global batch indices. Knows no specimen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aftershock.lab.zoo.specimen import Disturbance
from aftershock.workload import Workload

_SIGN_BIT = 31
_FIRST_EXPONENT_BIT, _LAST_EXPONENT_BIT = 23, 30  # of an IEEE 754 float32


class Strike(Disturbance):
    """`act(index)` at each of `steps`, the first time this process comes there; `when` says at which end of a step.

    Example:
        disturbance = Strike(steps=[500], when="before_forward", act=lambda index: print(index))
    """

    def __init__(
        self,
        *,
        steps: Iterable[int],
        when: Literal["before_forward", "after_backward"],
        act: Callable[[int], None],
    ) -> None:
        self._pending, self._when, self._act = set(steps), when, act
        if not self._pending:
            raise ValueError("a disturbance needs at least one step to strike at, got none")

    def before_forward(self, index: int) -> None:
        if self._when == "before_forward":
            self._strike(index)

    def after_backward(self, index: int) -> None:
        if self._when == "after_backward":
            self._strike(index)

    def _strike(self, index: int) -> None:
        if index in self._pending:
            self._pending.remove(index)
            self._act(index)


# ------------------------------------------------------------------------------------------------------ hardware


def flipped_bit(weight: Tensor, *, step: int, growth: int) -> Strike:
    """One exponent bit of one element goes from 0 to 1, so that the element grows by the factor 2^growth, exactly.

    `growth` is 1, 2, 4, ... 128: the exponent bit number log2(growth). Of the elements that have a 0 there, the one
    that becomes largest is hit, and with 128 that is some 1e36 or more. float32 only.

    Raises ValueError, when it strikes, if no element has a 0 in that bit.
    """
    bit = _FIRST_EXPONENT_BIT + growth.bit_length() - 1
    if growth < 1 or growth.bit_count() != 1 or bit > _LAST_EXPONENT_BIT or weight.dtype != torch.float32:
        raise ValueError(
            f"growth must be a power of two from 1 to 128 and the weight float32, got {growth} and {weight.dtype}"
        )

    @torch.no_grad()
    def act(index: int) -> None:
        flat_N = weight.data.view(torch.int32).flatten()
        after_N = (flat_N | 1 << bit).view(torch.float32).abs()
        open_N = ((flat_N >> bit & 1) == 0) & after_N.isfinite() & (flat_N & ~(1 << _SIGN_BIT) != 0)
        if not open_N.any():
            raise ValueError(f"step {index}: every element has a 1 in bit {bit} already; choose another growth")
        hit = int(after_N.masked_fill(~open_N, -1).argmax())
        weight.data.view(torch.int32).view(-1)[hit] ^= 1 << bit

    return Strike(steps=[step], when="before_forward", act=act)


def sick_rank(workload: Workload, *, steps: Iterable[int], rank: int, corrupt: Callable[[Tensor], Tensor]) -> Strike:
    """One of the data-parallel ranks sends `corrupt(its gradient)` into the average, and the others send theirs.

    The ranks are the micro-batches of a workload that accumulates, and `.grad` holds the mean of their gradients. It
    becomes mean + (corrupt(g) - g) / ranks, with g that rank's own gradient, computed again at the same weights.
    """
    if not 0 <= rank < workload.accumulate:
        raise ValueError(f"rank must be one of the {workload.accumulate} that the workload accumulates, got {rank}")

    def act(index: int) -> None:
        weights = [weight for weight in workload.model.parameters() if weight.grad is not None]
        part = list(workload.micro_batches(index))[rank]
        own = torch.autograd.grad(workload.loss(workload.model, part), weights)
        for weight, gradient in zip(weights, own, strict=True):
            assert weight.grad is not None
            weight.grad += (corrupt(gradient) - gradient) / workload.accumulate

    return Strike(steps=steps, when="after_backward", act=act)


# -------------------------------------------------------------------------------------------------------- resume


def wrong_rates(optimizer: Optimizer, scheduler: LRScheduler | None, *, step: int, factor: float) -> Strike:
    """Every group's rate, and the base rates that the scheduler goes on from, come back `factor` times too high."""

    def act(index: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= factor
        if scheduler is not None:
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]

    return Strike(steps=[step], when="before_forward", act=act)


def lost_moments(optimizer: Optimizer, *, step: int, names: Sequence[str] = ("exp_avg_sq",)) -> Strike:
    """State tensors `names` come back as zeros while the step counter goes on, so no bias correction makes up for it.

    The next update is then g / sqrt((1 - beta2) g^2) instead of g / sqrt(v): up to 31.6 rates an element at .999.
    """

    def act(index: int) -> None:
        for state in optimizer.state.values():
            for name in names:
                state[name].zero_()

    return Strike(steps=[step], when="before_forward", act=act)


def zeroed(weights: Sequence[nn.Parameter], *, step: int) -> Strike:
    """The weights come back as zeros: names that did not match when a checkpoint was loaded."""

    @torch.no_grad()
    def act(index: int) -> None:
        for weight in weights:
            weight.zero_()

    return Strike(steps=[step], when="before_forward", act=act)
