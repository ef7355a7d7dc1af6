"""What a dry run takes back: everything a policy edited, so that training keeps its bits.

Must not import the guard or a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aftershock.signals.ranks import local


class Undo:
    """Copies of weights, gradients, optimizer state and settings, put back where they were edited.

    Cost: one copy of all of them per step; the price of a dry run of a policy that may edit.

    Example:
        undo = Undo(params, optimizer)
        policy.before_step(seen, live)
        undo.back()
    """

    def __init__(self, params: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        self._params, self._optimizer = list(params.values()), optimizer
        self._grads = [p.grad for p in self._params]
        self._states = {p: dict(optimizer.state[p]) for p in self._params if p in optimizer.state}
        self._groups = [dict(group) for group in optimizer.param_groups]
        found = [*self._params, *(g for g in self._grads if g is not None)]
        found += [v for state in self._states.values() for v in state.values() if isinstance(v, Tensor)]
        self._kept = [(t, t._version, (t if t.is_sparse else local(t)).detach().clone()) for t in found]

    @torch.no_grad()
    def back(self) -> None:
        """As it was; what was not touched is not written to."""
        for tensor, version, copy in self._kept:
            if tensor._version != version:
                (tensor if tensor.is_sparse else local(tensor)).copy_(copy)
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
        for p, state in self._states.items():
            self._optimizer.state[p] = state
        for group, old in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update(old)


def stamp(params: Mapping[str, Tensor]) -> list[Any]:
    """Changes when any gradient is written to or replaced; reads no element."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in params.values()]
