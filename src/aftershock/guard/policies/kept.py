"""Weights as they were before the step, so that a tensor's update can be scaled after it.

A rate per tensor cannot be set where one parameter group holds many; theta = old + s (new - old) does the same for any
optimizer whose update is linear in the rate (SGD, Adam, AdamW with its decay, Lion). Must not import a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Kept:
    """Copies of the local pieces of some weights, between `before_step` and `after_step` only; buffers are reused.

    Memory: one copy of the tensors kept. Cost: one read and write to take, three passes to scale.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.names: list[str] = []

    def take(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Copy `weights` as they are now; what was kept before is forgotten."""
        self.names = list(names)
        for name, weight in zip(names, weights, strict=True):
            old = self._buffers.get(name)
            if old is None or old.shape != weight.shape or old.dtype != weight.dtype or old.device != weight.device:
                self._buffers[name] = torch.empty_like(weight)
        if names:
            torch._foreach_copy_([self._buffers[name] for name in names], list(weights))

    def old(self, name: str) -> Tensor:
        """The local piece of `name` as it was."""
        return self._buffers[name]

    def updates(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """new - old of the kept names, whose pieces now are `weights`."""
        return torch._foreach_sub(list(weights), [self._buffers[name] for name in self.names]) if self.names else []

    def scale(self, weights: Mapping[str, Tensor], factors: Mapping[str, float]) -> float:
        """weights = old + factor (weights - old), in place; factor 1 keeps the bits. Returns the smallest factor."""
        chosen = {name: factor for name, factor in factors.items() if factor != 1}
        if chosen:
            new, old = [weights[name] for name in chosen], [self._buffers[name] for name in chosen]
            torch._foreach_sub_(new, old)
            torch._foreach_mul_(new, list(chosen.values()))
            torch._foreach_add_(new, old)
        return min(factors.values(), default=1.0)

    def drop(self) -> None:
        """Nothing is kept any more; the buffers stay."""
        self.names = []
