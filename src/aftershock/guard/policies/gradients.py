"""The gradients of one step as lists of local pieces: per-tensor norms over all ranks, scaling in place.

Legend: P places (parameters with a gradient). Numbers come to the host once a step, so every rank decides alike and
the state of a policy is plain floats. Must not import a policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aftershock.guard.policy import Live
from aftershock.signals.ranks import Sharding, local, meet, sharding

LOUD = 0.1
"""A policy that shrinks something to less than this share says so: clips act all the time and would flood the log."""


class Gradients(NamedTuple):
    """`grads` and `weights` are the local pieces [P] that a step is made of; writing to them changes the step."""

    names: list[str]
    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    spread: Sharding


def gradients(live: Live, *, names: Sequence[str] | None = None) -> Gradients:
    """All gradients there are, or those of `names`. Parameters without one are left out.

    Raises ValueError for a sparse gradient: its norm and its elements are not those of a tensor.
    """
    chosen = {name: live.params[name] for name in (live.params if names is None else names)}
    found = {name: param for name, param in chosen.items() if param.grad is not None}
    grads: list[Tensor] = []
    for name, param in found.items():
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse; this policy needs dense ones (sparse=False)")
        grads.append(local(param.grad))
    params = list(found.values())
    return Gradients(list(found), params, [local(p) for p in params], grads, sharding(found))


def norms(tensors: Sequence[Tensor], spread: Sharding) -> list[float]:
    """sqrt(sum(x^2)) of each of the tensors [P] whose local pieces are given, over all ranks, on the host.

    One pass over x, squares in float32 at least; with shards one all-gather of P numbers.
    """
    if not tensors:
        return []
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    found: list[Tensor] = []
    for double in (False, True):  # one fused call per width: a bf16 norm must not end in bf16
        part = [t for t in tensors if (t.dtype == torch.float64) is double]
        if part:
            found += torch._foreach_norm(part, 2, dtype=torch.float64 if double else torch.float32)
    order = sorted(range(len(tensors)), key=lambda p: tensors[p].dtype == torch.float64)
    norm_P = torch.stack([one.to(device, wide) for one in found])
    squares_P1 = meet(norm_P[torch.tensor(order, device=device).argsort()].square()[:, None], ["sum"], spread)
    return squares_P1.sqrt().flatten().tolist()


def maxima(tensors: Sequence[Tensor], spread: Sharding) -> list[float]:
    """max |x| of each of the tensors [P], over all ranks, on the host; 0 for one without elements."""
    if not tensors:
        return []
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    tops = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]
    top_P1 = torch.stack([one.to(device, wide) for one in tops])[:, None]
    return meet(top_P1, ["max"], spread).flatten().tolist()


def scale(tensors: Sequence[Tensor], factors: Sequence[float]) -> float:
    """Multiply each tensor by its factor, in place; those of factor 1 keep their bits. Returns the smallest factor.

    Only for finite tensors: a NaN times anything is NaN.
    """
    chosen = [(tensor, factor) for tensor, factor in zip(tensors, factors, strict=True) if factor != 1]
    if chosen:
        torch._foreach_mul_([tensor for tensor, _ in chosen], [factor for _, factor in chosen])
    return min(factors, default=1.0)


def global_norm(norms_P: Sequence[float]) -> float:
    """The norm of all tensors together."""
    return math.sqrt(sum(norm * norm for norm in norms_P))


def limited(norm: float, limit: float) -> float:
    """min(1, limit / norm): the factor that brings a norm down to its limit."""
    return 1.0 if norm <= limit else limit / norm


def told(what: str, factor: float) -> str:
    """The reason for a `Continue`: empty unless the policy did something that a person would want to know."""
    return f"{what}: scaled by {factor:.3g}" if factor < LOUD else ""
